"""Categorical and multinomial likelihoods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ..core.checks import as_int, check_data, check_same_device, check_tensor, may_look, shape_of, signed
from ..core.nested import Conditioning, all_tensors, repeat
from ..ops.components import categorical_rows, check_classes
from .base import NAMED, Likelihood
from .natural import check_flag, log_of
from .outputs import describe

_SHARES = "probabilities", "logits"


class Categorical(Likelihood):
    r"""Categorical likelihood p(x|z) of independent classes: pixels in 256 levels, tokens, genotypes.

    The decoder returns logits with a class axis, [N, C, \*event].

    .. math:: \log p(x|z_k) = \sum_i \Big[l_{k x_i i} - \log \sum_c e^{l_{kci}}\Big]

    With the upstream gradient :math:`g_k`:
    :math:`\bar l_{kci} = g_k ([x_i = c] - \mathrm{softmax}(l_{k \cdot i})_c)`.
    x [B, \*event] holds whole numbers from 0 to C − 1, of any dtype. The op is
    ``fastvae.ops.categorical_log_prob(x, logits)``.

    Args:
        ignore_index: the class whose elements are skipped, such as padding; as in
            ``torch.nn.functional.cross_entropy``.
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
    """

    takes_integers = True
    differentiable = False
    reads, option = "class logits", "probs"
    family = td.Categorical

    def __init__(self, ignore_index: int = -100, *, probs: bool = False):
        super().__init__()
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
        x, parameters = signed(x), self._logits(parameters)
        self._check(x, parameters, samples)
        if conditioning is not None and conditioning.mask is not None:
            # In a dtype that represents ignore_index.
            wide = x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x.long()
            x = torch.where(conditioning.mask, wide, self.ignore_index)
        return categorical_rows(x, parameters, self.ignore_index).reshape(samples, len(x))

    def log_prob(self, x: Tensor, parameters: Any) -> Tensor:
        """Return log p [N, *event] of each element; 0 for ``ignore_index``.

        Args:
            x: classes [N, *event].
            parameters: the decoder's output [N, C, *event].
        """
        x = x if x.is_floating_point() else x.long()
        parameters = self._logits(self.read(parameters, x))
        self._check(x, parameters, 1)
        check_classes(x, parameters.shape[1], self.ignore_index)
        counts = x != self.ignore_index
        index = torch.where(counts, x, 0).long()[:, None]
        return torch.where(counts, parameters.log_softmax(1).gather(1, index)[:, 0], 0.0)

    def mean(self, parameters: Any) -> Tensor:
        """Return the expected class index [N, *event]: meaningful for levels, not for unordered classes."""
        parameters = self.read(parameters)
        dtype, logits = all_tensors(parameters)[0].dtype, self._logits(parameters)
        numbers = torch.arange(logits.shape[1], device=logits.device, dtype=dtype)
        shares: Tensor = logits.softmax(1).to(dtype)
        return (shares * numbers.reshape(-1, *[1] * (logits.dim() - 2))).sum(1)

    def sample(self, parameters: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw classes [N, *event], int64."""
        rows = self._logits(self.read(parameters)).float().softmax(1).movedim(1, -1)
        drawn = torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1, generator=generator)
        return drawn.reshape(rows.shape[:-1])

    @property
    def expected_names(self) -> tuple[str, ...]:
        """Name of the tensor that the decoder returns; none if a subclass overrides log_prob."""
        if type(self).log_prob is not Categorical.log_prob:
            return ()
        return ("probs",) if self.probs else ("logits",)

    def parameters_of(self, d: Any) -> Any:
        return d.logits.movedim(-1, 1)

    def _check(self, x: Tensor, logits: Any, samples: int) -> None:
        if not isinstance(logits, Tensor):
            raise TypeError(
                "the decoder of a categorical likelihood must return logits, one tensor [N, C, *event]; got "
                f"{describe(logits)}"
            )
        check_tensor("the decoder's logits", logits)
        check_same_device("the decoder's logits", logits, "x", x)
        rows, event = samples * len(x), x.shape[1:]
        if logits.dim() != x.dim() + 1 or (logits.shape[0], *logits.shape[2:]) != (rows, *event):
            expected = ", ".join(map(str, (rows, "C", *event)))
            last = logits.dim() == x.dim() + 1 and (logits.shape[0], *logits.shape[1:-1]) == (rows, *event)
            hint = "; the classes are the axis after the batch's, not the last: use logits.movedim(-1, 1)"
            raise ValueError(
                f"the decoder's logits has shape {shape_of(logits)}; expected [N, C, *event] = [{expected}] "
                f"for an x of {shape_of(x)}{hint if last else ''}"
            )

    def _logits(self, parameters: Any) -> Any:
        return log_of(parameters, "Categorical(probs=True)", *_SHARES) if self.probs else parameters

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}" + ", probs=True" * self.probs


