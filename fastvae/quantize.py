"""Discrete latents of a VQ-VAE: a codebook and its training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import embedding

from .core.checks import (
    FLOATING,
    INTEGERS,
    check_count,
    check_number,
    check_same_device,
    check_tensor,
    may_look,
    shape_of,
)
from .ops.categorical import categorical_log_prob
from .ops.codebook import nearest_code

__all__ = ["Quantized", "VectorQuantizer"]


class Quantized(NamedTuple):
    """Output of :class:`VectorQuantizer`."""

    z_q: Tensor
    """Codes, with the shape and dtype of z_e; their gradient is passed on to z_e."""
    loss: Tensor
    """Loss to add to the reconstruction loss, [B]."""
    indices: Tensor
    """Indices of the codes, [B, \\*spatial] int64."""


class VectorQuantizer(nn.Module):
    r"""Codebook of a VQ-VAE, which replaces each position of an encoder's output by its nearest code.

    With codes :math:`e_u`, an encoder's output :math:`z_p` at P positions and stop-gradient sg:

    .. math::
        k_p &= \arg\min_u \|z_p - e_u\|^2, \quad z_q = z + \mathrm{sg}(e_k - z) \\
        \mathrm{loss} &= \frac1P \sum_p \Big[ β\, \|z_p - \mathrm{sg}(e_{k_p})\|^2
            + \|\mathrm{sg}(z_p) - e_{k_p}\|^2 \Big]

    β is ``commitment``; the second term, the codebook loss, is present only if ``decay`` is None. Train a
    model on :math:`-\log p(x|z_q) + \mathrm{loss}`, each [B]: the squares are summed over D and averaged
    over positions, as in the paper. The values of z_q are the codes, and the gradient of z_q is passed on to
    z_e unchanged.

    With ``decay`` = γ the codes are instead moving averages of the vectors assigned to them. A batch with
    n_u positions assigned to code u updates

    .. math::
        N_u ← γ N_u + (1 - γ)\, n_u, \quad
        e_u ← e_u + \frac{1 - γ}{N_u} \sum_{p: k_p = u} (z_p - e_u)

    This is the paper's :math:`e_u = m_u / N_u` with :math:`m_u ← γ m_u + (1 - γ) \sum z_p`, written without
    cancellation. N_u starts at 0, so the initial code has no weight once positions are assigned to it. A code
    without positions does not move. No division by a count of 0 occurs, so Laplace smoothing, which would
    pull unused codes towards the origin, is not needed.

    The codes are updated by a forward pass in training mode with gradients enabled; not after ``.eval()`` nor
    under ``torch.no_grad()``. Values and loss of the pass use the codes before the update.

    Under ``torch.distributed`` with a process group, counts and sums are reduced over all ranks. Each rank
    must run the same number of training passes, as with ``DistributedDataParallel``, and start from equal
    codes, which then stay equal.

    Distances are computed in float32 (float64 if z_e or the codebook is), under autocast too, from the codes
    minus their mean m. The result is a nearest code up to the rounding errors of
    :math:`½\|e - m\|^2 + \|z - m\| \|e - m\|`, which on a GPU are TF32's if
    ``torch.set_float32_matmul_precision`` allows that. No [positions, codes] tensor is stored.

    Args:
        codes: U, the number of codes.
        dim: D, the length of a code.
        commitment: β. Default 0.25.
        decay: γ, between 0 and 1, default 0.99; None for a codebook that is a parameter, trained by gradient.
        restart: number of consecutive training passes after which an unused code is replaced, before the next
            pass, by a random position of the batch (drawn from torch's random state; with several ranks, from
            the first rank's batch). Before the first pass all codes are replaced. Default None: codes are
            never replaced, and start as draws from a uniform distribution of variance 1 / D.
        device: device of the codebook. Default: torch's default device.
        dtype: dtype of the codebook. Moving averages need float32 or float64; z_e may have another dtype.
            Default: torch's default dtype.

    Attributes:
        codebook: [U, D], a buffer, or a parameter if decay is None.
        cluster_size: N_u, [U], a buffer; None if decay is None.

    Raises:
        TypeError, ValueError: for an invalid argument.

    References:
        van den Oord, Vinyals & Kavukcuoglu, Neural Discrete Representation Learning, 2017, eq. 1 to 3 and
        appendix A.1; Razavi, van den Oord & Vinyals, Generating Diverse High-Fidelity Images with VQ-VAE-2,
        2019, eq. 2.

    Example:
        >>> import math, torch, fastvae
        >>> encoder = torch.nn.Conv2d(1, 6, 4, stride=4)
        >>> vq = fastvae.quantize.VectorQuantizer(codes=32, dim=6)
        >>> decoder = torch.nn.ConvTranspose2d(6, 1, 4, stride=4)
        >>> x = torch.rand(5, 1, 8, 8)
        >>> z_q, loss, indices = vq(encoder(x))  # [5, 6, 2, 2], [5], [5, 2, 2]
        >>> log_px = fastvae.ops.bernoulli_log_prob(x, decoder(z_q))  # [5]
        >>> (-log_px + loss).mean().backward()

        A lower bound on log p(x), with a uniform prior, and its bits per dimension:

        >>> bound = log_px + vq.log_prob(indices)
        >>> bits_per_dim = -bound / (math.log(2) * x[0].numel())

        Draws from the prior, and means of p(x|z):

        >>> decoder(vq.decode(vq.sample(3, (2, 2)))).sigmoid().shape
        torch.Size([3, 1, 8, 8])
    """

    codebook: Tensor
    cluster_size: Tensor | None
    # Training passes since each code was last used, [U].
    unused: Tensor | None

    def __init__(
        self,
        codes: int,
        dim: int,
        *,
        commitment: float = 0.25,
        decay: float | None = 0.99,
        restart: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.codes = check_count("codes", codes, "the number of codes")
        self.dim = check_count("dim", dim, "the length of a code")
        self.commitment = check_number("commitment", commitment, "the weight of the commitment loss")
        self.decay = None if decay is None else check_number("decay", decay, "that of the moving averages")
        if self.decay is not None and not 0 < self.decay < 1:
            raise ValueError(
                f"decay must lie between 0 and 1, such as 0.99, got {decay!r}; with decay=None the codebook "
                "is learned by its gradient"
            )
        self.restart = (
            None
            if restart is None
            else check_count("restart", restart, "the training passes after which an unused code is replaced")
        )
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(
                f"dtype must be that of floating-point numbers, such as torch.float32; got {dtype}"
            )
        codebook = torch.empty(codes, dim, device=device, dtype=dtype)
        if self.decay is None:
            self.codebook = nn.Parameter(codebook)
            self.register_buffer("cluster_size", None)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("cluster_size", codebook.new_empty(codes))
        unused = None if restart is None else torch.empty(codes, device=device, dtype=torch.int64)
        self.register_buffer("unused", unused)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new codes, and reset the usage statistics."""
        limit = math.sqrt(3 / self.dim)
        self.codebook.uniform_(-limit, limit)
        if self.cluster_size is not None:
            self.cluster_size.zero_()
        if self.unused is not None and self.restart is not None:
            self.unused.fill_(self.restart)

    def extra_repr(self) -> str:
        restart = "" if self.restart is None else f", restart={self.restart}"
        return f"{self.codes}, {self.dim}, commitment={self.commitment}, decay={self.decay}{restart}"

    def forward(self, z_e: Tensor) -> Quantized:
        r"""Quantize an encoder's output, and in training update the codes.

        Args:
            z_e: the encoder's output [B, D, \*spatial], or [B, D] for one position.

        Returns:
            z_q like z_e, loss [B] in float32 (float64 if z_e or the codebook is) and indices [B, \*spatial].
            The loss without positions is 0. NaN in z_e propagates to z_q and to the loss.

        Raises:
            TypeError, ValueError: for a z_e of another shape, dtype or device, and for moving averages in
                half precision.
        """
        rows = self._rows(z_e)
        batch, spatial = z_e.shape[0], z_e.shape[2:]
        learning = self.training and torch.is_grad_enabled()
        if learning:
            self._prepare(rows.detach())
        index = self._nearest(rows)
        # [N, D], a copy, so that updating the codes does not change tensors saved for backward.
        code = embedding(index, self.codebook.to(rows.dtype))
        away = rows - code.detach()
        each = self.commitment * away.square().sum(1)
        if self.decay is None:
            each = each + (rows.detach() - code).square().sum(1)
        positions = math.prod(spatial)
        loss = each.reshape(batch, positions).sum(1) / max(positions, 1)
        if learning:
            self._learn(index, away.detach())
        # The difference is 0, or NaN where z_e is not finite; e - z + z would introduce rounding.
        z_q = self._channels_first(code.detach(), batch, spatial).to(z_e.dtype) + (z_e - z_e.detach())
        return Quantized(z_q, loss, index.reshape(batch, *spatial))

    def encode(self, z_e: Tensor) -> Tensor:
        r"""Return indices [B, \*spatial] of the codes nearest to z_e [B, D, \*spatial], without training."""
        return self._nearest(self._rows(z_e)).reshape(z_e.shape[0], *z_e.shape[2:])

    def decode(self, indices: Tensor) -> Tensor:
        r"""Return the codes [B, D, \*spatial] of indices [B, \*spatial], in the codebook's dtype."""
        self._check_indices(indices)
        code = embedding(indices.reshape(-1).long(), self.codebook)
        return self._channels_first(code, indices.shape[0], indices.shape[1:])

    def sample(
        self, n: int, spatial: Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""Draw indices [n, \*spatial] from the uniform prior; ``decode`` maps them to codes.

        Args:
            n: number of draws.
            spatial: spatial shape of each draw, such as (8, 8). Default ().
            generator: source of the noise. Default: torch's global random state.
        """
        n = check_count("n", n, "the number of draws")
        return torch.randint(self.codes, (n, *spatial), device=self.codebook.device, generator=generator)

    def log_prob(self, indices: Tensor, logits: Tensor | None = None) -> Tensor:
        r"""Return the prior's log probability of the indices, summed over positions, [B] in nats.

        .. math:: \log p(k) = -P \log U, \quad \text{or } \sum_p \log \mathrm{softmax}(a_p)_{k_p}

        A deterministic encoder has no entropy, so :math:`\log p(x|z_q) + \log p(k) \le \log p(x)` is the
        bound of a VQ-VAE.

        Args:
            indices: integer tensor [B, \*spatial].
            logits: a, logits of the prior: [U] for all positions, or [B, U, \*spatial], such as an
                autoregressive network's output for the indices. Default: the uniform prior.
        """
        self._check_indices(indices)
        if logits is None:
            nats = math.prod(indices.shape[1:]) * math.log(self.codes)
            dtype = torch.float64 if self.codebook.dtype == torch.float64 else torch.float32
            return self.codebook.new_full((indices.shape[0],), -nats, dtype=dtype)
        check_tensor("logits", logits)
        check_same_device("logits", logits, "indices", indices)
        expected = (indices.shape[0], self.codes, *indices.shape[1:])
        if logits.shape == (self.codes,):
            wide = logits if logits.dtype == torch.float64 else logits.float()
            shape = indices.shape[0], math.prod(indices.shape[1:])
            return torch.log_softmax(wide, 0)[indices.long()].reshape(shape).sum(1)
        if logits.shape != expected:
            raise ValueError(
                f"logits has shape {shape_of(logits)}; expected [U] = [{self.codes}] or [B, U, *spatial] = "
                f"{list(expected)}"
            )
        return categorical_log_prob(indices, logits)

    def bits(self, indices: Tensor, logits: Tensor | None = None) -> Tensor:
        """Return the code length of the indices in bits, [B]: minus :meth:`log_prob`, over log 2."""
        return self.log_prob(indices, logits) / -math.log(2)

    def perplexity(self, indices: Tensor) -> Tensor:
        r"""Return the effective number of codes that the indices use, from 1 to U.

        .. math:: \exp\Big(-\sum_u p_u \log p_u\Big), \quad p_u = n_u / n

        Args:
            indices: integer tensor of any shape with at least one axis, of this process alone.

        Returns:
            [] in float32; NaN without indices.
        """
        self._check_indices(indices)
        count = self._counts(indices.reshape(-1).long()).float()
        entropy: Tensor = torch.special.entr(count / count.sum()).sum()
        return entropy.exp()

    def _rows(self, z_e: Any) -> Tensor:
        """Reshape z_e to [N, D], in the dtype of the distances."""
        codebook = self.codebook
        check_tensor("z_e", z_e)
        if z_e.dim() < 2 or z_e.shape[1] != self.dim:
            last = z_e.dim() > 2 and z_e.shape[-1] == self.dim
            fix = (
                "move the last axis: z_e.movedim(-1, 1)" if last else "axis 1 is that of the codes' D numbers"
            )
            raise ValueError(
                f"z_e has shape {shape_of(z_e)}; expected [B, D, *spatial] with D = dim = {self.dim}: {fix}"
            )
        check_same_device("z_e", z_e, "the codebook", codebook)
        dtype = torch.float64 if torch.float64 in (z_e.dtype, codebook.dtype) else torch.float32
        count = z_e.shape[0] * math.prod(z_e.shape[2:])
        rows: Tensor = z_e.movedim(1, -1).reshape(count, self.dim)
        return rows.to(dtype)

    def _channels_first(self, code: Tensor, batch: int, spatial: Sequence[int]) -> Tensor:
        """Reshape codes [N, D] to [B, D, *spatial]."""
        return code.reshape(batch, *spatial, self.dim).movedim(-1, 1)

    def _nearest(self, rows: Tensor) -> Tensor:
        codebook: Tensor = self.codebook.detach()
        return nearest_code(rows.detach(), codebook.to(rows.dtype))

    def _counts(self, index: Tensor) -> Tensor:
        """Count each code in index [N]; returns [U] int64."""
        return index.new_zeros(self.codes, dtype=torch.int64).index_add_(0, index, torch.ones_like(index))

    @torch.no_grad()
    def _prepare(self, rows: Tensor) -> None:
        """Replace codes that were unused for ``restart`` training passes; called before each pass."""
        codebook = self.codebook
        if self.decay is not None and codebook.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"the codebook has dtype {codebook.dtype}, in which moving averages stand still; keep it in "
                "float32, vq.float(), and give it z_e as it is: z_q has the dtype of z_e"
            )
        if self.unused is None or self.restart is None:
            return
        dead = self.unused >= self.restart
        if len(rows):
            drawn = rows[torch.randint(len(rows), (self.codes,), device=rows.device)].to(codebook.dtype)
        else:
            drawn = codebook.clone()
        if _several_ranks():
            distributed.broadcast(drawn, 0)
        codebook.copy_(torch.where(dead[:, None], drawn, codebook))
        if self.cluster_size is not None:
            self.cluster_size.masked_fill_(dead, 0)

    @torch.no_grad()
    def _learn(self, index: Tensor, away: Tensor) -> None:
        """Update moving averages and usage after a training pass, given index [N] and z - e [N, D]."""
        if self.decay is None and self.unused is None:
            return
        found = self._counts(index).to(away.dtype)[:, None]
        if self.decay is not None:
            # Sum the rows of each code by embedding's gradient, which is deterministic on a GPU too, and on a
            # CPU 4 to 100 times as fast as index_add.
            sums = torch.ops.aten.embedding_dense_backward(away, index, self.codes, -1, False)
            found = torch.cat([found, sums], 1)
        if _several_ranks():
            distributed.all_reduce(found)
        count = found[:, 0]
        if self.unused is not None:
            self.unused.copy_(torch.where(count > 0, 0, self.unused + 1))
        if self.decay is not None and self.cluster_size is not None:
            size = self.decay * self.cluster_size + (1 - self.decay) * count
            share = torch.where(count > 0, (1 - self.decay) / size, 0.0)
            self.cluster_size.copy_(size)
            self.codebook.add_((share[:, None] * found[:, 1:]).to(self.codebook.dtype))

    def _check_indices(self, indices: Any) -> None:
        if not isinstance(indices, Tensor) or indices.dtype not in INTEGERS[:-1]:
            came = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(
                f"indices must be an integer tensor [B, *spatial], as vq(z_e).indices is; got {came}"
            )
        check_same_device("indices", indices, "the codebook", self.codebook)
        if indices.dim() == 0:
            raise ValueError("indices has shape []; expected [B, *spatial]")
        if may_look(indices):
            least, most = (int(v) for v in indices.aminmax())
            if least < 0 or most >= self.codes:
                raise ValueError(
                    f"indices has {least if least < 0 else most}; a codebook of {self.codes} codes has 0 … "
                    f"{self.codes - 1}"
                )


def _several_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized()
