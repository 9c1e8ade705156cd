"""Report of an evaluation, for people."""

from __future__ import annotations

import math
import sys
from html import escape
from typing import Any

from ...core.terminal import printable
from ..estimates import UNTRUSTED
from ..weights import ESTIMATES

LEAST_FOR_KHAT = 21  # draws, for a tail of five
# Fraction of examples with k̂ above 0.7 beyond which the NLL is only called a bound: docs/estimators.md.
BOUND_ONLY = 0.05


# Headings of a section, with their texts; an empty heading continues the text before.
_Lines = list[tuple[str, str]]


def report(result: Any) -> str:
    """Return a summary of the result, in lines of a heading and a text."""
    title, found = _summary(result)
    lines = [title, *(f"  {heading:<14} {text}" for heading, text in found)]
    # Printing a summary must not fail if the output cannot encode ±.
    return printable("\n".join(lines), sys.stdout)


def report_html(result: Any) -> str:
    """Return the same summary as an HTML table."""
    title, found = _summary(result)
    rows: _Lines = []
    for heading, text in found:
        if heading or not rows:
            rows.append((escape(heading), escape(text)))
        else:
            rows[-1] = rows[-1][0], f"{rows[-1][1]}<br>{escape(text)}"
    left = ' style="text-align: left"'
    body = "".join(f"<tr><th{left}>{heading}</th><td{left}>{text}</td></tr>" for heading, text in rows)
    return f"<table><caption{left}>{escape(title)}</caption><tbody>{body}</tbody></table>"


def _summary(result: Any) -> tuple[str, _Lines]:
    sections = (_nll, _quoted, _estimates, _bits, _elbo, _ess, _khat, _latents, _audit, _not_finite)
    lines = [line for section in sections for line in section(result)]
    return f"log p(x) of {_examples(len(result.log_px))}, {_draws(result)}", lines


def _examples(n: int) -> str:
    return f"{n} example{'s' * (n > 1)}"


def _draws(result: Any) -> str:
    fewest, most = int(result.k.min()), int(result.k.max())
    if fewest != most:
        return f"{fewest} to {most} draws, {float(result.k.double().mean()):.0f} on average"
    return f"{most} draw{'s' * (most > 1)} each{', the same for all' * (result.left_out is not None)}"


def _over_examples(result: Any) -> str:
    return f" ± {result.stderr:.2f}" * (len(result.log_px) > 1)


def _nll(result: Any) -> _Lines:
    by_draws = f"± {result.mc_stderr:.2g} by the draws"
    if int(result.k.max()) == 1:
        by_draws = "one draw does not tell its error"
    return [("NLL", f"{result.nll:.2f}{_over_examples(result)} nats ({by_draws})")]


def _quoted(result: Any) -> _Lines:
    """Return which estimate of the NLL to quote, and why; nothing if the NLL is not finite."""
    if not math.isfinite(result.nll):
        return []
    error = _over_examples(result)
    why = ""
    if bool(result.khat.isnan().all()):
        why = "too few draws to tell its bias"
    elif result.untrusted > BOUND_ONLY:
        why = f"k-hat is {_share_untrusted(result)}"
    if why:
        found = [("to quote", f"at most {result.nll:.2f}{error} nats, a bound only: {why}")]
        if result.untrusted > BOUND_ONLY:
            found.append(("", 'proposal="refined" may help, or more draws'))
        return found
    digits = min(6, max(2, -math.floor(math.log10(max(result.mc_stderr, 1e-9)))))
    low, high = result.nll_interval
    draws = f"95 % by the draws: {low:.{digits}f} to {high:.{digits}f}"
    if math.isinf(low):
        draws = f"not above {high:.{digits}f} by the draws, 97.5 %"
    return [("to quote", f"{result.nll_jackknife:.2f}{error} nats, the jackknife's ({draws})")]


def _estimates(result: Any) -> _Lines:
    """Return the number of each estimate that is declared with a heading, if it is known."""
    figures, found = result.figures, []
    for name, declared in ESTIMATES.items():
        if declared.heading and not math.isnan(value := figures.get(name, math.nan)):
            by_draws = figures.get(declared.stderr, math.nan)
            error = "" if math.isnan(by_draws) else f"(± {by_draws:.2g} by the draws)"
            found.append((declared.heading, " ".join(filter(None, [f"{value:.2f}", declared.unit, error]))))
    return found


def _bits(result: Any) -> _Lines:
    return [("bits", f"{result.bits_per_dim:.4f} per dimension, of {result.dims:g}")]


def _elbo(result: Any) -> _Lines:
    if bool(result.elbo.isnan().all() and not result.log_px.isnan().all()):
        return [("ELBO", "unknown; no draws came from q itself")]
    gap = round(float((result.log_px - result.elbo).mean()), 2) + 0.0  # not -0.00
    return [("ELBO", f"{float(result.elbo.mean()):.2f} nats, {gap:.2f} below log p(x)")]


def _ess(result: Any) -> _Lines:
    low, median, high = (f"{v:.1f}" if v < 10 else f"{v:.0f}" for v in result.ess_quantiles)
    if len(result.log_px) == 1:
        return [("ESS", median)]
    return [("ESS", f"median {median}; {low} to {high} for nine of ten examples")]


def _khat(result: Any) -> _Lines:
    if bool(result.khat.isnan().all()):
        reason = f"; it takes {LEAST_FOR_KHAT} draws" * (int(result.k.max()) < LEAST_FOR_KHAT)
        return [("Pareto k-hat", f"unknown{reason}")]
    text = f"median {float(result.khat.nanmedian()):.2f}; {_share_untrusted(result)}"
    if not result.untrusted:
        return [("Pareto k-hat", text)]
    return [
        ("Pareto k-hat", f"{text},"),
        ("", "whose log p(x) is not to be trusted, and likely too low"),
    ]


def _share_untrusted(result: Any) -> str:
    return f"above {UNTRUSTED} for {100 * result.untrusted:.1f} % of the examples"


def _latents(result: Any) -> _Lines:
    if result.active_units is None:
        return []
    total = kl = ""
    if result.kl_per_dim is not None:
        total = f" of {len(result.kl_per_dim)}"
        kl = f"; KL {float(result.kl_per_dim.sum()):.2f} nats"
    return [("latents", f"{result.active_units}{total} active{kl}")]


def _audit(result: Any) -> _Lines:
    if result.audit is None:
        return []
    first, *rest = str(result.audit).split("\n")
    return [("audit", first), *(("", line) for line in rest)]


def _not_finite(result: Any) -> _Lines:
    found = []
    if nan := int(result.log_px.isnan().sum()):
        found.append(("NaN", _examples(nan)))
    if impossible := int((result.log_px == -math.inf).sum()):
        found.append(("-inf", f"{_examples(impossible)}, with weights that are all 0"))
    return found
