r"""Gamma and Dirichlet draws by torch's samplers, as functions of a seed.

For concentrations :math:`α`, with :math:`g_d \sim \mathrm{Gamma}(α_d, 1)` and F its distribution function,

.. math:: \frac{\partial g}{\partial α} = -\frac{\partial F(g; α) / \partial α}{\partial F(g; α) / \partial g}

and likewise for a Dirichlet. Torch's generator is seeded for the call, and its state restored afterwards. A
compiler cannot trace that, so it keeps the op in its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..reference import gamma as reference
from .op import Op


class _Draw(Op):
    """Op that draws z in the shape of ``concentration``, float32 or float64; ``seed`` is an int64 tensor."""

    module = "gamma"
    schema = "(Tensor concentration, Tensor seed, SymInt sample_offset, SymInt row_offset) -> Tensor"

    def native(self, *args: Any) -> Tensor:
        return self.composed("native")(*args)

    def composed(self, backend: str) -> Callable[..., Tensor]:
        return getattr(reference, self.name)

    def fake(self, concentration: Tensor, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
        return concentration.new_empty(concentration.shape)

    def forward(self, run: Callable, ctx: Any, concentration: Tensor, *place: Any) -> Tensor:
        z: Tensor = run(concentration, *place)
        ctx.save_for_backward(concentration, z)
        return z

    def backward(self, run: Callable, ctx: Any, grad: Tensor) -> tuple:
        return run(*ctx.saved_tensors, grad), None, None, None


class _Gradient(Op):
    module = "gamma"
    schema = "(Tensor concentration, Tensor z, Tensor grad) -> Tensor"

    def native(self, *args: Any) -> Tensor:
        return self.composed("native")(*args)

    def composed(self, backend: str) -> Callable[..., Tensor]:
        return getattr(reference, self.name)

    def fake(self, concentration: Tensor, z: Tensor, grad: Tensor) -> Tensor:
        return z.new_empty(z.shape)


class _GammaGradient(_Gradient):
    name = "standard_gamma_backward"


class _DirichletGradient(_Gradient):
    name = "dirichlet_backward"


class _Gamma(_Draw):
    name, gradient = "standard_gamma", _GammaGradient()


class _Dirichlet(_Draw):
    name, gradient = "dirichlet", _DirichletGradient()


standard_gamma: Callable[[Tensor, Tensor, int, int], Tensor] = _Gamma()
dirichlet: Callable[[Tensor, Tensor, int, int], Tensor] = _Dirichlet()
