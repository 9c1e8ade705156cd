"""Result of an evaluation, combined from the results of its batches."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...core.json_values import json_value
from ..estimates import UNTRUSTED, in_quadrature, nll, nll_where_trusted, where_trusted
from ..weights import ESTIMATES
from .audit import Audit
from .checkpoint import write_arrays
from .delta import Delta, delta, jackknife_stderr
from .latents import latents_of
from .parts import PER_EXAMPLE, Examples, Part, joined
from .report import report, report_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
else:  # optional, and resolved by typing.get_type_hints
    DataFrame = Figure = Any


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation(Examples):
    """Result of :func:`fastvae.evaluate`.

    It has the fields of :class:`fastvae.LogMarginal`, the draws ``k`` and the ``elbo``, tensors [N] on the
    CPU in the order of the examples, in float64 except k; and the numbers of the data set below. ``print`` it
    for a summary, :meth:`save` it to a file, :meth:`plot` it, or take it on with :meth:`to_pandas` and
    :meth:`to_dict`. A notebook shows the summary as a table.
    """

    nll: float
    """Mean of −log p(x), in nats per example."""
    stderr: float
    """Standard error of nll over the choice of examples."""
    mc_stderr: float
    """Standard error of nll over the draws of z, that is over seeds."""
    bits_per_dim: float
    """nll / (X log 2) for X observed elements in an example. For data dequantised from 2^b levels to [0, 1],
    add b."""
    active_units: int | None
    """Latents whose posterior mean has a variance above 0.01 over the data (Burda et al.); None if q has
    no mean, or NaN in it."""
    kl_per_dim: Tensor | None
    """KL(q ‖ p) of each latent, averaged over the data [D]; None if q has no analytic KL."""
    curve: list[tuple[int, float, float]]
    """Triples (draws, nll with at most this many draws per example, standard error over examples), rising in
    draws."""
    dims: float
    """Number of observed elements in an example, X; the mean if examples differ in it."""
    left_out: Tensor | None = None
    """log_px without one of 32 groups of the draws at a time [32, N], for the errors of :meth:`delta`; None
    unless shared_noise. For ``noise="qmc"`` the groups are the 8 randomisations."""
    audit: Audit | None = None
    """Audit of some examples by annealed importance sampling; None if not requested."""

    @property
    def figures(self) -> dict[str, float]:
        """Number of the data set for each field that has one.

        It is the NLL for an estimate of log p(x), the error of the mean for a standard error, and the median
        for a diagnostic. The jackknife's is ``nll_jackknife``.
        """
        declared = ((name, e.figure) for name, e in ESTIMATES.items())
        return {name: figure(getattr(self, name), self) for name, figure in declared if figure is not None}

    @property
    def ess_quantiles(self) -> tuple[float, float, float]:
        """Quantiles of the effective sample sizes, at 5 %, 50 % and 95 %."""
        values = self.ess[self.ess.isfinite()]
        if not len(values):
            return math.nan, math.nan, math.nan
        return tuple(torch.quantile(values, values.new_tensor([0.05, 0.5, 0.95])).tolist())

    @property
    def untrusted(self) -> float:
        """Fraction of the examples with k̂ above 0.7, of those whose k̂ is not NaN; NaN if there are none."""
        return float((self.khat[~self.khat.isnan()] > UNTRUSTED).double().mean())

    @property
    def nll_jackknife(self) -> float:
        """NLL by the jackknife, which removes most of nll's upward bias.

        Examples with k̂ above 0.7, where the jackknife may be far off, enter with log_px, a lower bound in
        expectation.
        """
        return nll_where_trusted(self.jackknife, self)

    @property
    def nll_interval(self) -> tuple[float, float]:
        """Ends of a 95 % interval over the draws for the NLL of these examples, around nll_jackknife.

        The half widths of the examples' intervals are added in quadrature, or averaged if the noise is
        shared. The lower end is −∞ if one of them is unbounded above.
        """
        center = where_trusted(self.jackknife, self)
        up, down = (in_quadrature(v, self) for v in (self.high - center, center - self.low))
        return -float(center.mean()) - up, -float(center.mean()) + down

    def delta(self, reference: Evaluation | int) -> Delta:
        r"""Return log p(x) − log p(x₀) of each example with its standard error over the draws.

        .. math:: \delta = \log \hat p(x) - \log \hat p(x_0), \quad
                  \mathrm{stderr}^2 = \frac{G - 1}{G} \sum_{g=1}^{G} (\delta_{(g)} - \bar\delta)^2

        where :math:`\delta_{(g)}` leaves out group g of the draws: the jackknife, which includes the
        covariance of the two estimates.

        Args:
            reference: the index of the example x₀; or another Evaluation of one example, x₀, or of as many
                examples as this one, compared one by one, such as another model's of the same data. Evaluate
                both with ``shared_noise=True`` and generators in the same state; with different noise the
                result is right, and its error larger.

        Returns:
            :class:`~fastvae.estimation.evaluation.delta.Delta`. As for log_px, trust it where k̂ of both
            examples is below 0.7.

        Raises:
            TypeError, IndexError: for another reference.
            ValueError: for an evaluation without shared_noise, or with another number of examples or groups.

        Example:
            >>> import torch, fastvae
            >>> vae = fastvae.VAE(torch.nn.Linear(8, 4), torch.nn.Linear(2, 8), likelihood="bernoulli")
            >>> x = torch.rand(1, 8).round().repeat(5, 1)
            >>> x[range(1, 5), range(1, 5)] = 1 - x[range(1, 5), range(1, 5)]  # four mutants
            >>> result = vae.evaluate(x, k=200, shared_noise=True, progress=False)
            >>> value, stderr = result.delta(0)
            >>> value.shape, bool((stderr < result.log_px_stderr + result.log_px_stderr[0]).all())
            (torch.Size([5]), True)
        """
        return delta(self, reference)

    def __str__(self) -> str:
        return report(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return report_html(self)

    def plot(self, axes: Any = None) -> Figure:
        """Plot log p(x) of the examples with their intervals, and k̂ against log p(x), in two panels.

        The first panel sorts the examples by log p(x), with the interval from ``low`` to ``high`` of each;
        the second has the line k̂ = 0.7, above which an estimate is not to be trusted. Examples whose log p(x)
        is NaN or infinite are counted in the title and left out.

        Args:
            axes: pair of matplotlib Axes to draw in, such as ``plt.subplots(1, 2)[1]``. Default: None, those
                of a new figure, which a notebook shows and pyplot does not know.

        Returns:
            The matplotlib Figure, for ``savefig``.

        Raises:
            ImportError: without matplotlib, which the extra ``demo`` installs.
            TypeError: if axes is not a pair of Axes.

        Example:
            >>> import torch, fastvae
            >>> vae = fastvae.VAE(torch.nn.Linear(8, 4), torch.nn.Linear(2, 8), likelihood="bernoulli")
            >>> result = vae.evaluate(torch.rand(16, 8), k=50, progress=False)
            >>> [axes.get_ylabel() for axes in result.plot().axes]
            ['nats', 'Pareto k-hat']
        """
        try:
            from .picture import plot
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            raise ImportError(
                "Evaluation.plot needs matplotlib, which cannot be imported: pip install 'fastvae[demo]'",
                name="matplotlib",
            ) from None
        return plot(self, axes)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as Python numbers, strings, lists and dicts, for ``json.dumps``.

        The keys are the names of the fields and of the numbers derived from them (``nll_jackknife``,
        ``nll_interval``, ``ess_quantiles``, ``untrusted``); ``left_out`` stays in the file of :meth:`save`.
        A NaN, which means unknown, becomes None, and ±∞ the strings ``"Infinity"`` and ``"-Infinity"``, which
        ``float`` reads, so that strict JSON can represent every value.

        Returns:
            A dict: numbers of the data set; lists [N] for fields of the examples, in nats for log p(x) and
            its errors; ``curve`` as lists [draws, nll, stderr]; ``audit`` as a dict of lists, or None.

        Example:
            >>> import json, torch, fastvae
            >>> vae = fastvae.VAE(torch.nn.Linear(8, 4), torch.nn.Linear(2, 8), likelihood="bernoulli")
            >>> result = vae.evaluate(torch.rand(16, 8), k=50, progress=False)
            >>> again = json.loads(json.dumps(result.to_dict(), allow_nan=False))
            >>> again["nll"] == result.nll, len(again["log_px"])
            (True, 16)
        """
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("left_out", "audit")}
        found |= {name: getattr(self, name) for name in _DERIVED}
        if self.audit is not None:
            found["audit"] = {f.name: getattr(self.audit, f.name) for f in fields(self.audit)}
        return {**json_value(found), "audit": json_value(found.get("audit"))}

    def to_pandas(self) -> DataFrame:
        """Return the fields of the examples as a pandas DataFrame with a row for each, in their order.

        Returns:
            A DataFrame [N] whose index is named ``example`` and whose columns are the fields of
            :class:`fastvae.LogMarginal`, ``k`` and ``elbo``; log p(x) and its errors are in nats.

        Raises:
            ImportError: without pandas.

        Example:
            >>> import torch, fastvae
            >>> vae = fastvae.VAE(torch.nn.Linear(8, 4), torch.nn.Linear(2, 8), likelihood="bernoulli")
            >>> result = vae.evaluate(torch.rand(16, 8), k=50, progress=False)
            >>> result.to_pandas()["log_px"].shape
            (16,)
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            if error.name != "pandas":
                raise
            raise ImportError(
                "Evaluation.to_pandas needs pandas, which cannot be imported: pip install pandas; "
                "Evaluation.to_dict needs no package",
                name="pandas",
            ) from None
        columns = {name: getattr(self, name).numpy() for name in PER_EXAMPLE}
        return pandas.DataFrame(columns, index=pandas.RangeIndex(len(self.log_px), name="example"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every field except None to an .npz file, for :meth:`load` and ``numpy.load``.

        An existing file is replaced when the new one is complete.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        audit = values.pop("audit")
        arrays = {name: np.asarray(v) for name, v in values.items() if v is not None}
        arrays |= {} if audit is None else audit.arrays()
        write_arrays(Path(path).expanduser(), arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Load a result that :meth:`save` wrote.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it does not contain such a result.

        Example:
            >>> import tempfile, torch, fastvae
            >>> vae = fastvae.VAE(torch.nn.Linear(8, 4), torch.nn.Linear(2, 8), likelihood="bernoulli")
            >>> result = vae.evaluate(torch.rand(16, 8), k=50, progress=False)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     result.save(f"{folder}/result.npz")
            ...     again = fastvae.Evaluation.load(f"{folder}/result.npz")
            >>> torch.equal(again.log_px, result.log_px)
            True
        """
        try:
            with np.load(Path(path).expanduser(), allow_pickle=False) as file:
                values = _fields_of(dict(file))
        except OSError:
            raise
        except Exception as error:  # reading an arbitrary file may raise anything
            raise ValueError(
                f"{os.fspath(path)} holds no result that Evaluation.save wrote ({type(error).__name__}: "
                f"{error})"
            ) from None
        return cls(**values)


