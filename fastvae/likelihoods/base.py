"""Base class of the likelihoods p(x|z)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributions as td

from ..core.checks import as_int64, check_data, check_result
from ..core.deferred import LastLayer, multiply_out
from ..core.hints import described, explained, teaches_by
from ..core.nested import Conditioning, each, repeat, tensors
from ..ops.head import Layers
from ..ops.op import accumulator
from .outputs import by_name


class Likelihood(nn.Module):
    """Base class of likelihoods p(x|z).

    Subclass it for your own; it is a module, so its parameters are registered with the model's.

    A subclass needs :meth:`log_prob`, in plain PyTorch; :func:`fastvae.likelihoods.from_distribution` builds
    one from a ``torch.distributions`` constructor. Every objective accepts it, also when it runs in chunks.

    Example:
        >>> import torch, fastvae
        >>> class Laplace(fastvae.likelihoods.Likelihood):
        ...     def log_prob(self, x, location):
        ...         return -(x - location).abs() - torch.log(torch.tensor(2.0))
        >>> x, q = torch.ones(4, 7), torch.zeros(4, 2 * 3)
        >>> fastvae.iwae(x, q, torch.nn.Linear(3, 7), k=5, likelihood=Laplace()).shape
        torch.Size([])

    Attributes:
        takes_integers: x may be an integer tensor; otherwise integers raise.
        takes_sparse: x may be a sparse matrix [B, X].
        takes_size: the mean accepts a factor for each example, ``size_factor=``.
        differentiable: x may have a gradient.
        inside: a valid value of an element of x; it replaces the elements that a ``mask`` leaves out.
        reads: the meaning of the decoder's first output, for warnings about decoders that return another:
            ``"logits"``, ``"class logits"`` along axis 1, ``"event logits"`` or ``"log rates"``.
        option: the constructor argument with which the decoder returns probabilities or rates instead.
        counts: x are counts, whole numbers.
        expected_names: names of the tensors that the decoder returns, in the order of a tuple. Empty for a
            user-defined likelihood, which gets the decoder's output as it is.
        optional_names: names of further tensors that the decoder may return.
        own_names: names of parameters that the likelihood itself has, which the decoder must not return.
        family: the class of torch.distributions that is read by :meth:`parameters_of`, or None.
    """

    takes_integers: ClassVar[bool] = False
    takes_sparse: ClassVar[bool] = False
    takes_size: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    inside: ClassVar[float] = 0.0
    reads: ClassVar[str] = ""
    option: ClassVar[str] = ""
    counts: ClassVar[bool] = False
    optional_names: ClassVar[tuple[str, ...]] = ()
    family: ClassVar[type[td.Distribution] | None] = None

    def log_prob(self, x: Any, parameters: Any) -> Tensor:
        """Return log p(x|z), a floating-point tensor [N, *event].

        It may be summed over the event or over its last axes; any other shape raises.

        Args:
            x: data [N, *event].
            parameters: the decoder's output for N rows of z.
        """
        raise NotImplementedError(f"{type(self).__name__} has no log_prob(x, parameters)")

    def mean(self, parameters: Any) -> Any:
        """Return the mean of x given the decoder's output, for reconstructions and pictures."""
        raise NotImplementedError(f"{type(self).__name__} has no mean(parameters)")

    def sample(self, parameters: Any, *, generator: torch.Generator | None = None) -> Any:
        """Draw x given the decoder's output."""
        raise NotImplementedError(f"{type(self).__name__} has no sample(parameters, generator=...)")

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("fastvae."):
            teaches_by(cls)

    # The interface that the objectives call.

    def check(self, x: Any, name: str = "x") -> None:
        """Validate the kind of the data."""
        if not isinstance(x, Mapping):
            check_data(x, self, name)
            return
        for key, part in x.items():
            check_data(part, self, f"{name}[{key!r}]")

    def log_likelihood(
        self, x: Any, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Return log p(x|z) [K, B] of a batch x and the decoder's output for K·B rows of z, sample-major."""
        mask, size_factor, _ = conditioning or _NOTHING
        if size_factor is not None:
            raise self.no_size()
        batch = tensors(x)[0].shape[0]
        x = each(as_int64, x)  # PyTorch's arithmetic overflows in small integer dtypes
        given = repeat(observed(x, mask, self), samples), parameters

        def note() -> str:
            what = f"with x {described(given[0])} and parameters {described(parameters)}"
            return f"fastvae called {type(self).__name__}.log_prob(x, parameters) {what}"

        value = explained(self.log_prob, given, note)
        self._check_log_prob(value, x, samples * batch, mask)
        value = value.to(accumulator(value.dtype))
        if mask is not None:
            value = torch.where(repeat(mask, samples), value, 0.0)
        return summed(value, samples, batch)

    def read_output(
        self, x: Any, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Any:
        """Return the decoder's output for K·B rows of z as :meth:`fused` and :meth:`log_likelihood` take it.

        A last layer stays unmultiplied if a fused op takes it, and is multiplied out otherwise.
        """
        return self.read(parameters, x)

    def read(self, parameters: Any, x: Any = None) -> Any:
        """Return the decoder's output in the form that :meth:`mean` and :meth:`sample` compute with.

        A mapping, an object or a distribution becomes the tensor or the tuple that it names, and a last layer
        is multiplied out. A user-defined likelihood gets the decoder's output as it is.
        """
        return self.multiplied_out(by_name(self, parameters), x)

    @property
    def expected_names(self) -> tuple[str, ...]:
        return ()

    @property
    def own_names(self) -> tuple[str, ...]:
        return ()

    def parameters_of(self, d: Any) -> Any:
        """Return the parameters [N, *event] of a distribution of the likelihood's family."""
        raise NotImplementedError

    def completion(self, returned: int) -> str:
        """Return a hint for a decoder that returns only the first outputs, or ""."""
        return ""

    def multiplied_out(self, parameters: Any, x: Any = None) -> Any:
        """Return the decoder's output with each unmultiplied last layer multiplied out."""
        if type(parameters) is LastLayer:
            outputs = multiply_out(parameters, self._event(parameters, x))
            return outputs[0] if len(outputs) == 1 else outputs
        if type(parameters) in (tuple, list) and any([type(p) is LastLayer for p in parameters]):
            return type(parameters)([self.multiplied_out(p, x) for p in parameters])
        if isinstance(parameters, Mapping) and any([type(p) is LastLayer for p in parameters.values()]):
            return {name: self.multiplied_out(p, x) for name, p in parameters.items()}
        return parameters

    def _event(self, layer: LastLayer, x: Any) -> tuple[int, ...] | None:
        """Return the event shape of the layer's output; None: the shape of the layer itself."""
        return layer.event

    def fused(
        self, x: Any, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Fused | None:
        """Return the arguments of the fused op, or None if there is no such op."""
        return None

    def all_outputs(self, x: Tensor, parameters: Any) -> tuple[str, tuple[Any, ...]] | None:
        """Return the op's name and all its arguments but x, or None if there is no op.

        The decoder's output belongs to latents that are independent of x (all pairs are evaluated).
        """
        return None

    def no_size(self) -> TypeError:
        known = ", ".join(kind.__name__ for kind in NAMED.values() if kind.takes_size)
        return TypeError(
            f"size_factor multiplies the mean of counts, which a {type(self).__name__} likelihood does not "
            f"have; those that do: {known}. For others give it as context= and use it in the decoder"
        )

    def _check_log_prob(self, value: Any, x: Any, rows: int, mask: Any) -> None:
        """Validate that log_prob returned an entry per row, perhaps summed over last axes of the event.

        With a mask there must be one entry per element.
        """
        shape = (rows, *(() if isinstance(x, Mapping) else x.shape[1:]))
        fits = isinstance(value, Tensor) and value.dim() > 0 and value.shape == shape[: value.dim()]
        axes = "[N, *event]"
        fix = "an entry for each row, sample times batch, summed over axes of the event alone"
        if mask is not None:
            fits = fits and value.shape == shape
            fix = "a mask needs log p of each element of the event"
        elif len(shape) > 1:
            # Formatting a compiler's symbolic size would fix it.
            axes = f"summed over the event, [{'N' if fits else rows}]; or of each element, {axes}"
        check_result(
            self, "log_prob", "log p(x|z)", value, axes, value.shape if fits else shape, tensors(x)[0].device,
            fix,
        )  # fmt: skip


_NOTHING = Conditioning()


def summed(value: Tensor, samples: int, batch: int) -> Tensor:
    """Sum elementwise log p of K·B rows over the event: [K, B], also for an empty batch."""
    return value.reshape(samples, batch, value.numel() // max(1, samples * batch)).sum(2)


def observed(x: Any, mask: Any, likelihood: Likelihood) -> Any:
    """Return x with its unobserved elements replaced by the likelihood's ``inside``."""
    if mask is None:
        return x
    if isinstance(x, Mapping):
        raise TypeError(
            f"mask is given with an x of several parts, whose elements {type(likelihood).__name__} does not "
            "tell apart; use fastvae.likelihoods.Joint, which takes a mask of each"
        )
    inside = float(likelihood.inside)
    if not (x.is_floating_point() or inside.is_integer()):
        x = x.to(torch.get_default_dtype())
    return torch.where(mask, x, torch.full((), inside, dtype=x.dtype, device=x.device))


# Arguments of fastvae.ops.reduce: the likelihood's name, x [B, X], parameters, the first [K·B, X], and a mask
# [B, X] or None; or those of fastvae.ops.head, without a mask.
Fused = tuple[str, Tensor, tuple[Tensor, ...], Tensor | None] | tuple[str, Tensor, Layers, None]

# Likelihoods by the name that ``likelihood=`` accepts.
NAMED: dict[str, type[Likelihood]] = {}
