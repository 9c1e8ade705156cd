"""Likelihood of data in several parts, each with its own likelihood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.nested import Conditioning
from .base import Likelihood
from .outputs import describe
from .read import as_likelihood


class Joint(Likelihood):
    r"""Joint likelihood p(x|z) of several parts, independent given z.

    x is a dict of tensors, and the decoder returns a dict of each part's parameters, by the same names: a
    tensor, a tuple, or any other form that the part's likelihood reads.

    .. math:: \log p(x|z_k) = \sum_{\text{parts } j} \log p_j(x_j|z_k)

    ``mask`` and ``size_factor`` are dicts by part, too; parts without one may be left out.

    Args:
        parts: the likelihood of each part, by keyword: a name or an object.

    Raises:
        TypeError, ValueError: without parts; for an unknown likelihood; when called, for an x or a decoder's
            output with other parts.

    References:
        Wu & Goodman, Multimodal Generative Models for Scalable Weakly-Supervised Learning, 2018.

    Example:
        >>> import torch, fastvae
        >>> from fastvae.likelihoods import Joint, NegativeBinomial
        >>> joint = Joint(pixels="bernoulli", genes=NegativeBinomial(10.0))
        >>> x = {"pixels": torch.ones(4, 8, 8), "genes": torch.ones(4, 20, dtype=torch.int32)}
        >>> pixels, genes = torch.nn.Linear(3, 64), torch.nn.Linear(3, 20)
        >>> def decoder(z):
        ...     return {"pixels": pixels(z).reshape(-1, 8, 8), "genes": genes(z)}
        >>> fastvae.iwae(x, torch.zeros(4, 2 * 3), decoder, k=5, likelihood=joint).shape
        torch.Size([])
    """

    reads = "parts"

    def __init__(self, **parts: str | Likelihood):
        super().__init__()
        if not parts:
            raise ValueError(
                'Joint needs parts by name, such as Joint(pixels="bernoulli", genes="poisson"); got none'
            )
        self.parts = nn.ModuleDict({name: as_likelihood(part) for name, part in parts.items()})

    def check(self, x: Any, name: str = "x") -> None:
        self._matched(x, name)
        for key, part in self._each():
            part.check(x[key], f"{name}[{key!r}]")

    def read_output(
        self, x: Any, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Any:
        self._matched(parameters, "the decoder's output")
        returned = {}
        for name, part in self._each():
            own = None if conditioning is None else conditioning.part(name)
            returned[name] = part.read_output(x[name], parameters[name], samples, own)
        return returned

    def read(self, parameters: Any, x: Any = None) -> Any:
        self._matched(parameters, "the decoder's output")
        parts = {} if x is None else x
        return {n: part.read(parameters[n], parts.get(n)) for n, part in self._each()}

    def multiplied_out(self, parameters: Any, x: Any = None) -> Any:
        self._matched(parameters, "the decoder's output")
        parts = {} if x is None else x
        return {n: part.multiplied_out(parameters[n], parts.get(n)) for n, part in self._each()}

    def log_likelihood(
        self, x: Any, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Tensor:
        self._matched(parameters, "the decoder's output")
        total: Any = 0
        for name, part in self._each():
            own = None if conditioning is None else conditioning.part(name)
            total = total + part.log_likelihood(x[name], parameters[name], samples, own)
        return total  # type: ignore[no-any-return]

    def log_prob(self, x: Any, parameters: Any) -> Tensor:
        """Return log p(x|z) [N] of N rows.

        Args:
            x: dict of data, [N, *event] each.
            parameters: dict of the decoder's outputs, N rows each.
        """
        return self.log_likelihood(x, self.read_output(x, parameters, 1), 1)[0]

    def mean(self, parameters: Any) -> dict[str, Any]:
        """Return the mean of each part."""
        self._matched(parameters, "the decoder's output")
        return {name: part.mean(parameters[name]) for name, part in self._each()}

    def sample(self, parameters: Any, *, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Draw each part."""
        self._matched(parameters, "the decoder's output")
        return {name: part.sample(parameters[name], generator=generator) for name, part in self._each()}

    def _each(self) -> list[tuple[str, Likelihood]]:
        return list(self.parts.items())  # type: ignore[arg-type]

    def _matched(self, value: Any, name: str) -> None:
        expected = f"a dict with {', '.join(map(repr, self.parts))}, the parts of Joint"
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be {expected}; got {describe(value)}")
        missing = [n for n in self.parts if n not in value]
        more = [n for n in value if n not in self.parts]
        if missing or more:
            what = [f"{n!r} is missing" for n in missing] + [f"{n!r} is not one of them" for n in more]
            raise ValueError(f"{name} must be {expected}; {', '.join(what)}")
