"""Triton's interpreter, for tests and dry runs, at twice its speed."""

from __future__ import annotations

from collections.abc import Callable


def quicken() -> None:
    """Let the interpreter put its own functions in place of Triton's once a launch.

    It looks through the whole language at every call of a function in a kernel, to do what is done already:
    that is half of a launch's time. A version of Triton in which this has another name stays as it is.
    """
    try:
        from triton import language as tl
        from triton.runtime import interpreter

        patch, empty_scope = interpreter._patch_lang, interpreter._LangPatchScope
    except (ImportError, AttributeError):
        return
    if patch.__module__ == __name__:
        return
    patched: set[int] = set()

    def patch_lang(function: Callable):
        modules = {id(m) for m in (tl, tl.core) if any(v is m for v in function.__globals__.values())}
        if modules <= patched:
            return empty_scope()
        scope = patch(function)
        patched.update(modules)
        restore = scope.restore

        def restore_all() -> None:  # called for the launch, not for what is called in it
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang
