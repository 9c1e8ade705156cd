"""The comparison that every kernel test uses: bounds that follow from the roundings of a formula.

A formula of tests/formulas.py is evaluated on :class:`Rounded` numbers: values in float64 that carry, to
first order, the largest error that arithmetic in the kernel's precision can have made of them. A right kernel
is within it whatever the inputs are, so no draw of them makes a test fail by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae.reference.common import (
    digamma_excess,
    half_step,
    half_step_slope,
    log1p_rest,
    stirling_error,
)

# Errors of the elementary functions, in units of the unit roundoff (half an ulp of 1): 2 ulp are what CUDA
# documents for expf; csrc/common.hpp, kernels/common.py and torch are within 1.3. The noise is within 4 ulp
# of its definition over 10^7 draws (docs/NOTES.md).
EXP = LOG = 4
NOISE = 8

# Elements whose mean error says something, beside that of plain PyTorch on the same inputs.
MANY = 64


def _times(a: Tensor, b: Tensor) -> Tensor:
    """The product of bounds, where an exact zero times an unbounded error is still zero, not NaN."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


class Rounded:
    """Exact values, and a bound on the error of what a computation in ``dtype`` makes of them.

    Every operation adds its own rounding, the unit roundoff of its result, to what the errors of its operands
    come to. Nothing is added where nothing is rounded: by a zero, and by a product with a power of two.
    """

    def __init__(self, value: Tensor, error: Tensor, u: float):
        self.value, self.error, self.u = value, error, u

    @classmethod
    def exact(cls, value: Tensor, dtype: torch.dtype) -> Rounded:
        """A number that is given, not computed. ``dtype`` is that of the computation: float32 or float64."""
        value = value.detach().double()
        return cls(value, torch.zeros_like(value), torch.finfo(dtype).eps / 2)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """What a definition in plain PyTorch calls: torch.exp(v) is v.exp(), and so on."""
        method = {torch.where: cls._where, torch.zeros_like: cls._zeros}.get(function)
        if method is None:
            method = getattr(cls, function.__name__.strip("_"))
        return method(*args, **(kwargs or {}))

    def _as(self, other: Rounded | float) -> Rounded:
        """A number that a program holds, rounded if its type cannot."""
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
        """That which is computed in."""
        return torch.float64 if self.u < 1e-15 else torch.float32

    def abs(self) -> Rounded:
        return Rounded(self.value.abs(), self.error, self.u)

    def clamp(self, min: float | None = None, max: float | None = None) -> Rounded:
        return Rounded(self.value.clamp(min, max), self.error, self.u)

    def _made(self, value: Tensor, error: Tensor, roundings: float | Tensor = 0) -> Rounded:
        return Rounded(value, error + roundings * self.u * value.abs(), self.u)

    def rounded(self, times: float) -> Rounded:
        """The same after so many more roundings."""
        return self._made(self.value, self.error, times)

    def off(self, by: Tensor) -> Rounded:
        """The same with so much more of an error."""
        return Rounded(self.value, self.error + by, self.u)

    def noise(self) -> Rounded:
        """These are normals, as the kernel makes them."""
        # In float64 the definition itself rounds the angle, which costs the small ones their digits.
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
        # The relative error of exp is the absolute one of its argument; of nothing, nothing.
        error = torch.where(value == 0, 0.0, value * torch.expm1(self.error))
        # Beyond the type it is infinite, and what is made of it anything.
        error = torch.where(value > torch.finfo(self.dtype).max, torch.inf, error)
        return self._made(value, error, EXP)

    def sqrt(self) -> Rounded:
        """A GPU's takes two ulps."""
        value = self.value.sqrt()
        least = (self.value - self.error).clamp(min=0).sqrt() + value
        return self._made(value, torch.where(self.error == 0, 0.0, self.error / least), 4)

    def precision(self) -> Rounded:
        """exp(-v), by one exponential or as the square of exp(-v/2)."""
        return (self * -0.5).exp().square()

    def log(self) -> Rounded:
        return self._made(self.value.log(), self.error / self.value, LOG)

    def expm1(self) -> Rounded:
        """exp(v) - 1; away from 0 it may be that difference."""
        value = torch.expm1(self.value)
        propagated = torch.where(value == -1, 0.0, (value + 1) * torch.expm1(self.error))
        return Rounded(value, propagated + self._of_expm1(value) * self.u, self.u)

    def _of_expm1(self, value: Tensor) -> Tensor:
        difference = EXP * (value + 1) + value.abs()
        return torch.maximum(3 * value.abs(), torch.where(self.value.abs() < 1, 0.0, difference))

    def expm1_minus(self) -> Rounded:
        """exp(v) - 1 - v: by a series near 0, elsewhere it may be that difference."""
        expm1 = torch.expm1(self.value)
        series = sum(self.value**n / math.factorial(n) for n in range(2, 13))
        near = self.value.abs() < 0.125
        value = torch.where(near, series, expm1 - self.value)
        # Of both terms the same error: its derivative is exp(v) - 1.
        # Without the difference of two infinities.
        beyond = torch.where(self.error.isinf(), torch.inf, torch.expm1(self.error) - self.error)
        propagated = _times(expm1.abs(), self.error) + _times(expm1 + 1, beyond)
        own = torch.where(near, 6 * value, self._of_expm1(expm1) + value)
        return Rounded(value, propagated + own * self.u, self.u)

    def log1p_rest(self) -> Rounded:
        """v - log(1 + v): by a series near 0, elsewhere it may be that difference."""
        value = log1p_rest(self.value)
        propagated = _times((self.value / (1 + self.value)).abs(), self.error) + 0.5 * self.error.square()
        own = torch.where(self.value.abs() < 0.25, 6 * value, LOG * self.value.abs() + value)
        return Rounded(value, propagated + own * self.u, self.u)

    def stirling_error(self) -> Rounded:
        """By a polynomial, of 1 / v or of v, beside half a logarithm of v and what that times v comes to."""
        value, x = stirling_error(self.value), self.value
        logarithms = torch.where(x < 16 if self.u < 1e-15 else x < 1, 1 + x + (1 + x) * x.log().abs(), 0.0)
        slope = 0.5 / x.clamp(min=1e-38) / (1 + x)
        return Rounded(
            value, _times(slope, self.error) + self.u * (EXP * value.abs() + LOG * logarithms), self.u
        )

    def digamma_excess(self) -> Rounded:
        """Likewise."""
        value, x = digamma_excess(self.value), self.value
        logarithms = torch.where(x < 16 if self.u < 1e-15 else x < 1, 1 + x * (1 + x.log().abs()), 0.0)
        slope = 1 / (1 + x)
        return Rounded(
            value, _times(slope, self.error) + self.u * (2 * EXP * value.abs() + LOG * logarithms), self.u
        )

    def log1p(self) -> Rounded:
        return self._made(torch.log1p(self.value), self.error / (1 + self.value), LOG)

    def sign(self) -> Rounded:
        """Exact, but of a number that its error may have carried across 0."""
        sure = (self.value.abs() > self.error) | (self.error == 0)
        return Rounded(self.value.sign(), torch.where(sure, 0.0, 2.0), self.u)

    def tanh(self) -> Rounded:
        """e / (e + 2) of e = exp(2 v) - 1, a relative error of which counts at most twice."""
        value = torch.tanh(self.value)
        # Its slope at the point nearest to 0 that the argument's error allows.
        steepest = 1 - torch.tanh((self.value.abs() - self.error).clamp(min=0)).square()
        return self._made(value, steepest * self.error, 2 * 3 + 1 + 2)

    def half_step(self) -> Rounded:
        """A factor near 1 and its logarithm, in float64 sixteen factors; its slope is positive."""
        value, slope = half_step(self.value), half_step_slope(self.value)
        own = 10 + 2 * value.abs() if self.u > 1e-15 else 80 + 2 * value.abs()
        return Rounded(value, _times(slope, self.error) + own * self.u, self.u)

    def half_step_slope(self) -> Rounded:
        """A sum of positive terms, by way of exp: its relative slope is at most 1."""
        value = half_step_slope(self.value)
        return self._made(value, _times(value, torch.expm1(self.error)), EXP + 12)

    def sigmoid(self) -> Rounded:
        """Of the given side of exp(-|v|): an exponential, a sum and a quotient."""
        value = torch.sigmoid(self.value)
        propagated = value * (1 - value) * (self.error + EXP * self.u)
        # An argument that may be anything leaves the whole range.
        return self._made(value, torch.where(self.error.isinf(), 1.0, propagated), 3)

    def where(self, mask: Tensor) -> Rounded:
        """0 where the mask is false."""
        return Rounded(torch.where(mask, self.value, 0.0), torch.where(mask, self.error, 0.0), self.u)

    def expand(self, *shape: int) -> Rounded:
        return Rounded(self.value.expand(shape), self.error.expand(shape), self.u)

    def __getitem__(self, index) -> Rounded:
        return Rounded(self.value[index], self.error[index], self.u)

    def sum(self, *dims: int) -> Rounded:
        return total([self], *dims)

    def sum_to_size(self, shape: Sequence[int]) -> Rounded:
        """The sum over what was broadcast from ``shape``."""
        lead = self.value.dim() - len(shape)
        dims = [i for i, n in enumerate((*[1] * lead, *shape)) if n == 1 and self.value.shape[i] != 1]
        if not dims:
            return self[(0,) * lead]
        part = total([self], *dims, keepdim=True)
        return Rounded(part.value.reshape(shape), part.error.reshape(shape), self.u)

    def stored(self, dtype: torch.dtype) -> Rounded:
        """Rounded to a storage type."""
        info = torch.finfo(dtype)
        if info.eps / 2 <= self.u:
            return self
        half = torch.maximum(self.value.abs() + self.error, torch.full_like(self.value, info.tiny))
        return Rounded(self.value, self.error + info.eps / 2 * half, self.u)