class Multinomial(Likelihood):
    r"""Multinomial likelihood p(x|z) of class counts over the whole event.

    The decoder returns logits [N, \*event]. It suits recommender systems (Mult-VAE) and documents.

    .. math:: \log p(x|z_k) = \log n! - \sum_i \log x_i! + \sum_i x_i \log \mathrm{softmax}(l_k)_i,
              \quad n = \sum_i x_i

    Counts may be of any dtype. It is implemented in plain PyTorch.

    Args:
        probs: the decoder returns probabilities, as in :class:`Categorical`.

    References:
        Liang, Krishnan, Hoffman & Jebara, Variational Autoencoders for Collaborative Filtering, 2018.

    Example:
        >>> import torch, fastvae
        >>> clicks, q = torch.tensor([[1, 0, 1], [0, 2, 0]]), torch.zeros(2, 2 * 5)
        >>> fastvae.iwae(clicks, q, torch.nn.Linear(5, 3), k=7, likelihood="multinomial").shape
        torch.Size([])
        >>> fastvae.likelihoods.Multinomial().log_prob(clicks, torch.zeros(2, 3))  # log 2 − 2 log 3, −2 log 3
        tensor([-1.5041, -2.1972])
    """

    takes_integers = True
    differentiable = False
    reads, option, counts = "event logits", "probs", True
    family = td.Multinomial

    def __init__(self, *, probs: bool = False):
        super().__init__()
        self.probs = check_flag("probs", probs)
        if probs:
            self.reads = ""  # type: ignore[misc]

    def extra_repr(self) -> str:
        return "probs=True" if self.probs else ""

    def _logits(self, parameters: Any) -> Any:
        return log_of(parameters, "Multinomial(probs=True)", *_SHARES) if self.probs else parameters

    def check(self, x: Any, name: str = "x") -> None:
        x = check_data(x, self, name)
        if may_look(x) and bool((x < 0).any()):
            raise ValueError(f"{name} holds {float(x.min()):g}, but counts must lie at or above 0")

    def log_likelihood(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Tensor:
        if type(self).log_prob is not Multinomial.log_prob:  # overridden by a subclass
            return super().log_likelihood(x, parameters, samples, conditioning)
        mask, size_factor, _ = conditioning or Conditioning()
        if size_factor is not None:
            raise self.no_size()
        logits = self._read(x, self._logits(parameters), samples)
        if mask is not None:
            # Unobserved classes are removed: count 0, probability 0.
            x = torch.where(mask, x, 0)
            logits = torch.where(repeat(mask, samples), logits, -1e30)
        counts = x.to(logits.dtype).flatten(1)
        log_p = logits.flatten(1).log_softmax(1).reshape(samples, *counts.shape)
        # A count of 0 contributes 0, even if its class is impossible (0 · inf).
        picked = torch.where(counts == 0, 0.0, counts * torch.where(counts == 0, 0.0, log_p)).sum(2)
        wide = counts.double()
        own = torch.lgamma(wide.sum(1) + 1) - torch.lgamma(wide + 1).sum(1)
        return picked + own.to(picked.dtype)

    def log_prob(self, x: Tensor, parameters: Any) -> Tensor:
        """Return log p [N] of each row; the counts of the classes are dependent.

        Args:
            x: counts [N, *event].
            parameters: the decoder's output [N, *event].
        """
        return self.log_likelihood(x, self.read(parameters, x), 1)[0]

    def mean(self, parameters: Any) -> Tensor:
        """Return the expected shares of the classes [N, *event], which sum to 1; times n they are counts."""
        parameters = self.read(parameters)
        dtype, logits = all_tensors(parameters)[0].dtype, self._logits(parameters)
        shares: Tensor = logits.flatten(1).softmax(1)
        return shares.reshape(logits.shape).to(dtype)

    def sample(self, parameters: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw one class per row, one-hot [N, *event]: the model does not include n."""
        logits = self._logits(self.read(parameters))
        rows = logits.float().flatten(1).softmax(1)
        drawn = torch.multinomial(rows, 1, generator=generator)
        return torch.zeros_like(rows).scatter_(1, drawn, 1.0).reshape(logits.shape)

    @property
    def expected_names(self) -> tuple[str, ...]:
        """Name of the tensor that the decoder returns; none if a subclass overrides log_prob."""
        if type(self).log_prob is not Multinomial.log_prob:
            return ()
        return ("probs",) if self.probs else ("logits",)

    def parameters_of(self, d: Any) -> Any:
        if d.logits.dim() != 2:
            raise ValueError(
                f"the decoder returned Multinomials of batch shape {list(d.batch_shape)}, but a multinomial "
                "likelihood is one distribution over the whole event; expected the batch shape [N]"
            )
        return d.logits

    def _read(self, x: Tensor, logits: Any, samples: int) -> Tensor:
        if not isinstance(logits, Tensor):
            raise TypeError(
                "the decoder of a multinomial likelihood must return logits, one tensor; got "
                f"{describe(logits)}"
            )
        check_tensor("the decoder's logits", logits)
        check_same_device("the decoder's logits", logits, "x", x)
        if logits.shape != (samples * len(x), *x.shape[1:]):
            raise ValueError(
                f"the decoder's logits has shape {shape_of(logits)}; expected K·B = {samples}·{len(x)} rows, "
                f"each shaped like an x of shape {shape_of(x)}"
            )
        return logits if logits.dtype == torch.float64 else logits.float()


NAMED["categorical"], NAMED["multinomial"] = Categorical, Multinomial
