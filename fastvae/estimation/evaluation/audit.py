"""Audit of an evaluation by annealed importance sampling, which is in turn validated on simulated data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.nested import Conditioning, as_mask, as_size_factor, each, tensors
from ...core.sparse import at_rows, joined
from ...core.terminal import progress_bar
from ...distributions import rsample_log_prob
from ...inputs.batch import Inputs
from ..audit.annealing import Annealing, Settings, simulate
from ..stream import Chunks
from .ranks import Ranks

# The defaults of fastvae.audit.ais.
STEPS, CHAINS, LEAPFROG = 200, 16, 2
_BLOCK = 100  # examples per block, independent of the batches, so that results are, too
_PREFIX = "audit_"  # prefix of the audit's arrays in a file


@dataclass(frozen=True, eq=False)
class Audit:
    """Audit of :func:`fastvae.evaluate`, from ``audit=``.

    Tensors are float64: [A] for the examples estimated once more by :func:`fastvae.audit.ais`, and [S] for as
    many simulated examples, as in :func:`fastvae.audit.bdmc`.
    """

    examples: Tensor
    """Indices of the examples in the data, int64."""
    log_px: Tensor
    """Estimate of log p(x) by annealed importance sampling, in nats: a lower bound in expectation."""
    log_px_stderr: Tensor
    """Standard error of log_px over the chains."""
    acceptance: Tensor
    """Mean acceptance probability of the transitions, near 0.65 for well-tuned chains."""
    difference: Tensor
    """``log_px`` minus the evaluation's estimate: positive where that is low."""
    lower: Tensor
    """Lower bound of log p(x) of simulated examples, by the same annealing."""
    upper: Tensor
    """Upper bound of the same, by reverse annealing from the latents that generated the example."""
    without_bounds: str
    """Reason why ``lower`` and ``upper`` are empty; an empty string if they are not."""

    @property
    def mean(self) -> float:
        """Mean difference, by which the evaluation's log p(x) is low."""
        return float(self.difference.mean())

    @property
    def stderr(self) -> float:
        """Standard error of the mean over the choice of examples, chains and draws."""
        return _standard_error(self.difference)

    @property
    def largest(self) -> tuple[float, int]:
        """Largest difference, and the index of its example in the data."""
        at = int(self.difference.argmax())
        return float(self.difference[at]), int(self.examples[at])

    @property
    def gap(self) -> float:
        """Mean of ``upper`` − ``lower``, in expectation at least the error of the annealing."""
        return float((self.upper - self.lower).mean())

    @property
    def gap_stderr(self) -> float:
        """Standard error of the gap."""
        return _standard_error(self.upper - self.lower)

    def __str__(self) -> str:
        most, example = self.largest
        side = "lower" if self.mean < 0 else "higher"
        found = (
            f"AIS on {_examples(len(self.examples))}: log p(x) {side} by "
            f"{_nats(abs(self.mean), self.stderr)} on average,\n"
            f"the largest difference {_nats(most)} (example {example})"
        )
        if self.without_bounds:
            return f"{found}; no BDMC: {self.without_bounds}"
        made = _examples(len(self.lower), "simulated ")
        return f"{found}; BDMC gap {_nats(self.gap, self.gap_stderr)} on {made}"

    __repr__ = __str__

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fields as arrays with prefixed names, to save with other arrays."""
        return {_PREFIX + f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Audit | None:
        """Read an audit from arrays, or return None if they contain no audit.

        Raises:
            KeyError, ValueError: for an incomplete audit, or arrays of other shapes.
        """
        if not any(name.startswith(_PREFIX) for name in arrays):
            return None
        found = {f.name: arrays[_PREFIX + f.name] for f in fields(cls)}
        for name, value in found.items():
            of = "lower" if name in ("lower", "upper") else "examples"
            shape = () if name == "without_bounds" else (found[of].size,)
            kind = {"examples": "i", "without_bounds": "U"}.get(name, "f")
            if value.shape != shape or value.dtype.kind != kind:
                raise ValueError(
                    f"the audit's {name} has dtype {value.dtype} and shape {list(value.shape)}; expected "
                    f"{list(shape)}"
                )
        values: dict[str, Any]
        values = {n: str(v) if n == "without_bounds" else torch.from_numpy(v) for n, v in found.items()}
        return cls(**values)


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _nats(value: float, error: float = math.nan) -> str:
    digits = f"{value:.2f}"
    digits = "0.00" if digits == "-0.00" else digits
    return f"{digits} nats" if math.isnan(error) else f"{digits} ± {error:.2f} nats"


def _examples(n: int, kind: str = "") -> str:
    return f"{n} {kind}example{'s' * (n != 1)}"


class Sample:
    """Sample of ``count`` examples, evenly spaced over data that may be iterated only once.

    Every 2^j-th example is stored, at most twice ``count``, and ``count`` of these are selected. The
    selection depends only on the number of examples.
    """

    def __init__(self, count: int):
        self.count = count
        self._every = 1
        self._kept: dict[int, tuple[Any, Conditioning | None]] = {}

    def see(self, x: Any, conditioning: Conditioning | None, start: int) -> None:
        """Sample from a batch whose first example has index ``start``."""
        if not self.count:
            return
        if conditioning is not None:
            mask, size_factor, context = conditioning
            mask = None if mask is None else as_mask(mask, x)
            conditioning = Conditioning(
                mask, None if size_factor is None else as_size_factor(size_factor, x), context
            )
        for row in range(-start % self._every, len(tensors(x)[0]), self._every):

            def one(t: Tensor, row: int = row) -> Tensor:
                return at_rows(t, torch.tensor([row], device=t.device))

            rest = None if conditioning is None else Conditioning(*(each(one, part) for part in conditioning))
            self._kept[start + row] = each(one, x), rest
        while len(self._kept) > 2 * self.count:
            self._every *= 2
            self._kept = {n: kept for n, kept in self._kept.items() if n % self._every == 0}

    @property
    def examples(self) -> list[int]:
        """Indices of the selected examples in the data."""
        kept = sorted(self._kept)
        count = min(self.count, len(kept))
        return [kept[i * len(kept) // count] for i in range(count)]

    def batch(self, examples: list[int]) -> tuple[Any, Conditioning | None]:
        """Concatenate stored examples to one batch."""
        xs, besides = zip(*(self._kept[n] for n in examples), strict=True)
        x = _joined(xs)
        return x, None if besides[0] is None else Conditioning(*map(_joined, zip(*besides, strict=True)))


def _joined(parts: Any) -> Any:
    if isinstance(parts[0], Mapping):
        return {name: _joined([p[name] for p in parts]) for name in parts[0]}
    return None if parts[0] is None else joined(parts)


def probe(inputs: Inputs) -> None:
    """Run the audit's operations once on the model, so that errors are raised before the evaluation."""
    seed = torch.zeros((), dtype=torch.int64, device=inputs.device)
    Annealing(inputs, seed, Settings(2, 1, 1, "posterior", Chunks(None))).forward()
    _simulated(inputs, 0)


