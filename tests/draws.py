"""Stress test of the error bounds: many more random draws than the tests, and the largest errors found.

``python -m tests.draws [op ...] [--backend native triton reference]`` draws cases as the tests do until every
result of an op, and its gradients together, have had a million elements on a backend, and prints the largest
error as a share of its bound, for float32, float64 and half precision. In half precision, and where a result
is a single rounding, it is near 1: half an ulp is certain. ``bulk`` is the largest root mean square as a
share of its limit (tests/compare.py). Fails where one exceeds 1, and prints the seed that reproduces it.

Not part of the test suite: it takes about a minute per op. FASTVAE_ISA chooses the instruction set.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections import defaultdict

import hypothesis
from hypothesis import strategies as st

import fastvae
from fastvae import ops

from . import (
    cases,
    compare,
    strategies,
    test_aggregate,
    test_logsumexp,
    test_mixture,
    test_normal_diagonal,
    test_normal_full,
    test_reduce,
)

# Few samples and columns, many rows, so that results that are sums have many elements; or another long axis,
# for sums of many terms.
FEW = st.sampled_from((1, 2, 3, 5, 7))
MANY = st.sampled_from((1001, 3000, 6007))
CHUNK = 20  # cases for a seed


def _sizes(count):
    """Draw sizes as the tests do, or one long axis and short others."""
    long = [st.tuples(*(MANY if axis == many else FEW for axis in range(count))) for many in range(count)]
    rows = long[1]
    return st.one_of(strategies.distinct_sizes(count), rows, rows, *long)


def _rsample_kl(case):
    return test_normal_diagonal.results({**case, "estimator": "iwae"}, ops.rsample_kl)


def _rsample_log_ratio(case):
    return test_normal_diagonal.results(case, ops.rsample_log_ratio)


OPS = {
    "rsample_kl": (test_normal_diagonal.cases(_sizes(3)), _rsample_kl),
    "rsample_log_ratio": (test_normal_diagonal.cases(_sizes(3)), _rsample_log_ratio),
    "rsample_tril": (test_normal_full.cases(), test_normal_full.results),
    **{f"{name}_log_prob": (cases.log_prob(name, _sizes(3)), cases.results) for name in cases.LIKELIHOODS},
    "log_mean_exp": (test_logsumexp.cases(_sizes(2)), test_logsumexp.results),
    "mixture_log_prob": (test_mixture.cases(_sizes(3)), test_mixture.results),
    "aggregate_log_prob": (test_aggregate.cases(_sizes(3)), test_aggregate.results),
    "reduce": (test_reduce.cases(_sizes(3)), test_reduce.results),
}


class Tally:
    """Statistics of one result's errors."""

    def __init__(self):
        self.cases = self.elements = 0
        self.worst = dict.fromkeys(("float32", "float64", "half"), 0.0)
        self.bulk = 0.0

    def add(self, name, actual, eager, expected):
        errors = compare.errors(name, actual, expected)
        self.cases += 1
        self.elements += errors.numel()
        if not errors.numel():
            return
        precision = "half" if actual.dtype.itemsize == 2 else str(actual.dtype).removeprefix("torch.")
        self.worst[precision] = max(self.worst[precision], float(errors.max()))
        self.bulk = max(self.bulk, compare.in_the_bulk(errors, eager, expected))

    @property
    def fails(self):
        return not max(*self.worst.values(), self.bulk) <= 1

    def line(self):
        shares = "  ".join(f"{v:7.3f}" for v in (*self.worst.values(), self.bulk))
        return f"{self.cases:7} {self.elements:10}  {shares}"


def draw(op: str, seed: int, tallies: dict[str, Tally]) -> None:
    """Draw CHUNK cases of an op."""
    strategy, results = OPS[op]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=CHUNK,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=strategy)
    def run(case):
        for result in results(case):
            failed = tallies[result[0]].fails
            tallies[result[0]].add(*result)
            if tallies[result[0]].fails and not failed:
                try:
                    compare.assert_accurate(*result)
                except AssertionError as error:
                    print(f"seed {seed}: {op}: {error}", flush=True)

    run()


def _enough(tallies: dict[str, Tally], elements: int) -> bool:
    gradients = [t.elements for name, t in tallies.items() if "gradient" in name or name == "weights"]
    results = [t.elements for name, t in tallies.items() if "gradient" not in name]
    return min(*results, sum(gradients)) >= elements


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="*", choices=[*OPS, []], default=[])
    parser.add_argument("--backend", nargs="+", default=["native", "triton", "reference"])
    parser.add_argument("--elements", type=int, default=10**6)
    parser.add_argument(
        "--seconds", type=float, default=60, help="for an op and a backend at most (default 60)"
    )
    parser.add_argument("--seed", type=int, help="one seed alone, which a failure has named")
    options = parser.parse_args()
    failed = False
    print(f"{'':54}  cases   elements  float32  float64     half     bulk")
    for backend in options.backend:
        for op in options.op or OPS:
            tallies: dict[str, Tally] = defaultdict(Tally)
            stop = time.monotonic() + options.seconds
            with fastvae.use_backend(backend):
                while not tallies or not _enough(tallies, options.elements) and time.monotonic() < stop:
                    draw(op, secrets.randbits(32) if options.seed is None else options.seed, tallies)
                    if options.seed is not None:
                        break
            for name, tally in sorted(tallies.items()):
                failed |= tally.fails
                print(f"{backend:10} {op:18} {name:24}{tally.line()}", flush=True)
    print("FAILED" if failed else "all within their bounds")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
