"""Cases: all settings of a random call, drawn from a seed and an index."""

from __future__ import annotations

import dataclasses
import random

import torch

from . import decoders, families, likelihoods, oracle

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALVES)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LAYOUTS = ("contiguous", "transposed", "offset", "strided", "expanded")
TRAINING = ("elbo", "iwae", "bound", "beta_tc", "log_weights")
SAMPLED = ("iwae", "bound", "log_weights")
MEASURING = ("log_marginal", "reconstruction_log_prob", "evaluate")
# Outputs of this many elements take the path that never stores the decoder's output.
FUSED = 1 << 18


@dataclasses.dataclass(frozen=True)
class Case:
    """Call of the library. Every field is a plain value, so that the record prints completely."""

    seed: int
    index: int
    entry: str
    via: str
    q: str
    prior: str
    likelihood: str
    decoder: str
    batch: int
    k: int
    latent: int
    event: tuple[int, ...]
    q_dtypes: tuple[torch.dtype, ...]
    prior_dtype: torch.dtype
    x_dtype: torch.dtype
    net_dtype: torch.dtype
    layouts: tuple[str, ...]
    frozen: int
    mask: str
    size: bool
    context: bool
    k_chunk: int | None
    reduction: str
    terms: bool
    noise: str
    estimator: str
    objective: str
    encoder: str
    kl: str
    beta: str
    free_bits: float
    compiled: str
    backend: str

    def __str__(self) -> str:
        shown = (f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))
        return ", ".join(s.replace("torch.", "") for s in shown if not s.endswith(("=", "=False", "=None")))

    @property
    def numbers(self) -> random.Random:
        """Return the random generator of the tensors' values."""
        return random.Random(f"tensors {self.seed} {self.index}")


def draw(seed: int, index: int) -> Case:
    """Draw the case of a seed and an index."""
    r = random.Random(f"{seed} {index}")
    one = r.choice

    def rarely(value, usual, share=0.15):
        return value if r.random() < share else usual

    entry = r.choices((*TRAINING, *MEASURING), (6, 6, 4, 2, 2, 1.5, 1, 0.7))[0]
    via = r.choices(("function", "method", "forward"), (4, 2, 1))[0]
    if via == "forward" and entry in ("log_weights", "reconstruction_log_prob", "evaluate"):
        via = "method"
    if entry == "log_weights":
        via = "function"
    q = one(families.NORMAL if entry == "beta_tc" else tuple(families.POSTERIORS))
    family = families.POSTERIORS[q]
    spatial = family.spatial
    latent = one((4, 6)) if spatial else one((2, 3, 5) if family.least_latent == 2 else (1, 2, 3, 5))
    prior = one(families.priors_of(q, entry))
    misused = not spatial and entry != "evaluate" and r.random() < 0.12
    likelihood = one(likelihoods.PLAIN if misused else tuple(likelihoods.ZOO))
    kind = likelihoods.ZOO[likelihood]
    backend = r.choices(("native", "reference", "triton"), (8, 2, 1))[0]
    large = backend == "native" and entry != "beta_tc" and r.random() < (0.2 if misused else 0.04)
    batch = rarely(one((0, 1)), one((2, 3, 5, 6)), 0.12)
    k = rarely(1, one((2, 3, 4, 6, 8)))
    event = one([e for e in kind.events if len(e) == 1 or not misused])
    if large and len(event) == 1 and kind.may_be_large:
        batch, k = 5, 4
        event = (FUSED // (batch * k) + one((1, 7, 16)),)
    base = torch.float32 if large or misused else r.choices(FLOATS, (5, 3, 2, 1))[0]
    mixed = r.random() < 0.3 and not misused

    def dtype(of=FLOATS):
        return one(of) if mixed and r.random() < 0.5 else base

    net_dtype = dtype()

    q_dtypes = tuple(dtype() for _ in range(4))
    wide = FLOATS[:2]
    if family.one_dtype:
        q_dtypes = (dtype(wide if family.wide else FLOATS),) * 4
    if family.wide and q_dtypes[0] in HALVES:
        q_dtypes = (torch.float32,) * 4
    prior_dtype = dtype()
    if families.PRIORS[prior].wide and prior_dtype in HALVES:
        prior_dtype = torch.float32
    x_dtype = dtype()
    if likelihood.startswith("discretized") and x_dtype in HALVES:  # cannot represent the grid
        x_dtype = torch.float32
    if entry == "evaluate" and x_dtype.is_floating_point:  # batches are moved to the encoder's dtype
        x_dtype = q_dtypes[0] if not likelihood.startswith("discretized") else torch.float32
    if kind.integers and r.random() < 0.4:
        x_dtype = one(INTEGERS)
    estimator = one(("iwae", "stl", "dreg"))
    objective = encoder = ""
    if entry == "bound":
        objective = one(tuple(oracle.BOUNDS))
        estimator = one(oracle.BOUNDS[objective].estimators)
        encoder = rarely(one(tuple(oracle.ENCODERS)), "", 0.25)
        k = oracle.BOUNDS[objective].draws
    if not family.addressed and entry in MEASURING:  # torch's draws depend on chunks
        entry = "iwae"
    if family.strata:
        estimator, encoder, objective = one(("iwae", "stl")), "", "iwae" if entry == "bound" else ""
    kl = rarely("mc", "analytic", 0.25)
    chunkable = family.addressed and entry in (
        "iwae",
        "bound",
        "log_marginal",
        "reconstruction_log_prob",
        "evaluate",
    )
    context = entry == "evaluate" or prior == "of the context" or (not misused and r.random() < 0.15)
    compiled = ""
    if not misused and entry in TRAINING and backend != "triton" and not large and r.random() < 0.03:
        compiled = one(("aot_eager", "aot_eager", "eager"))
    decoder = rarely("sequential", one(tuple(decoders.POOL)), 0.3)
    if misused and not context:
        decoder = one(decoders.MISUSED)
        composed = q not in families.UNIVARIATE or prior != "none" or kind.native is not None
        if "autocast" in decoder and composed:  # composed densities would have bfloat16 products
            decoder = "pool: linear"
    by_sample = bool(encoder) or estimator == "dreg"
    frozen = rarely(r.randrange(1, 16), 0, 0.3)
    scored = encoder == "wake" or estimator == "covariance"
    if not decoders.fits(decoder, compiled, by_sample, batch, not frozen and not scored):
        decoder = "module"
    if "the body doubles" in decoder:  # per call, and chunks rerun it in the backward pass
        chunkable = False
    analytic = entry == "elbo" and kl == "analytic"
    return Case(
        seed, index, entry, via, q, prior, likelihood, decoder, batch, k, latent, event, q_dtypes,
        prior_dtype, x_dtype, net_dtype,
        tuple(rarely(one(LAYOUTS), "contiguous", 0.4) for _ in range(6)),
        frozen,
        rarely(one(("example", "event")), "", 0.25) if kind.masked else "",
        kind.sized and r.random() < 0.3,
        context,
        rarely(one((1, 2, 3, 10)), None, 0.25) if chunkable else None,
        one(("mean", "sum", "none")),
        entry in ("elbo", "iwae", "bound") and r.random() < 0.2,
        rarely("qmc", "philox") if family.addressed and entry in SAMPLED else "philox",
        estimator if entry in SAMPLED else "iwae",
        objective, encoder, kl,
        rarely(one(("2", "0", "tensor", "rows")), "", 0.4) if entry == "elbo" else "",
        rarely(0.3, 0.0) if analytic and families.per_dimension(q, prior) else 0.0,
        compiled, backend,
    )  # fmt: skip
