"""Number of draws of an evaluation, and when convergence is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.checks import SHARED, check_choice, check_count, check_number, first_row
from ...random import NOISES
from ..proposals import Posterior, Proposal, as_proposal
from ..stream import Chunks
from ..sums import kept_draws
from ..weights import ESTIMATES

FIRST_LOOK = 100  # draws before the stopping criterion is first evaluated
FORMAT = 4  # version of the checkpoint's arrays other than the estimates, which its settings name


@dataclass(frozen=True)
class Plan:
    """Draws of each example, from which proposal, and how they are chunked and stopped.

    ``k`` is the maximum number of draws per example. With ``tol`` they stop at this standard error.
    """

    k: int
    tol: float | None
    chunks: Chunks
    noise: str
    proposal: Proposal
    shared_noise: bool

    @classmethod
    def read(
        cls,
        k: int | None,
        tol: float | None,
        k_chunk: int | None,
        noise: str,
        proposal: str | Proposal,
        shared_noise: bool,
    ) -> Plan:
        """Validate the arguments of :func:`fastvae.evaluate`."""
        if k is not None:
            k = check_count("k", k, "the importance samples per example")
        if tol is not None and not (tol := check_number("tol", tol, "in nats")):
            raise ValueError("tol must be greater than 0, got 0: any finite number of draws has an error")
        check_choice("noise", noise, NOISES)
        k = k or (5000 if tol is None else 100_000)
        first_row(0, shared_noise, k, 0)
        return cls(k, tol, Chunks(k_chunk), noise, as_proposal(proposal, noise), shared_noise)

    def row(self, index: int) -> int:
        """Return the address of the row with this index in the data."""
        return SHARED if self.shared_noise else index

    @property
    def looks(self) -> list[int]:
        """Numbers of draws after which the bound is recorded, and convergence checked."""
        looks = {10**i for i in range(10)}
        if self.tol is not None:
            looks = {n for n in looks if n < FIRST_LOOK} | {FIRST_LOOK * 2**i for i in range(26)}
        return [*sorted(n for n in looks if n < self.k), self.k]

    @property
    def drops_rows(self) -> bool:
        """True if finished examples are no longer decoded."""
        return self.tol is not None and self.k > FIRST_LOOK

    @property
    def tail(self) -> int:
        """Number of largest weights to store."""
        return kept_draws(self.k)

    def settings(self) -> dict[str, Any]:
        """Return what a checkpoint must agree in."""
        settings: dict[str, Any] = {"format": FORMAT, "estimates": " ".join(ESTIMATES)}
        settings |= {"k": self.k, "tol": self.tol}
        if self.noise != "philox":  # the default, which checkpoints of older versions do not contain
            settings["noise"] = self.noise
        if self.proposal != Posterior():
            settings["proposal"] = repr(self.proposal)
        if self.shared_noise:
            settings["shared_noise"] = True
        return settings
