"""Multinomial likelihood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ..core.checks import check_dense, check_same_device, check_tensor, shape_of
from ..core.deferred import LastLayer
from ..core.nested import Conditioning, all_tensors
from ..ops.multinomial import check_counts, multinomial_rows
from .base import NAMED, Likelihood
from .categorical import SHARES
from .natural import check_flag, log_of
from .outputs import describe


class Multinomial(Likelihood):
    r"""Multinomial likelihood p(x|z) of class counts over the whole event.

    The decoder returns logits [N, \*event]. It suits recommender systems (Mult-VAE) and documents.

    .. math:: \log p(x|z_k) = \log n! - \sum_i \log x_i! + \sum_i x_i \log \mathrm{softmax}(l_k)_i,
              \quad n = \sum_i x_i

    Counts may be of any dtype, or a sparse matrix [B, X], COO or CSR, which is never converted to a dense
    tensor. The encoder of a :class:`fastvae.VAE` gets that matrix as it is: torch's Linear takes one as its
    input, and a function that needs a dense batch calls ``x.to_dense()``. The op is
    ``fastvae.ops.multinomial_log_prob(x, logits)``.

    Args:
        coefficient: include :math:`\log n! - \sum_i \log x_i!`, which no gradient depends on; default True.
            Recommender systems report the bound without it.
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
        >>> mult_vae = fastvae.likelihoods.Multinomial(coefficient=False)
        >>> fastvae.elbo(clicks.float().to_sparse(), q, torch.nn.Linear(5, 3), likelihood=mult_vae).shape
        torch.Size([])
    """

    takes_integers = True
    differentiable = False
    reads, option, counts = "event logits", "probs", True

    family = td.Multinomial
    takes_sparse = True

    def __init__(self, *, coefficient: bool = True, probs: bool = False):
        super().__init__()
        self.coefficient = check_flag("coefficient", coefficient)
        self.probs = check_flag("probs", probs)
        if probs:
            self.reads = ""  # type: ignore[misc]

    def extra_repr(self) -> str:
        own = [*["coefficient=False"] * (not self.coefficient), *["probs=True"] * self.probs]
        return ", ".join(own)

    def _event(self, layer: LastLayer, x: Any) -> tuple[int, ...] | None:
        return tuple(x.shape[1:]) if layer.event is None and isinstance(x, Tensor) else layer.event

    def _logits(self, parameters: Any, seen: Tensor | None = None) -> Any:
        return log_of(parameters, "Multinomial(probs=True)", *SHARES, seen) if self.probs else parameters

    def check(self, x: Any, name: str = "x") -> None:
        if type(self).log_prob is not Multinomial.log_prob and isinstance(x, Tensor):
            check_dense(name, x)  # a subclass's log_prob gets it repeated for each sample
        check_counts(x, name)

    def log_likelihood(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Tensor:
        if type(self).log_prob is not Multinomial.log_prob:  # overridden by a subclass
            return super().log_likelihood(x, parameters, samples, conditioning)
        mask, size_factor, _ = conditioning or Conditioning()
        if size_factor is not None:
            raise self.no_size()
        logits = self._logits(parameters, mask)
        self._check(x, logits, samples)
        return multinomial_rows(x, logits, mask, self.coefficient).reshape(samples, x.shape[0])

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

    def _check(self, x: Tensor, logits: Any, samples: int) -> None:
        if not isinstance(logits, Tensor):
            raise TypeError(
                "the decoder of a multinomial likelihood must return logits, one tensor; got "
                f"{describe(logits)}"
            )
        check_tensor("the decoder's logits", logits)
        check_same_device("the decoder's logits", logits, "x", x)
        if logits.shape != (samples * x.shape[0], *x.shape[1:]):
            raise ValueError(
                f"the decoder's logits has shape {shape_of(logits)}; expected K·B = {samples}·{x.shape[0]} "
                f"rows, each shaped like an x of shape {shape_of(x)}"
            )


NAMED["multinomial"] = Multinomial
