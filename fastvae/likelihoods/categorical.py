"""Categorical likelihood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ..core.checks import as_int, check_same_device, check_tensor, shape_of, signed
from ..core.nested import Conditioning, all_tensors
from ..ops.categorical import categorical_rows, check_axis, check_classes, classes_hint
from .base import NAMED, Likelihood
from .natural import check_flag, log_of
from .outputs import describe

SHARES = "probabilities", "logits"


class Categorical(Likelihood):
    r"""Categorical likelihood p(x|z) of independent classes: pixels in 256 levels, tokens, genotypes.

    The decoder returns logits with a class axis, [N, C, \*event], or [N, \*event, C] for ``axis=-1``.

    .. math:: \log p(x|z_k) = \sum_i \Big[l_{k x_i i} - \log \sum_c e^{l_{kci}}\Big]

    With the upstream gradient :math:`g_k`:
    :math:`\bar l_{kci} = g_k ([x_i = c] - \mathrm{softmax}(l_{k \cdot i})_c)`.
    x [B, \*event] holds whole numbers from 0 to C − 1, of any dtype. The op is
    ``fastvae.ops.categorical_log_prob(x, logits)``.

    Args:
        ignore_index: the class whose elements are skipped, such as padding; as in
            ``torch.nn.functional.cross_entropy``. Padding can be left out by ``mask=``, too.
        axis: the classes' axis in the decoder's output: 1 (default), the one after the batch's, or −1, the
            last, as transformers and recurrent decoders return it. Neither is copied.
        probs: the decoder returns probabilities (it ends in a softmax), or numbers proportional to them.
            Their logarithms are at least −100, with the slope :math:`1 / \max(p, 10^{-30})`, so that nothing
            is infinite at 0; in float16 the gradient saturates at that dtype's range.

    Example:
        >>> import torch, fastvae
        >>> x = torch.randint(4, (2, 7))
        >>> q, decoder = torch.zeros(2, 2 * 3), torch.nn.Sequential(
        ...     torch.nn.Linear(3, 4 * 7), torch.nn.Unflatten(1, (4, 7))
        ... )
        >>> fastvae.iwae(x, q, decoder, k=5, likelihood="categorical").shape
        torch.Size([])
        >>> fastvae.ops.categorical_log_prob(x, torch.zeros(2, 4, 7))  # -7 log 4
        tensor([-9.7041, -9.7041])
        >>> tokens, text = fastvae.likelihoods.Categorical(ignore_index=0, axis=-1), torch.nn.Linear(3, 9)
        >>> fastvae.elbo(x, q, lambda z: text(z)[:, None].expand(-1, 7, -1), likelihood=tokens).shape
        torch.Size([])
    """

    takes_integers = True
    differentiable = False
    reads, option = "class logits", "probs"
    family = td.Categorical

    def __init__(self, ignore_index: int = -100, *, axis: int = 1, probs: bool = False):
        super().__init__()
        check_axis(axis)
        self.axis = axis
        self.probs = check_flag("probs", probs)
        if probs:
            self.reads = ""  # type: ignore[misc]
        self.ignore_index = as_int("ignore_index", ignore_index, "a class that x may hold")

    def log_likelihood(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Tensor:
        if type(self).log_prob is not Categorical.log_prob:  # overridden by a subclass
            return super().log_likelihood(x, parameters, samples, conditioning)
        if conditioning is not None and conditioning.size_factor is not None:
            raise self.no_size()
        mask = None if conditioning is None else conditioning.mask
        seen = mask.unsqueeze(self.axis) if mask is not None else None
        x, parameters = signed(x), self._logits(parameters, seen)
        self._check(x, parameters, samples)
        if mask is not None:
            # In a dtype that represents ignore_index.
            wide = x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x.long()
            x = torch.where(mask, wide, self.ignore_index)
        return categorical_rows(x, parameters, self.ignore_index, self.axis).reshape(samples, x.shape[0])

    def log_prob(self, x: Tensor, parameters: Any) -> Tensor:
        """Return log p [N, *event] of each element; 0 for ``ignore_index``.

        Args:
            x: classes [N, *event].
            parameters: the decoder's output [N, C, *event], or [N, *event, C] for ``axis=-1``.
        """
        x = x if x.is_floating_point() else x.long()
        parameters = self._logits(self.read(parameters, x))
        self._check(x, parameters, 1)
        check_classes(x, parameters.shape[self.axis], self.ignore_index)
        counts = x != self.ignore_index
        index = torch.where(counts, x, 0).long().unsqueeze(self.axis)
        log_p = parameters.log_softmax(self.axis).gather(self.axis, index).squeeze(self.axis)
        return torch.where(counts, log_p, 0.0)

    def mean(self, parameters: Any) -> Tensor:
        """Return the expected class index [N, *event]: meaningful for levels, not for unordered classes."""
        parameters = self.read(parameters)
        dtype, logits = all_tensors(parameters)[0].dtype, self._logits(parameters)
        numbers = torch.arange(logits.shape[self.axis], device=logits.device, dtype=dtype)
        shares: Tensor = logits.softmax(self.axis).to(dtype)
        return shares.movedim(self.axis, -1) @ numbers

    def sample(self, parameters: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw classes [N, *event], int64."""
        rows = self._logits(self.read(parameters)).float().softmax(self.axis).movedim(self.axis, -1)
        drawn = torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1, generator=generator)
        return drawn.reshape(rows.shape[:-1])

    @property
    def expected_names(self) -> tuple[str, ...]:
        """Name of the tensor that the decoder returns; none if a subclass overrides log_prob."""
        if type(self).log_prob is not Categorical.log_prob:
            return ()
        return ("probs",) if self.probs else ("logits",)

    def parameters_of(self, d: Any) -> Any:
        return d.logits if self.axis == -1 else d.logits.movedim(-1, 1)

    def _check(self, x: Tensor, logits: Any, samples: int) -> None:
        if not isinstance(logits, Tensor):
            raise TypeError(
                "the decoder of a categorical likelihood must return logits, one tensor [N, C, *event]; got "
                f"{describe(logits)}"
            )
        check_tensor("the decoder's logits", logits)
        check_same_device("the decoder's logits", logits, "x", x)
        rows, event = samples * x.shape[0], x.shape[1:]
        shape = (rows, "C", *event) if self.axis == 1 else (rows, *event, "C")
        fits = logits.dim() == len(shape)
        if not fits or any([m not in ("C", n) for n, m in zip(logits.shape, shape, strict=True)]):
            axes, sizes = "C, *event" if self.axis == 1 else "*event, C", ", ".join(map(str, shape))
            raise ValueError(
                f"the decoder's logits has shape {shape_of(logits)}; expected [N, {axes}] = [{sizes}] for an "
                f"x of {shape_of(x)}{classes_hint(x, logits, self.axis)}"
            )

    def _logits(self, parameters: Any, seen: Tensor | None = None) -> Any:
        return log_of(parameters, "Categorical(probs=True)", *SHARES, seen) if self.probs else parameters

    def extra_repr(self) -> str:
        own = [
            f"ignore_index={self.ignore_index}",
            *["axis=-1"] * (self.axis == -1),
            *["probs=True"] * self.probs,
        ]
        return ", ".join(own)


NAMED["categorical"] = Categorical
