"""Functions in place of modules: a module that registers what a function of a VAE reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .last_layer import called_by
from .modules import is_known, modules_of


class _Function(nn.Module):
    """Module that wraps a function and registers the modules that it reaches as children."""

    def __init__(self, function: Callable[..., Any], modules: list[nn.Module], holder: type[nn.Module]):
        super().__init__()
        self.function, self._holder = function, holder
        for module in modules:
            name = start = type(module).__name__.lower()
            count = 1
            while hasattr(self, name):
                count += 1
                name = f"{start}{count}"
            self.add_module(name, module)

    def forward(self, *args: Any) -> Any:
        return self.function(*args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A method is copied with its module. A function would go on referring to the original's modules.
        if self._modules and not is_known(self.function):
            names = ", ".join(sorted({type(m).__name__ for m in self.children()}))
            raise TypeError(
                f"a VAE whose encoder or decoder is the function {_name(self.function)} cannot be copied or "
                f"pickled: the copy would go on using the original's {names}. Pass VAE the "
                "module itself, if the function does no more than split its output, or put the function's "
                "code into the forward of an nn.Module, or into a method of one"
            )
        return super().__reduce_ex__(protocol)

    # These traverse all modules, and would not terminate if one of the children contained the VAE.

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        self._refuse_cycle()
        return super().named_children()

    def extra_repr(self) -> str:
        self._refuse_cycle()
        return super().extra_repr()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_cycle()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_cycle()
        super()._load_from_state_dict(*args, **kwargs)

    def _refuse_cycle(self) -> None:
        for name, module in self._modules.items():
            if module is not None and any(m is self for m in module.modules()):
                raise ValueError(_cycle(_name(self.function), name, module, self._holder))


def as_registered(
    name: str,
    function: Callable[..., Any],
    vae: nn.Module,
    modules: list[nn.Module] | None,
    holder: type[nn.Module],
) -> Callable[..., Any]:
    """Wrap a method or a function in a module that registers the modules it reaches.

    Args:
        name: the argument of VAE, for messages.
        function: its value; a module, and a method of the VAE itself, are returned as they are.
        vae: the VAE.
        modules: modules that functions reach, as the user named them.
        holder: the class VAE.
    """
    owner = called_by(function)
    if isinstance(function, nn.Module) or owner is vae:
        return function
    if is_known(function):
        return _Function(function, modules_of(function), holder)
    if modules is None:
        raise TypeError(
            f"{name} is {_name(function)}, neither a module nor a method of one, so the VAE does not know "
            f"which modules it reaches: they would not be trained, saved, moved, or put into eval mode. Name "
            f"all of them, such as VAE({name}=..., modules=[net]), or modules=[] if there are none; or pass "
            "the module itself, or its method, such as net.encode"
        )
    return _Function(function, modules, holder) if modules else function


def _cycle(function: str, name: str, module: nn.Module, holder: type[nn.Module]) -> str:
    parts = [f"{name}.{n}" for n, m in module.named_children() if not isinstance(m, holder)]
    example = f", such as {' and '.join(parts)}" if parts else ""
    return (
        f"{function} reaches the {type(module).__name__} that holds the VAE, so that each would be a part of "
        f"the other. Give VAE the networks themselves{example}; or build no VAE, and call fastvae.elbo or "
        "fastvae.iwae yourself"
    )


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
