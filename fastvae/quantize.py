"""The discrete latents of a VQ-VAE: a codebook, and what it takes to train it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import embedding

from ._checks import (
    FLOATING,
    INTEGERS,
    check_count,
    check_number,
    check_same_device,
    check_tensor,
    may_look,
    shape_of,
)
from .ops.codebook import nearest_code
from .ops.grouped import categorical_log_prob

__all__ = ["Quantized", "VectorQuantizer"]


class Quantized(NamedTuple):
    """What :class:`VectorQuantizer` makes of an encoder's output."""

    z_q: Tensor
    """The codes, of the shape and dtype of z_e, whose gradient goes on to z_e."""
    loss: Tensor
    """What is added to the reconstruction's loss, [B]."""
    indices: Tensor
    """Which codes, [B, \\*spatial] int64."""


class VectorQuantizer(nn.Module):
    r"""The codebook of a VQ-VAE: every position of an encoder's output becomes the nearest of its codes.

    With codes :math:`e_u`, an encoder's output :math:`z_p` at P positions and sg, which stops a gradient:

    .. math::
        k_p &= \arg\min_u \|z_p - e_u\|^2, \quad z_q = z + \mathrm{sg}(e_k - z) \\
        \mathrm{loss} &= \frac1P \sum_p \Big[ β\, \|z_p - \mathrm{sg}(e_{k_p})\|^2
            + \|\mathrm{sg}(z_p) - e_{k_p}\|^2 \Big]

    β is ``commitment``; the second term, the codebook's loss, is there if ``decay`` is None. A model is
    trained on :math:`-\log p(x|z_q) + \mathrm{loss}`, each [B]: the squares are summed over D and averaged
    over the positions, as in the paper. The values of z_q are the codes themselves, and the gradient of z_q
    is passed on to z_e as it is.

    With ``decay`` = γ the codes are moving averages instead, of what was assigned to them. A batch that has
    n_u positions with code u does

    .. math::
        N_u ← γ N_u + (1 - γ)\, n_u, \quad
        e_u ← e_u + \frac{1 - γ}{N_u} \sum_{p: k_p = u} (z_p - e_u)

    which is the paper's :math:`e_u = m_u / N_u` with :math:`m_u ← γ m_u + (1 - γ) \sum z_p`, written so that
    nothing cancels. N_u begins at 0: the first positions of a code count, and where it started from does not.
    A code without positions stays where it is. Nothing is divided by a count of 0, so there is no need of
    Laplace smoothing, which would draw unused codes to the origin.

    The codes move in a forward pass in training mode with gradients enabled; not after ``.eval()``, and not
    under ``torch.no_grad()``. Values and loss of the pass are those of the codes before it.

    Under ``torch.distributed`` with a process group, counts and sums are those of all ranks. Each rank must
    make the same number of training passes, as with ``DistributedDataParallel``, and start from equal codes,
    which then stay equal.

    Distances are computed in float32 (float64 if z_e or the codebook is), under autocast too, from the codes
    less their mean m. The code found is a nearest one up to the roundings of
    :math:`½\|e - m\|^2 + \|z - m\| \|e - m\|`, which on a GPU are TF32's if
    ``torch.set_float32_matmul_precision`` allows that. Nothing of the size [positions, codes] is kept.

    Args:
        codes: U, how many.
        dim: D, the length of a code.
        commitment: β.
        decay: γ, between 0 and 1; None for a codebook that is a parameter, learned by its gradient.
        restart: before a training pass, replace a code that no position got in so many passes one after the
            other by a position of the batch, drawn at random (by torch's random state; with several ranks,
            from the first rank's batch). In the first pass these are all codes. None, the default, does
            without: codes start as draws from a uniform distribution of variance 1 / D.
        device, dtype: of the codebook. Moving averages need float32 or float64; z_e may have another dtype.

    Attributes:
        codebook: [U, D], a buffer, or a parameter if decay is None.
        cluster_size: N_u, [U], a buffer; None if decay is.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    References:
        van den Oord, Vinyals & Kavukcuoglu, Neural Discrete Representation Learning, 2017, eq. 1 to 3 and
        appendix A.1; Razavi, van den Oord & Vinyals, Generating Diverse High-Fidelity Images with VQ-VAE-2,
        2019, eq. 2.

    Example:
        >>> import math, torch, fastvae
        >>> encoder = torch.nn.Conv2d(1, 6, 4, stride=4)
        >>> vq = fastvae.VectorQuantizer(codes=32, dim=6)
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
    # How many training passes ago a code had a position.
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
        """Draw the codes anew, and forget what they were used for."""
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
        r"""Quantize an encoder's output, and in training move the codes.

        Args:
            z_e: [B, D, \*spatial], or [B, D] for one position.

        Returns:
            z_q like z_e, loss [B] in float32 (float64 if z_e or the codebook is) and indices [B, \*spatial].
            The loss of no positions is 0. A NaN in z_e is one in z_q and in the loss.

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
        # [N, D], a copy: what comes into the graph does not change with the codes.
        code = embedding(index, self.codebook.to(rows.dtype))
        away = rows - code.detach()
        each = self.commitment * away.square().sum(1)
        if self.decay is None:
            each = each + (rows.detach() - code).square().sum(1)
        positions = spatial.numel()
        loss = each.reshape(batch, positions).sum(1) / max(positions, 1)
        if learning:
            self._learn(index, away.detach())
        # The difference is 0, and NaN where z_e is not finite; e - z + z would be rounded.
        z_q = self._channels_first(code.detach(), batch, spatial).to(z_e.dtype) + (z_e - z_e.detach())
        return Quantized(z_q, loss, index.reshape(batch, *spatial))

    def encode(self, z_e: Tensor) -> Tensor:
        r"""Indices [B, \*spatial] of the codes nearest to z_e [B, D, \*spatial]; nothing is learned."""
        return self._nearest(self._rows(z_e)).reshape(z_e.shape[0], *z_e.shape[2:])

    def decode(self, indices: Tensor) -> Tensor:
        r"""The codes [B, D, \*spatial] of indices [B, \*spatial], in the codebook's dtype."""
        self._check_indices(indices)
        code = embedding(indices.reshape(-1).long(), self.codebook)
        return self._channels_first(code, indices.shape[0], indices.shape[1:])

    def sample(
        self, n: int, spatial: Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""Indices [n, \*spatial] from the uniform prior; ``decode`` makes codes of them.

        Args:
            n: how many.
            spatial: the shape of one, such as (8, 8).
            generator: source of the noise; default torch's own random state.
        """
        n = check_count("n", n, "the number of draws")
        return torch.randint(self.codes, (n, *spatial), device=self.codebook.device, generator=generator)

    def log_prob(self, indices: Tensor, logits: Tensor | None = None) -> Tensor:
        r"""log of the prior's probability of the indices, summed over positions, [B] in nats.

        .. math:: \log p(k) = -P \log U, \quad \text{or } \sum_p \log \mathrm{softmax}(a_p)_{k_p}

        Encoders that are certain have no entropy, so :math:`\log p(x|z_q) + \log p(k) \le \log p(x)` is the
        bound of a VQ-VAE.

        Args:
            indices: [B, \*spatial].
            logits: a, of another prior than the uniform one: [U] for all positions, or [B, U, \*spatial],
                such as an autoregressive network makes of the indices.
        """
        self._check_indices(indices)
        if logits is None:
            nats = indices.shape[1:].numel() * math.log(self.codes)
            dtype = torch.float64 if self.codebook.dtype == torch.float64 else torch.float32
            return self.codebook.new_full((indices.shape[0],), -nats, dtype=dtype)
        check_tensor("logits", logits)
        check_same_device("logits", logits, "indices", indices)
        expected = (indices.shape[0], self.codes, *indices.shape[1:])
        if logits.shape == (self.codes,):
            wide = logits if logits.dtype == torch.float64 else logits.float()
            shape = indices.shape[0], indices.shape[1:].numel()
            return torch.log_softmax(wide, 0)[indices.long()].reshape(shape).sum(1)
        if logits.shape != expected:
            raise ValueError(
                f"logits has shape {shape_of(logits)}; expected [U] = [{self.codes}] or [B, U, *spatial] = "
                f"{list(expected)}"
            )
        return categorical_log_prob(indices, logits)

    def bits(self, indices: Tensor, logits: Tensor | None = None) -> Tensor:
        """What the indices cost in bits, [B]: minus :meth:`log_prob`, over log 2."""
        return self.log_prob(indices, logits) / -math.log(2)

    def perplexity(self, indices: Tensor) -> Tensor:
        r"""How many codes the indices use, as if all were used alike: from 1 to U.

        .. math:: \exp\Big(-\sum_u p_u \log p_u\Big), \quad p_u = n_u / n

        Args:
            indices: of any shape; of this process alone. That of none is NaN.

        Returns:
            [] in float32.
        """
        self._check_indices(indices)
        count = self._counts(indices.reshape(-1).long()).float()
        entropy: Tensor = torch.special.entr(count / count.sum()).sum()
        return entropy.exp()

    def _rows(self, z_e: Any) -> Tensor:
        """z_e as [N, D], in the dtype of the distances."""
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
        count = z_e.shape[0] * z_e.shape[2:].numel()
        rows: Tensor = z_e.movedim(1, -1).reshape(count, self.dim)
        return rows.to(dtype)

    def _channels_first(self, code: Tensor, batch: int, spatial: Sequence[int]) -> Tensor:
        """Codes [N, D] as [B, D, *spatial]."""
        return code.reshape(batch, *spatial, self.dim).movedim(-1, 1)

    def _nearest(self, rows: Tensor) -> Tensor:
        codebook: Tensor = self.codebook.detach()
        return nearest_code(rows.detach(), codebook.to(rows.dtype))

    def _counts(self, index: Tensor) -> Tensor:
        """How often each code is in index [N], [U] int64."""
        return index.new_zeros(self.codes, dtype=torch.int64).index_add_(0, index, torch.ones_like(index))

    @torch.no_grad()
    def _prepare(self, rows: Tensor) -> None:
        """Before a training pass: replace the codes that were unused for long."""
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
        """After a training pass: the moving averages of index [N] and z - e [N, D], and what is unused."""
        if self.decay is None and self.unused is None:
            return
        found = self._counts(index).to(away.dtype)[:, None]
        if self.decay is not None:
            # The sum of the rows of each code is embedding's gradient: in a fixed order on a GPU as well, and
            # on a CPU 4 to 100 times as fast as index_add.
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
