"""Result of an evaluation, combined from the results of its batches."""

from __future__ import annotations

import math
import os
import sys
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.terminal import printable
from .audit import Audit
from .checkpoint import write_arrays
from .parts import Part

ACTIVE = 0.01  # variance of the posterior mean, Burda et al. 2016
UNTRUSTED = 0.7  # Pareto k̂, Vehtari et al. 2024
LEAST_FOR_KHAT = 21  # draws, for a tail of five
# Fraction of examples with k̂ above 0.7 beyond which the NLL is only called a bound: docs/estimators.md.
BOUND_ONLY = 0.05


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Result of :func:`fastvae.evaluate`.

    It has numbers for the data set, and float64 tensors [N] for its examples, in order. ``print`` it for a
    summary, :meth:`save` it to a file.
    """

    nll: float
    """Mean of −log p(x), in nats per example."""
    stderr: float
    """Standard error of nll over the choice of examples."""
    mc_stderr: float
    """Standard error of nll over the draws of z, that is over seeds."""
    bits_per_dim: float
    """nll / (X log 2) for X elements in an example. For data dequantised from 2^b levels to [0, 1], add b."""
    log_px: Tensor
    """Estimate of log p(x) of each example, in nats."""
    log_px_stderr: Tensor
    """Standard error of log_px over the draws."""
    ess: Tensor
    """Effective sample size."""
    khat: Tensor
    """Pareto k̂: above 0.7 the example's estimates and their standard errors are unreliable."""
    jackknife: Tensor
    """Jackknife estimate of log p(x), without log_px's bias of order 1/k (Nowozin 2018)."""
    jackknife_stderr: Tensor
    """Standard error of the jackknife estimate over the draws."""
    psis: Tensor
    """Pareto-smoothed estimate of log p(x) (Vehtari et al. 2024): lower variance, biased low."""
    low: Tensor
    """Lower end of a 95 % interval for log p(x) over the draws (:mod:`fastvae.estimation.weights`)."""
    high: Tensor
    """Upper end of the interval; +∞ where the draws do not bound log p(x)."""
    k: Tensor
    """Number of draws, int64."""
    elbo: Tensor
    """Mean of the log weights of draws from q: the bound for k=1. NaN without draws from q."""
    active_units: int | None
    """Latents whose posterior mean has a variance above 0.01 over the data (Burda et al.); None if q has
    no mean, or NaN in it."""
    kl_per_dim: Tensor | None
    """KL(q ‖ p) of each latent, averaged over the data [D]; None if q has no analytic KL."""
    curve: list[tuple[int, float, float]]
    """Triples (draws, nll with at most this many draws per example, standard error over examples), rising in
    draws."""
    dims: float
    """Number of elements in an example, X; the mean if examples differ in size."""
    audit: Audit | None = None
    """Audit of some examples by annealed importance sampling; None if not requested."""

    @property
    def ess_quantiles(self) -> tuple[float, float, float]:
        """Quantiles of the effective sample sizes, at 5 %, 50 % and 95 %."""
        values = self.ess[self.ess.isfinite()]
        if not len(values):
            return math.nan, math.nan, math.nan
        return tuple(torch.quantile(values, values.new_tensor([0.05, 0.5, 0.95])).tolist())

    @property
    def untrusted(self) -> float:
        """Fraction of the examples with k̂ above 0.7."""
        return float((self.khat > UNTRUSTED).double().mean())

    @property
    def nll_jackknife(self) -> float:
        """NLL by the jackknife, which removes most of nll's upward bias.

        Examples with k̂ above 0.7, where the jackknife may be far off, enter with log_px, a lower bound in
        expectation.
        """
        return -float(self._corrected.mean())

    @property
    def nll_psis(self) -> float:
        """NLL by the Pareto-smoothed estimates."""
        return -float(self.psis.mean())

    @property
    def nll_interval(self) -> tuple[float, float]:
        """Ends of a 95 % interval over the draws for the NLL of these examples, around nll_jackknife.

        The half widths of the examples' intervals are added in quadrature. The lower end is −∞ if one of them
        is unbounded above.
        """
        center, n = self._corrected, len(self.log_px)
        up, down = (float(v.square().sum().sqrt()) / n for v in (self.high - center, center - self.low))
        return -float(center.mean()) - up, -float(center.mean()) + down

    @property
    def _corrected(self) -> Tensor:
        return torch.where(self.khat > UNTRUSTED, self.log_px, self.jackknife)

    def __str__(self) -> str:
        n, fewest, most = len(self.log_px), int(self.k.min()), int(self.k.max())
        draws = f"{most} draw{'s' * (most > 1)} each"
        if fewest != most:
            draws = f"{fewest} to {most} draws, {float(self.k.double().mean()):.0f} on average"
        gap = round(float((self.log_px - self.elbo).mean()), 2) + 0.0  # not -0.00
        elbo = f"{float(self.elbo.mean()):.2f} nats, {gap:.2f} below log p(x)"
        if bool(self.elbo.isnan().all() and not self.log_px.isnan().all()):
            elbo = "unknown; no draws came from q itself"
        low, median, high = (f"{v:.1f}" if v < 10 else f"{v:.0f}" for v in self.ess_quantiles)
        error = f" ± {self.stderr:.2f}" * (n > 1)
        by_draws = f"± {self.mc_stderr:.2g} by the draws"
        if most == 1:
            by_draws = "one draw does not tell its error"
        nll = f"{self.nll:.2f}{error} nats ({by_draws})"
        ess = f"median {median}; {low} to {high} for nine of ten examples" if n > 1 else median
        lines = [
            f"log p(x) of {n} example{'s' * (n > 1)}, {draws}",
            f"  NLL            {nll}",
            f"  bits           {self.bits_per_dim:.4f} per dimension, of {self.dims:g}",
            f"  ELBO           {elbo}",
            f"  ESS            {ess}",
        ]
        if bool(self.khat.isnan().all()):
            reason = f"; it takes {LEAST_FOR_KHAT} draws" * (most < LEAST_FOR_KHAT)
            lines.append(f"  Pareto k-hat   unknown{reason}")
        else:
            share = f"above {UNTRUSTED} for {100 * self.untrusted:.1f} % of the examples"
            lines.append(f"  Pareto k-hat   median {float(self.khat.nanmedian()):.2f}; {share}")
            if self.untrusted:
                lines[-1] += ","
                lines.append("                 whose log p(x) is not to be trusted, and likely too low")
        lines[2:2] = self._to_quote()
        if self.active_units is not None:
            total = kl = ""
            if self.kl_per_dim is not None:
                total = f" of {len(self.kl_per_dim)}"
                kl = f"; KL {float(self.kl_per_dim.sum()):.2f} nats"
            lines.append(f"  latents        {self.active_units}{total} active{kl}")
        if self.audit is not None:
            lines.append(f"  audit          {self.audit}".replace("\n", "\n" + 17 * " "))
        if nan := int(self.log_px.isnan().sum()):
            lines.append(f"  NaN            {nan} example{'s' * (nan > 1)}")
        if impossible := int((self.log_px == -math.inf).sum()):
            lines.append(
                f"  -inf           {impossible} example{'s' * (impossible > 1)}, with weights that are all 0"
            )
        # Printing a summary must not fail if the output cannot encode ±.
        return printable("\n".join(lines), sys.stdout)

    __repr__ = __str__

    def _to_quote(self) -> list[str]:
        """Return a line that says which NLL estimate to quote, and why; empty if the NLL is not finite."""
        if not math.isfinite(self.nll):
            return []
        error = f" ± {self.stderr:.2f}" * (len(self.log_px) > 1)
        why = ""
        if bool(self.khat.isnan().all()):
            why = "too few draws to tell its bias"
        elif self.untrusted > BOUND_ONLY:
            why = f"k-hat is above {UNTRUSTED} for {100 * self.untrusted:.1f} % of the examples"
        if why:
            return [f"  to quote       at most {self.nll:.2f}{error} nats, a bound only: {why}"]
        digits = min(6, max(2, -math.floor(math.log10(max(self.mc_stderr, 1e-9)))))
        low, high = self.nll_interval
        draws = f"95 % by the draws: {low:.{digits}f} to {high:.{digits}f}"
        if math.isinf(low):
            draws = f"not above {high:.{digits}f} by the draws, 97.5 %"
        return [f"  to quote       {self.nll_jackknife:.2f}{error} nats, the jackknife's ({draws})"]

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
            >>> def encoder(x):
            ...     return torch.zeros(len(x), 2), torch.zeros(len(x), 2)
            >>> decoder, x = torch.nn.Linear(2, 8), torch.rand(16, 8)
            >>> result = fastvae.evaluate(encoder, decoder, x, k=50, likelihood="bernoulli", progress=False)
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
        elif "Tensor" in field.type:
            shape = (len(value),) if name == "kl_per_dim" else (n,)
            _check_array(name, value, np.int64 if name == "k" else np.float64, shape)
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
        "log_px_stderr must not be negative": not bool((values["log_px_stderr"] < 0).any()),
        "jackknife_stderr must not be negative": not bool((values["jackknife_stderr"] < 0).any()),
        "ess must be between 0 and k": not bool(
            ((values["ess"] < 0) | (values["ess"] > k * (1 + 1e-6))).any()
        ),
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
        "mc_stderr must be that of log_px_stderr": _same(
            values["mc_stderr"], float(values["log_px_stderr"].square().sum().sqrt()) / n
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
    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(p, name) for p in parts], -1))

    log_px, stderr, curve = joined("log_px"), joined("stderr"), joined("curve")
    n = len(log_px)
    total = sum(p.dims * len(p.log_px) for p in parts)
    advice = (
        ", so the means are NaN too; check their x, q and decoder output, or use -result.log_px.nanmean()"
    )
    _warn_about("NaN", log_px.isnan(), advice)
    advice = ": all of their importance weights are 0; use more draws or another q"
    _warn_about("-inf", log_px == -math.inf, advice)
    nll = -float(log_px.mean())
    active, kl = _latents(parts)
    return Evaluation(
        nll=nll,
        stderr=_standard_error(log_px),
        mc_stderr=float(stderr.square().sum().sqrt()) / n,
        bits_per_dim=nll * n / (total * math.log(2)) if total else math.nan,
        log_px=log_px,
        log_px_stderr=stderr,
        ess=joined("ess"),
        khat=joined("khat"),
        jackknife=joined("jackknife"),
        jackknife_stderr=joined("jackknife_stderr"),
        psis=joined("psis"),
        low=joined("low"),
        high=joined("high"),
        k=joined("k"),
        elbo=joined("elbo"),
        active_units=active,
        kl_per_dim=kl,
        curve=[(k, -float(v.mean()), _standard_error(v)) for k, v in zip(looks, curve, strict=True)],
        dims=total / n,
    )


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


def _latents(parts: list[Part]) -> tuple[int | None, Tensor | None]:
    """Combine the batches' statistics to active units and KL per dimension."""
    if not parts[0].latent.shape[1]:
        return None, None
    sizes = np.array([len(p.log_px) for p in parts], dtype=np.float64)[:, None]
    mean, deviations, *kl = np.stack([p.latent for p in parts], 1)  # each [parts, D]
    n = sizes.sum()
    common = (sizes * mean).sum(0) / n
    variance = (deviations + sizes * (mean - common) ** 2).sum(0) / max(n - 1, 1)
    active = None if np.isnan(variance).any() else int((variance > ACTIVE).sum())
    return active, torch.from_numpy(kl[0].sum(0) / n) if kl else None
