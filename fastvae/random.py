r"""Seeds, and noise as a function of an address.

fastvae never stores the noise of a sample: it is a pure function of (seed, sample, row, column, level), so
the backward pass, another thread count, a chunk of the samples, a shard of the rows or another device all see
the same numbers. Only families that torch itself samples (its Gamma, Beta, Dirichlet and a user's own) draw
from torch's generator, seeded for each call by ``core/seeding.py``.

The function is Philox4x32-10 [1]_ with the 64-bit seed as its key (low word first) and the counter

    (column // 4, row, sample, level)

The level is 0 except for the lower levels of a :class:`fastvae.distributions.Hierarchy` and the transitions
of :func:`fastvae.audit.ais` and :func:`~fastvae.audit.bdmc`. The four output
words :math:`w_0 … w_3` belong to the four columns of the block. The Box-Muller transform maps :math:`w_0,
w_1` to columns 0 and 1, and :math:`w_2, w_3` to columns 2 and 3:

.. math:: u = (w_0 + ½) 2^{-32}, \quad v = (w_1 + ½) 2^{-32}, \quad
          ε_0 = \sqrt{-2 \ln u} \cos 2πv, \quad ε_1 = \sqrt{-2 \ln u} \sin 2πv

so both halves of each pair are used and the tail reaches :math:`\sqrt{2 \ln 2^{33}} = 6.76` standard
deviations. The words are equal bit for bit in C++, Triton and PyTorch. The normals agree to a few units in
the last place, except in float32 on a GPU, where the hardware's logarithm, sine and cosine give agreement to
1e-5; with ``FASTVAE_NOISE=accurate`` in the environment they agree to a few units there, too.

Quasi-Monte-Carlo noise, ``noise="qmc"``, uses different words for the same address and transform. Its
seed is a tensor [R], one seed for each of R independent randomisations of one point set, used in turn:
sample k is point ⌊k/R⌋ of randomisation k mod R. The points are Sobol's sequence with the direction
numbers of Joe and Kuo [2]_, as in torch, under a random digital shift [3]_:

.. math:: w = s \oplus \bigoplus_{j:\, \text{bit } j \text{ of } \lfloor k/R \rfloor \text{ is set}}
          4\, v_{j, \mathrm{column}}

where v are torch's 30-bit direction numbers, and the shift s is the Philox word at (column // 4, row, 0, 0)
under the randomisation's seed. Each point is marginally uniform, so estimates stay unbiased; jointly the
points fill the cube evenly, best with 2^m points per randomisation (they repeat after 2^30). Columns from 128
on, and levels above 0, use the Philox words at (column // 4, row, k, level) under the same seed.

.. [1] Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011.
.. [2] Joe, Kuo: Constructing Sobol sequences with better two-dimensional projections. SIAM J. Sci. Comput.
   30, 2008.
.. [3] L'Ecuyer, Lemieux: Recent advances in randomized quasi-Monte Carlo methods. 2002, section 2.4.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .core import backend as _backend
from .core.checks import as_int, check_address, check_choice, check_seed
from .ops.op import Op
from .reference import random as reference

__all__ = ["draw_seed", "normal"]


def draw_seed(device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
    """Draw a seed, an int64 tensor [], from torch's random state, without synchronising a GPU.

    Args:
        device: device of the seed, which must be that of the tensors it generates noise for. Default: CPU.
        generator: generator to draw from, on that device. Default: torch's global one, which
            ``torch.manual_seed`` controls.

    Raises:
        TypeError: if the generator is not a torch.Generator.
        ValueError: if the generator is on another device.
        RuntimeError: if a CUDA graph is being captured with which the generator is not registered.

    Example:
        >>> import torch, fastvae
        >>> seed = fastvae.random.draw_seed(generator=torch.Generator().manual_seed(7))
        >>> seed.dtype, seed.shape
        (torch.int64, torch.Size([]))
    """
    if generator is None:
        return torch.randint(-(2**63), 2**63 - 1, (), device=device)
    device = torch.device(device)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(
            f"generator is on {generator.device}, but the noise is needed on {device}; make it with "
            f"torch.Generator(device={device.type!r})"
        )
    try:
        return torch.randint(-(2**63), 2**63 - 1, (), device=device, generator=generator)
    except RuntimeError as error:
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            raise
        raise RuntimeError(
            "generator is not registered with the CUDA graph that is being captured; give it to "
            "fastvae.graphed(step, generators=[generator]), or to graph.register_generator_state(generator) "
            "before the capture"
        ) from error


NOISES = ("philox", "qmc")
# Independent randomisations of one point set, whose spread estimates the error: fewer use the points better,
# more estimate the error better (docs/log.md).
RANDOMISATIONS = 8
# Increment between the seeds of randomisations: odd, from the golden ratio.
_STEP = 0x9E3779B97F4A7C15 - 2**64


def seed_of(noise: str, seed: Tensor, randomisations: int = 1) -> Tensor:
    """Return the seed itself for ``"philox"``, or a tensor [R] of derived seeds for ``"qmc"``.

    Raises:
        TypeError, ValueError: for an unknown kind of noise.
    """
    if noise == "philox":
        return seed
    check_choice("noise", noise, NOISES)
    if randomisations == 1:
        return seed.reshape(1)
    return seed + _STEP * torch.arange(randomisations, device=seed.device)


def randomisations_of(seed: Tensor) -> int:
    """Return the number of randomisations in the noise of this seed; 0 for independent draws."""
    return seed.shape[0] if seed.dim() else 0


def normal(
    seed: Tensor | int,
    samples: int,
    rows: int,
    columns: int,
    *,
    sample_offset: int = 0,
    row_offset: int = 0,
    level: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return standard normals [samples, rows, columns], a pure function of the address, as the ops use them.

    Args:
        seed: int64 tensor [], or an int; or a tensor [R], as ``noise="qmc"`` passes to a distribution's
            ``rsample_log_prob``, for quasi-Monte-Carlo noise of R randomisations.
        samples: number of samples.
        rows: number of rows.
        columns: number of columns.
        sample_offset: index of the first sample: ``normal(s, K, B, D)[k0:, b0:]`` equals
            ``normal(s, K - k0, B - b0, D, sample_offset=k0, row_offset=b0)``. Default 0.
        row_offset: index of the first row; −1 gives all rows the noise of row 0. Default 0.
        level: last word of the address, which separates the levels of hierarchical latents. Default 0.
        dtype: float32 (default) or float64.
        device: device of the result. Default: the seed's device.

    Raises:
        TypeError, ValueError: for an invalid seed, or an address beyond 2^32.

    Example:
        >>> import torch, fastvae
        >>> whole = fastvae.random.normal(0, 3, 4, 5)
        >>> part = fastvae.random.normal(0, 2, 3, 5, sample_offset=1, row_offset=1)
        >>> torch.equal(whole[1:, 1:], part)
        True
    """
    if isinstance(seed, numbers.Integral):
        seed = torch.tensor((int(seed) + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
    elif isinstance(seed, Tensor) and device is not None:
        seed = seed.to(device)
    if isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.dim() == 1 and seed.shape[0]:
        seed = seed.contiguous()
    else:
        check_seed(seed)
    samples = as_int("samples", samples, "a size of the noise")
    rows = as_int("rows", rows, "a size of the noise")
    columns = as_int("columns", columns, "a size of the noise")
    # Comparing a dynamic size with 2^32 would make torch.export bound it.
    if (
        type(sample_offset) is not int
        or type(row_offset) is not int
        or sample_offset != 0
        or row_offset != 0
        or not torch.compiler.is_compiling()
    ):
        sample_offset, row_offset = check_address(samples, rows, sample_offset, row_offset)
    if type(level) is not int or not 0 <= level < 2**32:
        level = _check_level(level)
    if columns < 0:
        raise ValueError(f"the number of columns must be at least 0, got {columns}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    return _normal(seed, samples, rows, columns, sample_offset, row_offset, level, dtype)


def _check_level(level: Any) -> int:
    word = as_int("level", level, "the last word of the address")
    if not 0 <= word < 2**32:
        raise ValueError(f"level must lie in 0 … 2^32 − 1, got {word}")
    return word


class _Normal(Op):
    module = "random"
    name = "normal"
    schema = (
        "(Tensor seed, SymInt samples, SymInt rows, SymInt columns, SymInt sample_offset, SymInt row_offset, "
        "SymInt level, ScalarType dtype) -> Tensor"
    )

    def __init__(self) -> None:
        self.native = functools.partial(_backend.native(self.name), self._of_net)
        super().__init__()

    @staticmethod
    def _of_net(seed: Tensor, *noise: Any) -> Tensor:
        """Call the C++ for quasi-Monte-Carlo noise, which reads the net as well."""
        eps: Tensor = _backend.native("normal_of_net")(seed, reference.net(seed.device), *noise)
        return eps

    def check(self, seed: Tensor, samples: int, rows: int, columns: int, *place: Any) -> None:
        self.contract.expect("seed", seed, torch.int64, (), (-1,))
        if seed.dim():
            self.contract.expect_count("the number of seeds", seed.shape[0])
        for name, value in (("samples", samples), ("rows", rows), ("columns", columns)):
            if value < 0:
                raise ValueError(f"fastvae::normal: {name} is {value}; expected at least 0")

    def composed(self, backend: str) -> Callable[..., Tensor]:
        function = super().composed(backend)

        def draw(*args: Any) -> Tensor:
            # The Triton kernel has no float64 version.
            return (function if args[-1] == torch.float32 else reference.normal)(*args)

        return draw

    def fake(
        self,
        seed: Tensor,
        samples: int,
        rows: int,
        columns: int,
        sample_offset: int,
        row_offset: int,
        level: int,
        dtype: torch.dtype,
    ) -> Tensor:
        return seed.new_empty((samples, rows, columns), dtype=dtype)


_normal: Callable[..., Tensor] = _Normal()