def total(terms: Sequence[Rounded], *dims: int, keepdim: bool = False) -> Rounded:
    """The sum of several terms, and of each over ``dims``, in whatever order.

    An element takes part in as many additions as the order has them for it: in a row of n the sums are over
    blocks, of 16 a lane and then lanes and blocks; in float64 they may be over one after the other.
    """
    terms = [Rounded(*torch.broadcast_tensors(t.value, t.error), t.u) for t in terms]
    u = terms[0].u
    # A zero is added without a rounding.
    count = max(sum(bool((t.value != 0).any()) for t in terms), 1)
    n = math.prod(terms[0].value.shape[d] for d in dims)
    additions = n - 1 if u < 1e-15 else min(n - 1, 20 + n / 16)
    values, errors, sizes = (
        sum(part(t).sum(dims, keepdim) if dims else part(t) for t in terms)
        for part in (lambda t: t.value, lambda t: t.error, lambda t: t.value.abs())
    )
    return Rounded(values, errors + (count - 1 + additions) * u * sizes, u)


def assert_accurate(name: str, actual: Tensor, eager: Tensor | None, expected: Rounded) -> None:
    """Every element is within the bound, and in the bulk the errors are no larger than twice plain PyTorch's.

    The first holds for any right kernel and any inputs. The second, which sees what the worst case of a long
    formula would hide, compares root mean squares where there are many elements: rms(kernel) <= 2 rms(eager)
    + 1 ulp of the values, all relative to the bounds. In 10^6 elements an op (tests/draws.py) it comes to 0.6
    of that.

    Args:
        actual: what the kernel gave.
        eager: plain PyTorch on the same inputs in the same dtype; None where elements share an error (a
            weight's is in all of its row), so that chance has a say in the mean of a few.
        expected: the formula.
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
    """The error of each element in units of its bound; infinite where what is not finite differs."""
    exact, bound = expected.value, _bounds(actual.dtype, expected)
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    # Next to the largest number of the dtype infinity is right, too.
    most = torch.finfo(actual.dtype).max
    # Beyond it the bound may be NaN.
    over = (exact.abs() >= most) | (exact.abs() + bound >= most)
    actual = actual.detach().double()
    over &= actual == exact.sign() * torch.inf
    same = (actual == exact) | (actual.isnan() & exact.isnan()) | over
    ratios = torch.where(exact.isfinite() & ~over, (actual - exact).abs() / bound, torch.inf)
    ratios = torch.where(same, 0.0, ratios)
    # Written so that a NaN is a failure.
    return ratios.nan_to_num(nan=torch.inf, posinf=torch.inf).flatten()


def in_the_bulk(ratios: Tensor, eager: Tensor | None, expected: Rounded) -> float:
    """The root mean square of a kernel's errors as a share of what it may be; 0 for few elements.

    And in float64, where the expected values have errors of the same size.
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
    """The largest error of each element of a right result that is stored in a dtype."""
    info = torch.finfo(dtype)
    # In float64 the expected value is computed in that precision itself, with as large an error.
    both = 2 if info.bits == 64 else 1
    return both * expected.stored(dtype).error + info.tiny