def run_audit(
    sample: Sample,
    read: Callable[[str, Any, Conditioning | None], Inputs],
    log_px: Tensor,
    seed: int,
    ranks: Ranks,
    progress: bool,
) -> Audit:
    """Audit the examples of a sample.

    Args:
        sample: the examples.
        read: function of a name for errors, x and its conditioning inputs that returns a batch's inputs.
        log_px: importance estimates of all examples [N].
        seed: the evaluation's seed, from which the audit's seeds are derived.
        ranks: processes that share the work, by blocks of examples.
        progress: show a progress bar, where standard error has a reader.
    """
    examples = sample.examples
    blocks = [examples[i : i + _BLOCK] for i in range(0, len(examples), _BLOCK)]
    tasks = [(made, b) for b in range(len(blocks)) for made in (False, True)]
    mine = [task for i, task in enumerate(tasks) if i % ranks.world == ranks.rank]
    settings = Settings(STEPS, CHAINS, LEAPFROG, "posterior", Chunks(None))
    found: dict[tuple[bool, int], Any] = {}
    total = sum(settings.work(1 + made) for made, _ in mine)
    with progress_bar(progress, total=total, desc="audit", unit="move") as bar:
        for made, b in mine:
            place = f"block {b} of the audit"
            x, conditioning = sample.batch(blocks[b])
            inputs = read(place, x, conditioning)
            if made:
                drawn = _simulated(inputs, _derived(seed, 3 + b))
                if isinstance(drawn, str):
                    found[made, b] = drawn
                    continue
                z, x = drawn
                inputs = read(f"{place}, simulated", x, conditioning)
            key = torch.tensor(_derived(seed, 1 + made), dtype=torch.int64, device=inputs.device)
            annealing = Annealing(inputs, key, settings, b * _BLOCK, bar.update)
            results = annealing.bounds(z) if made else annealing.estimate()
            found[made, b] = [r.cpu() for r in results]
    everyone: dict[tuple[bool, int], Any] = {}
    for part in ranks.gather(found, "audit"):
        everyone |= part
    estimates, bounds = ([everyone[made, b] for b in range(len(blocks))] for made in (False, True))
    estimate, stderr, _, acceptance = map(torch.cat, zip(*estimates, strict=True))
    reasons = [b for b in bounds if isinstance(b, str)]
    none = estimate.new_empty(0)
    lower, upper, *_ = (none, none) if reasons else map(torch.cat, zip(*bounds, strict=True))
    places = torch.tensor(examples, device="cpu")
    return Audit(
        examples=places,
        log_px=estimate,
        log_px_stderr=stderr,
        acceptance=acceptance,
        difference=estimate - log_px[places],
        lower=lower,
        upper=upper,
        without_bounds=reasons[0] if reasons else "",
    )


def _derived(seed: int, stream: int) -> int:
    """Derive a seed for noise that is independent of the draws, those of ``noise="qmc"`` included.

    The increment is another odd number than that between the seeds of randomisations (fastvae/random.py).
    """
    return (seed + stream * 0xD6E8FEB86659FD93 + 2**63) % 2**64 - 2**63


def _simulated(inputs: Inputs, seed: int) -> tuple[Tensor, Any] | str:
    """Simulate z and x from the model, or return the reason why this is not possible."""
    like = rsample_log_prob(inputs.q, 1, torch.zeros((), dtype=torch.int64, device=inputs.device))[0]
    generator = torch.Generator(inputs.device).manual_seed(seed % 2**63)
    try:
        return simulate(inputs, like.shape[2], like.dtype, generator)
    except NotImplementedError as error:
        return str(error) or type(error).__name__
