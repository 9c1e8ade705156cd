"""Likelihood of data in several parts, each with its own likelihood."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.nested import Conditioning
from ..ops.categorical import column_rows
from .base import Likelihood
from .categorical import Categorical
from .columns import read_weights
from .outputs import describe
from .read import as_likelihood


class Joint(Likelihood):
    r"""Joint likelihood p(x|z) of several parts, independent given z.

    x is a dict of tensors, and the decoder returns a dict of each part's parameters, by the same names: a
    tensor, a tuple, or any other form that the part's likelihood reads.

    .. math:: \log p(x|z_k) = \sum_{\text{parts } j} w_j \log p_j(x_j|z_k)

    ``mask`` and ``size_factor`` are dicts by part, too; parts without one may be left out.

    Args:
        parts: the likelihood of each part, a name or an object: by keyword, or in a dict.
        weights: factors of parts' log p, by name; default 1.

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

    def __init__(
        self,
        parts: Mapping[str, str | Likelihood] | None = None,
        /,
        *,
        weights: Mapping[str, float] | None = None,
        **named: str | Likelihood,
    ):
        super().__init__()
        parts = {**(parts or {}), **named}
        if not parts:
            raise ValueError(
                'Joint needs parts by name, such as Joint(pixels="bernoulli", genes="poisson"); got none'
            )
        self.parts = nn.ModuleDict({name: as_likelihood(part) for name, part in parts.items()})
        self._weights = read_weights(weights, tuple(parts))
        self.takes_sparse = any(part.takes_sparse for _, part in self._each())  # type: ignore[misc]

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
        classes: dict[tuple[Any, ...], list[str]] = {}
        for name, part in self._each():
            own = None if conditioning is None else conditioning.part(name)
            if _is_column(part, x[name], own):
                key = self._weights[name], part.ignore_index, part.probs, x[name].dtype
                classes.setdefault(key, []).append(name)
                continue
            value = part.log_likelihood(x[name], parameters[name], samples, own)
            total = total + _times(value, self._weights[name])
        for (weight, *_), names in classes.items():
            total = total + _times(self._columns(names, x, parameters, samples), weight)
        return total  # type: ignore[no-any-return]

    def _columns(self, names: list[str], x: Any, parameters: Any, samples: int) -> Tensor:
        """Return the sum of log p [K, B] of parts that are one class for each example, by one op."""
        first: Any = self.parts[names[0]]
        if len(names) == 1:
            return first.log_likelihood(x[names[0]], parameters[names[0]], samples)  # type: ignore[no-any-return]
        logits = [parameters[name] for name in names]
        for name, value in zip(names, logits, strict=True):
            first._check(x[name], value, samples)
        begins = tuple(itertools.accumulate((value.shape[1] for value in logits), initial=0))
        data, row = torch.stack([x[name] for name in names], 1), torch.cat(logits, 1)
        value = column_rows(data, begins, first._logits(row), first.ignore_index)
        return value.reshape(samples, data.shape[0])

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


def _is_column(part: Likelihood, x: Any, conditioning: Conditioning | None) -> bool:
    """Return True for a class of each example that a table's op evaluates."""
    return (
        isinstance(part, Categorical)
        and type(part).log_likelihood is Categorical.log_likelihood
        and type(part).log_prob is Categorical.log_prob
        and conditioning is None
        and isinstance(x, Tensor)
        and x.dim() == 1
    )


def _times(value: Tensor, weight: float) -> Tensor:
    return value if weight == 1 else value * weight