# Properties that :meth:`Evaluation.to_dict` returns.
_DERIVED = ("nll_jackknife", "nll_interval", "ess_quantiles", "untrusted")


def _fields_of(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Validate the arrays of a saved Evaluation, and convert them to its fields."""
    if "settings" in arrays:
        raise ValueError("it is a checkpoint; evaluate(..., checkpoint=path) returns the result")
    if arrays["log_px"].ndim != 1:
        raise ValueError(f"log_px has shape {list(arrays['log_px'].shape)}; expected [N]")
    n = len(arrays["log_px"])
    values: dict[str, Any] = {}
    for field in fields(Evaluation):
        name, value = field.name, arrays.get(field.name)
        if name == "audit":
            values[name] = Audit.of(arrays)
        elif value is None and field.type.endswith("| None"):
            values[name] = None
        elif value is None:
            raise ValueError(f"there is no {name}")
        elif name == "curve":
            _check_array(name, value, np.float64, (len(value), 3))
            values[name] = [(int(k), nll, error) for k, nll, error in value.tolist()]
        elif name in PER_EXAMPLE:
            _check_array(name, value, np.int64 if name == "k" else np.float64, (n,))
            values[name] = torch.from_numpy(value)
        elif name == "left_out":
            _check_array(name, value, np.float64, (len(value), n))
            values[name] = torch.from_numpy(value)
        elif name == "kl_per_dim":
            _check_array(name, value, np.float64, (len(value),))
            values[name] = torch.from_numpy(value)
        else:
            _check_array(name, value, np.int64 if name == "active_units" else np.float64, ())
            values[name] = value.item()
    _check_values(values)
    return values


def _check_array(name: str, value: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    if value.dtype != dtype or value.shape != shape:
        raise ValueError(
            f"{name} has dtype {value.dtype} and shape {list(value.shape)}; expected {np.dtype(dtype)} "
            f"{list(shape)}"
        )


def _check_values(values: dict[str, Any]) -> None:
    """Raise ValueError if saved numbers are out of range or inconsistent."""
    n, k, log_px = len(values["log_px"]), values["k"], values["log_px"]
    curve, kl, active, audit = (values[name] for name in ("curve", "kl_per_dim", "active_units", "audit"))
    draws = [row[0] for row in curve]
    # NaN means unknown.
    rules = {
        "log_px must have examples": n > 0,
        "log_px must not be infinite upwards": not bool((log_px == math.inf).any()),
        "k must be at least 1": bool((k >= 1).all()),
        **{
            f"{name} must not be negative": not bool((values[name] < 0).any())
            for name, declared in ESTIMATES.items()
            if declared.nonnegative
        },
        "ess must be between 0 and k": not bool((values["ess"] > k * (1 + 1e-6)).any()),
        "low must not be above high": not bool((values["low"] > values["high"]).any()),
        "dims must be positive": values["dims"] > 0,
        "curve must rise in draws, from 1": draws == sorted(set(draws)) and min(draws, default=1) >= 1,
        "active_units must be among the latents": active is None
        or active >= 0
        and (kl is None or active <= len(kl)),
        "nll must be minus the mean of log_px": _same(values["nll"], -float(log_px.mean())),
        "bits_per_dim must be nll / (dims log 2)": _same(
            values["bits_per_dim"] * values["dims"] * math.log(2), values["nll"]
        ),
        "mc_stderr must be that of the examples": _same(
            values["mc_stderr"], _mc_stderr(values["log_px_stderr"], values["left_out"])
        ),
        "audit must be of these examples": audit is None
        or not bool(((audit.examples < 0) | (audit.examples >= n)).any()),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(rule)


def _same(value: float, expected: float) -> bool:
    both_nan = math.isnan(value) and math.isnan(expected)
    return both_nan or value == expected or math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9)


def combine(parts: list[Part], looks: list[int]) -> Evaluation:
    """Combine the results of all batches; ``looks`` are the numbers of draws of the curve."""
    examples = Examples(**joined([p.examples for p in parts]))
    log_px, n = examples.log_px, len(examples.log_px)
    advice = (
        ", so the means are NaN too; check their x, q and decoder output, or use -result.log_px.nanmean()"
    )
    _warn_about("NaN", log_px.isnan(), advice)
    advice = ": all of their importance weights are 0; use more draws or another q"
    _warn_about("-inf", log_px == -math.inf, advice)
    total = sum(p.dims * len(p) for p in parts)
    mean = nll(log_px, examples)
    active, kl = latents_of(parts)
    curve, left_out = (
        torch.from_numpy(np.concatenate([getattr(p, name) for p in parts], -1))
        for name in ("curve", "left_out")
    )
    groups = left_out[: int(examples.k.max())] if len(left_out) else None  # the others have no draws
    return Evaluation(
        **vars(examples),
        nll=mean,
        stderr=_standard_error(log_px),
        mc_stderr=_mc_stderr(examples.log_px_stderr, groups),
        bits_per_dim=mean * n / (total * math.log(2)) if total else math.nan,
        active_units=active,
        kl_per_dim=kl,
        curve=[(k, nll(v, examples), _standard_error(v)) for k, v in zip(looks, curve, strict=True)],
        dims=total / n,
        left_out=groups,
    )


def _mc_stderr(stderr: Tensor, left_out: Tensor | None) -> float:
    """Return the standard error over the draws of the mean of log_px."""
    if left_out is None:
        return float(stderr.square().sum().sqrt()) / len(stderr)
    return float(jackknife_stderr(left_out.mean(1, keepdim=True)))


def _warn_about(what: str, which: Tensor, advice: str) -> None:
    if count := int(which.sum()):
        first = ", ".join(map(str, which.nonzero()[:5, 0].tolist())) + ", …" * (count > 5)
        warnings.warn(
            f"fastvae.evaluate: log p(x) is {what} for {count} of {len(which)} examples (number "
            f"{first}){advice}",
            RuntimeWarning,
            stacklevel=5,
        )


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
