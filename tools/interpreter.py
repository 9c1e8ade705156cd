"""Triton's interpreter, for tests and dry runs, at twice its speed."""

from __future__ import annotations

from collections.abc import Callable


def quicken() -> None:
    """Make the interpreter patch Triton's functions once per launch.

    By itself it repeats this, over the whole language, at every function call in a kernel, which is half of a
    launch's time. Versions of Triton in which this function has another name are left unchanged.
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

        def restore_all() -> None:  # called for the launch, not for its inner calls
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang
