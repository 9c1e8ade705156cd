"""Comparison used by every kernel test: error bounds that follow from the roundings of a formula.

A formula of tests/formulas.py is evaluated on :class:`Rounded` numbers: values in float64 that carry, to
first order, the largest error that arithmetic in the kernel's precision can cause. A correct kernel is within
the bound for any inputs, so no test fails by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae.core.special import digamma_excess, half_step, half_step_slope, log1p_rest, stirling_error

# Errors of the elementary functions, in units of the unit roundoff (half an ulp of 1): CUDA documents 2 ulp
# for expf; csrc/elementary.hpp, kernels/elementary.py and torch are within 1.3. The noise is within 4 ulp of
# its definition over 10^7 draws (docs/log.md).
EXP = LOG = 4
NOISE = 8

# Minimum number of elements for a comparison of mean errors with plain PyTorch.
MANY = 64


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Multiply bounds; an exact zero times an unbounded error is zero, not NaN."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


class Rounded:
    """Exact values with a bound on the error of computing them in ``dtype``.

    Every operation adds its own rounding, the unit roundoff of its result, to the propagated errors of its
    operands. Exact operations add nothing: those with a zero, and products with a power of two.
    """

    def __init__(self, value: Tensor, error: Tensor, u: float):
        self.value, self.error, self.u = value, error, u

    @classmethod
    def exact(cls, value: Tensor, dtype: torch.dtype) -> Rounded:
        """Wrap an input, which has no error; ``dtype`` is that of the computation, float32 or float64."""
        value = value.detach().double()
        return cls(value, torch.zeros_like(value), torch.finfo(dtype).eps / 2)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Dispatch torch functions of a plain PyTorch definition to methods: torch.exp(v) is v.exp(), etc."""
        method = {torch.where: cls._where, torch.zeros_like: cls._zeros}.get(function)
        if method is None:
            method = getattr(cls, function.__name__.strip("_"))
        return method(*args, **(kwargs or {}))

    def _as(self, other: Rounded | float) -> Rounded:
        """Wrap a constant, rounded if the dtype cannot represent it."""
        if isinstance(other, Rounded):
            return other
        value = torch.full_like(self.value, other)
        exact = self.u < 1e-15 or bool((value == value.float()).all())
        return Rounded(value, torch.zeros_like(value) if exact else self.u * value.abs(), self.u)

    @staticmethod
    def _where(condition: Tensor, yes: Rounded | float, no: Rounded | float) -> Rounded:
        like = yes if isinstance(yes, Rounded) else no
        yes, no = like._as(yes), like._as(no)
        return Rounded(
            torch.where(condition, yes.value, no.value), torch.where(condition, yes.error, no.error), like.u
        )

    def _zeros(self) -> Rounded:
        return Rounded(torch.zeros_like(self.value), torch.zeros_like(self.error), self.u)

    def __lt__(self, other: Rounded | float) -> Tensor:
        return self.value < self._as(other).value

    def __le__(self, other: float) -> Tensor:
        return self.value <= other

    def __gt__(self, other: Rounded | float) -> Tensor:
        return self.value > self._as(other).value

    def __ge__(self, other: float) -> Tensor:
        return self.value >= other

    def __eq__(self, other: object) -> Tensor:
        return self.value == other

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation."""
        return torch.float64 if self.u < 1e-15 else torch.float32

    def abs(self) -> Rounded:
        return Rounded(self.value.abs(), self.error, self.u)

    def clamp(self, min: float | None = None, max: float | None = None) -> Rounded:
        return Rounded(self.value.clamp(min, max), self.error, self.u)

    def _made(self, value: Tensor, error: Tensor, roundings: float | Tensor = 0) -> Rounded:
        return Rounded(value, error + roundings * self.u * value.abs(), self.u)

    def rounded(self, times: float) -> Rounded:
        """Add ``times`` more roundings."""
        return self._made(self.value, self.error, times)

    def off(self, by: Tensor) -> Rounded:
        """Add ``by`` to the error."""
        return Rounded(self.value, self.error + by, self.u)

    def noise(self) -> Rounded:
        """Add the error of the kernel's normals."""
        # In float64 the definition itself rounds the angle, which costs small normals relative accuracy.
        absolute = 64 * self.u if self.u < 1e-15 else 0.0
        return self._made(self.value, self.error + absolute, NOISE)

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error, self.u)

    def __add__(self, other: Rounded | float) -> Rounded:
        other = self._as(other)
        rounded = (self.value != 0) & (other.value != 0)
        return self._made(self.value + other.value, self.error + other.error, rounded)

    __radd__ = __add__

    def __sub__(self, other: Rounded | float) -> Rounded:
        return self + -self._as(other)

    def __rsub__(self, other: float) -> Rounded:
        return self._as(other) + -self

    def __mul__(self, other: Rounded | float) -> Rounded:
        if not isinstance(other, Rounded) and math.frexp(other)[0] in (0.5, -0.5):
            return Rounded(self.value * other, self.error * abs(other), self.u)
        other = self._as(other)
        error = _times(self.value.abs(), other.error) + _times(other.value.abs() + other.error, self.error)
        return self._made(self.value * other.value, error, 1)

    __rmul__ = __mul__

    def __pow__(self, exponent: int) -> Rounded:
        assert exponent == 2
        return self.square()

    def __truediv__(self, other: Rounded) -> Rounded:
        value = self.value / other.value
        least = (other.value.abs() - other.error).clamp(min=0)
        off = self.error + _times(value.abs(), other.error)
        return self._made(value, torch.where(off == 0, 0.0, off / least), 2)

    def __rtruediv__(self, other: float) -> Rounded:
        return self._as(other) / self

    def square(self) -> Rounded:
        return self * self

    def exp(self) -> Rounded:
        value = self.value.exp()
        # The relative error of exp is the absolute error of its argument; an exact 0 has none.
        error = torch.where(value == 0, 0.0, value * torch.expm1(self.error))
        # On overflow the result is infinite, and anything computed from it may be wrong.
        error = torch.where(value > torch.finfo(self.dtype).max, torch.inf, error)
        return self._made(value, error, EXP)

    def sqrt(self) -> Rounded:
        """Compute the square root; a GPU's errs by two ulps."""
        value = self.value.sqrt()
        least = (self.value - self.error).clamp(min=0).sqrt() + value
        return self._made(value, torch.where(self.error == 0, 0.0, self.error / least), 4)

    def precision(self) -> Rounded:
        """Compute exp(-v), directly or as the square of exp(-v/2)."""
        return (self * -0.5).exp().square()

    def log(self) -> Rounded:
        return self._made(self.value.log(), self.error / self.value, LOG)

    def expm1(self) -> Rounded:
        """Compute exp(v) - 1; away from 0 as that difference."""
        value = torch.expm1(self.value)
        propagated = torch.where(value == -1, 0.0, (value + 1) * torch.expm1(self.error))
        return Rounded(value, propagated + self._of_expm1(value) * self.u, self.u)

    def _of_expm1(self, value: Tensor) -> Tensor:
        difference = EXP * (value + 1) + value.abs()
        return torch.maximum(3 * value.abs(), torch.where(self.value.abs() < 1, 0.0, difference))

    def expm1_minus(self) -> Rounded:
        """Compute exp(v) - 1 - v: by a series near 0, elsewhere possibly as that difference."""
        expm1 = torch.expm1(self.value)
        series = sum(self.value**n / math.factorial(n) for n in range(2, 13))
        near = self.value.abs() < 0.125
        value = torch.where(near, series, expm1 - self.value)
        # Both terms share the argument's error: the derivative is exp(v) - 1. Avoids inf - inf.
        beyond = torch.where(self.error.isinf(), torch.inf, torch.expm1(self.error) - self.error)
        propagated = _times(expm1.abs(), self.error) + _times(expm1 + 1, beyond)
        own = torch.where(near, 6 * value, self._of_expm1(expm1) + value)
        return Rounded(value, propagated + own * self.u, self.u)

    def log1p_rest(self) -> Rounded:
        """Compute v - log(1 + v): by a series near 0, elsewhere possibly as that difference."""
        value = log1p_rest(self.value)
        propagated = _times((self.value / (1 + self.value)).abs(), self.error) + 0.5 * self.error.square()
        own = torch.where(self.value.abs() < 0.25, 6 * value, LOG * self.value.abs() + value)
        return Rounded(value, propagated + own * self.u, self.u)

    def stirling_error(self) -> Rounded:
        """Compute the error of Stirling's formula by a polynomial in 1 / v or v, log v and v log v."""
        value, x = stirling_error(self.value), self.value
        logarithms = torch.where(x < 16 if self.u < 1e-15 else x < 1, 1 + x + (1 + x) * x.log().abs(), 0.0)
        slope = 0.5 / x.clamp(min=1e-38) / (1 + x)
        return Rounded(
            value, _times(slope, self.error) + self.u * (EXP * value.abs() + LOG * logarithms), self.u
        )

    def digamma_excess(self) -> Rounded:
        """Compute v (log v - digamma(v)) - 1/2, with roundings like those of ``stirling_error``."""
        value, x = digamma_excess(self.value), self.value
        logarithms = torch.where(x < 16 if self.u < 1e-15 else x < 1, 1 + x * (1 + x.log().abs()), 0.0)
        slope = 1 / (1 + x)
        return Rounded(
            value, _times(slope, self.error) + self.u * (2 * EXP * value.abs() + LOG * logarithms), self.u
        )

    def log1p(self) -> Rounded:
        return self._made(torch.log1p(self.value), self.error / (1 + self.value), LOG)

    def sign(self) -> Rounded:
        """Compute the sign, exact unless the error may have carried the number across 0."""
        sure = (self.value.abs() > self.error) | (self.error == 0)
        return Rounded(self.value.sign(), torch.where(sure, 0.0, 2.0), self.u)

    def tanh(self) -> Rounded:
        """Compute tanh as e / (e + 2), e = exp(2 v) - 1, whose relative error counts at most twice."""
        value = torch.tanh(self.value)
        # The slope at the point nearest to 0 that the argument's error allows.
        steepest = 1 - torch.tanh((self.value.abs() - self.error).clamp(min=0)).square()
        return self._made(value, steepest * self.error, 2 * 3 + 1 + 2)

    def half_step(self) -> Rounded:
        """Compute half_step by the log of a factor near 1, in float64 of sixteen; its slope is positive."""
        value, slope = half_step(self.value), half_step_slope(self.value)
        own = 10 + 2 * value.abs() if self.u > 1e-15 else 80 + 2 * value.abs()
        return Rounded(value, _times(slope, self.error) + own * self.u, self.u)

    def half_step_slope(self) -> Rounded:
        """Compute half_step's slope, a sum of positive terms via exp; its relative slope is at most 1."""
        value = half_step_slope(self.value)
        return self._made(value, _times(value, torch.expm1(self.error)), EXP + 12)

    def sigmoid(self) -> Rounded:
        """Compute the sigmoid from exp(-|v|): an exponential, a sum and a quotient."""
        value = torch.sigmoid(self.value)
        propagated = value * (1 - value) * (self.error + EXP * self.u)
        # An argument of unbounded error allows the whole range.
        return self._made(value, torch.where(self.error.isinf(), 1.0, propagated), 3)

    def where(self, mask: Tensor) -> Rounded:
        """Set elements to 0 where the mask is False."""
        return Rounded(torch.where(mask, self.value, 0.0), torch.where(mask, self.error, 0.0), self.u)

    def expand(self, *shape: int) -> Rounded:
        return Rounded(self.value.expand(shape), self.error.expand(shape), self.u)

    def __getitem__(self, index) -> Rounded:
        return Rounded(self.value[index], self.error[index], self.u)

    def sum(self, *dims: int) -> Rounded:
        return total([self], *dims)

    def sum_to_size(self, shape: Sequence[int]) -> Rounded:
        """Sum over the axes that were broadcast from ``shape``."""
        lead = self.value.dim() - len(shape)
        dims = [i for i, n in enumerate((*[1] * lead, *shape)) if n == 1 and self.value.shape[i] != 1]
        if not dims:
            return self[(0,) * lead]
        part = total([self], *dims, keepdim=True)
        return Rounded(part.value.reshape(shape), part.error.reshape(shape), self.u)

    def stored(self, dtype: torch.dtype) -> Rounded:
        """Round to a storage dtype."""
        info = torch.finfo(dtype)
        if info.eps / 2 <= self.u:
            return self
        half = torch.maximum(self.value.abs() + self.error, torch.full_like(self.value, info.tiny))
        return Rounded(self.value, self.error + info.eps / 2 * half, self.u)


def total(terms: Sequence[Rounded], *dims: int, keepdim: bool = False) -> Rounded:
    """Sum several terms, and each over ``dims``, in any order.

    The order decides how many additions an element takes part in: a row of n is summed by blocks, 16 per lane
    and then over lanes and blocks; in float64 possibly sequentially.
    """
    terms = [Rounded(*torch.broadcast_tensors(t.value, t.error), t.u) for t in terms]
    u = terms[0].u
    # Adding zero does not round.
    count = max(sum(bool((t.value != 0).any()) for t in terms), 1)
    n = math.prod(terms[0].value.shape[d] for d in dims)
    additions = n - 1 if u < 1e-15 else min(n - 1, 20 + n / 16)
    values, errors, sizes = (
        sum(part(t).sum(dims, keepdim) if dims else part(t) for t in terms)
        for part in (lambda t: t.value, lambda t: t.error, lambda t: t.value.abs())
    )
    return Rounded(values, errors + (count - 1 + additions) * u * sizes, u)


def assert_accurate(name: str, actual: Tensor, eager: Tensor | None, expected: Rounded) -> None:
    """Assert that every element is within its bound, and the bulk within twice plain PyTorch's error.

    The first holds for any correct kernel and any inputs. The second, which detects errors that the worst
    case of a long formula would hide, compares root mean squares where there are many elements: rms(kernel)
    <= 2 rms(eager) + 1 ulp of the values, all relative to the bounds. Over 10^6 elements per op
    (tests/draws.py) the largest is 0.6 of that.

    Args:
        name: name of the result, for messages.
        actual: the kernel's result.
        eager: plain PyTorch's result for the same inputs in the same dtype; None where elements share an
            error (a weight's is in all of its row), so that the mean of a few depends on chance.
        expected: the formula's values and bounds.
    """
    ratios = errors(name, actual, expected)
    if eager is not None:
        assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    if ratios.numel() == 0:
        return
    worst = int(ratios.argmax())
    if not bool(ratios[worst] <= 1):
        raise AssertionError(
            f"{name}: {int((~(ratios <= 1)).sum())} of {ratios.numel()} elements are off; worst at {worst}: "
            f"got {actual.flatten()[worst]:.9g}, exact {expected.value.flatten()[worst]:.9g}"
            f"{'' if eager is None else f', eager {eager.flatten()[worst]:.9g}'}; the error is "
            f"{float(ratios[worst]):.3g} times its bound"
        )
    share = in_the_bulk(ratios, eager, expected)
    assert share <= 1, (
        f"{name}: no element is off by more than its bound, but the errors' root mean square is {share:.3g} "
        "times twice that of plain PyTorch and an ulp"
    )


def errors(name: str, actual: Tensor, expected: Rounded) -> Tensor:
    """Return each element's error in units of its bound; infinite where non-finite values differ."""
    exact, bound = expected.value, _bounds(actual.dtype, expected)
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    # Near the dtype's largest number infinity is correct too; beyond it the bound may be NaN.
    most = torch.finfo(actual.dtype).max
    over = (exact.abs() >= most) | (exact.abs() + bound >= most)
    actual = actual.detach().double()
    over &= actual == exact.sign() * torch.inf
    same = (actual == exact) | (actual.isnan() & exact.isnan()) | over
    ratios = torch.where(exact.isfinite() & ~over, (actual - exact).abs() / bound, torch.inf)
    ratios = torch.where(same, 0.0, ratios)
    # Written so that a NaN is a failure.
    return ratios.nan_to_num(nan=torch.inf, posinf=torch.inf).flatten()


def in_the_bulk(ratios: Tensor, eager: Tensor | None, expected: Rounded) -> float:
    """Return the root mean square of a kernel's errors as a share of its limit.

    0 for few elements, and in float64, where the expected values have errors of the same size.
    """
    if eager is None:
        return 0.0
    bound = _bounds(eager.dtype, expected)
    ulp = (torch.finfo(eager.dtype).eps * expected.value.abs() / bound).flatten()
    finite = ulp.isfinite()
    if eager.dtype == torch.float64 or int(finite.sum()) < MANY:
        return 0.0
    kernel, plain, ulp = (
        float(t[finite].square().mean().sqrt()) for t in (ratios, errors("eager", eager, expected), ulp)
    )
    return kernel / (2 * plain + ulp) if kernel else 0.0


def _bounds(dtype: torch.dtype, expected: Rounded) -> Tensor:
    """Return the largest error of each element of a correct result stored in ``dtype``."""
    info = torch.finfo(dtype)
    # In float64 the expected value is computed in the same precision, with an error as large.
    both = 2 if info.bits == 64 else 1
    return both * expected.stored(dtype).error + info.tiny


def assert_near(got, expected, dtype, scale, what):
    """Assert agreement within roundings of sums of this size, plus one rounding to half precision."""
    unit = {torch.float64: 2**-52, torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    wide = max(unit, 2**-23) if dtype != torch.float64 else unit
    bound = 64 * wide * scale + (unit * expected.abs() if dtype.itemsize == 2 else 0)
    off = (got.double() - expected).abs()
    assert bool((off <= bound).all()), f"{what}: {float((off / bound).max()):.3g} times the bound"
