"""Run one case and compare the library's results with the oracle's."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import fastvae
from fastvae.distributions import LowRankNormal
from fastvae.likelihoods import Gaussian

from ..models import evaluate_parts
from . import decoders, families, likelihoods, oracle
from .case import MEASURING, Case
from .oracle import Arithmetic

SAMPLES = 4  # random samples of the rounding errors
TIMES = 8  # allowed error as a multiple of the largest sample

# Documented refusals, by their messages; every other error is a failure.
REFUSED: tuple[str, ...] = ("data has no batches",)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """Return the same numbers in another layout."""
    if t.dim() == 0 or t.numel() == 0:
        return t
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        wide = t.new_zeros(t.numel() + 3)
        wide[1 : 1 + t.numel()] = t.flatten()
        return wide[1 : 1 + t.numel()].reshape(t.shape)
    if layout == "strided":
        return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]
    if layout == "expanded":
        return t[:1].expand(t.shape)
    return t


class Built:
    """Fresh tensors and modules of a case, equal for each instance."""

    def __init__(self, case: Case):
        self.case = case
        self.generator = torch.Generator().manual_seed(case.numbers.randrange(2**31))
        c, family, prior = case, families.POSTERIORS[case.q], families.PRIORS[case.prior]
        learns = c.entry not in MEASURING
        self.leaves: dict[str, Tensor] = {}
        kind = likelihoods.ZOO[c.likelihood]
        logits_of_rows = c.q != "mixture" or c.frozen % 2 == 0
        for i, shape in enumerate(family.shapes(c.latent)):
            rows = () if c.q == "mixture" and i == 4 and not logits_of_rows else (c.batch,)
            t = self._leaf((*rows, *shape), c.q_dtypes[min(i, 3)], c.layouts[i % 3])
            self.leaves[f"q{i}"] = t.requires_grad_(learns and not c.frozen >> i & 1)
        fixed = c.via != "function" and (c.prior.startswith("td") or c.prior in ("tanh", "of the context"))
        for i, shape in enumerate(prior.shapes(c.latent)):
            t = self._leaf(shape, c.prior_dtype, c.layouts[3])
            self.leaves[f"p{i}"] = t.requires_grad_(learns and not fixed and not c.frozen >> 3 & 1)
        self.q_leaves = [t for n, t in self.leaves.items() if n[0] == "q"]
        self.p_leaves = [t for n, t in self.leaves.items() if n[0] == "p"]
        u = torch.rand(c.batch, *c.event, dtype=torch.float64, generator=self.generator)
        x = kind.data(u)
        layout = lambda t: laid_out(t.to(c.x_dtype), c.layouts[4])  # noqa: E731
        self.x = {n: layout(t) for n, t in x.items()} if isinstance(x, dict) else layout(x)
        self.likelihood = kind.give(c.event)
        self.mask = self.size = self.context = None
        if c.mask:
            shape = c.event if c.mask == "event" and c.entry != "evaluate" else (c.batch, *c.event)
            self.mask = laid_out(torch.rand(shape, generator=self.generator) < 0.7, c.layouts[5])
        if c.size:
            self.size = 0.5 + torch.rand(c.batch, generator=self.generator)
        if c.context:
            self.context = torch.arange(c.batch)[:, None].to(torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(self.generator.initial_seed())
            self.decoder = decoders.make(
                c.decoder, c.latent, kind.outputs(c.event), kind.combine, c.net_dtype,
                plain=not c.context and kind.combine is likelihoods.Kind._field_defaults["combine"],
            )  # fmt: skip
            self.plain = self.decoder
            with torch.no_grad():
                for p in self.decoder.parameters():
                    p.mul_(kind.scale)
        modules = {"decoder": self.decoder}
        if isinstance(self.likelihood, nn.Module):
            modules["likelihood"] = self.likelihood
        self.parameters = {
            f"{m}.{n}": p
            for m, module in modules.items()
            for n, p in module.named_parameters()
            if p.requires_grad
        }
        self.weights = (
            torch.rand(2, c.k, max(c.batch, 1), dtype=torch.float64, generator=self.generator) + 0.5
        )
        if c.entry == "evaluate":
            self.decoder.eval()

    def _leaf(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
        t = 0.5 * torch.randn(shape, dtype=torch.float64, generator=self.generator)
        return laid_out(t.to(dtype), layout).detach()

    def q(self, rows: Tensor | None = None, leaves: list[Tensor] | None = None) -> Any:
        family = families.POSTERIORS[self.case.q]
        leaves = self.q_leaves if leaves is None else leaves
        leaves = [t if rows is None or len(t) != self.case.batch else t[rows] for t in leaves]
        return family.give(*family.before(*leaves))

    def prior(self) -> Any:
        if self.case.prior == "of the context":
            mu, logvar = self.p_leaves
            return lambda context: (
                mu + 0.1 * torch.cos(context.double()).to(mu.dtype),
                logvar + 0.0 * context.to(mu.dtype),
            )
        family = families.PRIORS[self.case.prior]
        return family.give(*family.before(*self.p_leaves))

    def around(self) -> Any:
        return decoders.around(self.case.decoder, self.plain)

    @property
    def learned(self) -> dict[str, Tensor]:
        return {n: t for n, t in {**self.leaves, **self.parameters}.items() if t.requires_grad}


class Encoder(nn.Module):
    """Encoder that returns the case's q for any x; in an evaluation, the rows given by the context."""

    def __init__(self, built: Built):
        super().__init__()
        self.built = [built]
        # Data are cast to the dtype of the encoder's parameters.
        dtype = built.case.x_dtype if built.case.x_dtype.is_floating_point else torch.float32
        self.own = nn.Parameter(torch.zeros((), dtype=dtype), requires_grad=False)

    def forward(self, x: Any, context: Any = None) -> Any:
        built = self.built[0]
        return built.q(context.flatten().long() if built.case.entry == "evaluate" else None)


class Recorder(nn.Module):
    """Decoder that records its inputs."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder, self.kept = decoder, []

    def forward(self, z: Tensor, *context: Tensor) -> Any:
        self.kept.append(z.detach().clone().flatten(1))
        return self.decoder(z, *context)


def draws(built: Built) -> tuple[Tensor, list[int]]:
    """Return z [K, B, D] as the case's decoder receives it, and the number of samples in each call."""
    c = built.case
    recorder = built.decoder = Recorder(built.decoder)
    torch.manual_seed(c.index)
    with torch.no_grad(), built.around():
        call(built)
    z = torch.cat(recorder.kept)
    sizes = [min(_batch_size(c), c.batch - i) for i in range(0, c.batch, _batch_size(c))] or [0]
    parts = z.split([c.k * n for n in sizes])
    samples = [len(z) // c.batch for z in recorder.kept] if c.batch and c.entry != "evaluate" else [c.k]
    return torch.cat([p.reshape(c.k, n, c.latent) for p, n in zip(parts, sizes, strict=True)], 1), samples


def _batch_size(case: Case) -> int:
    return max(1, case.batch - 1) if case.entry == "evaluate" else max(1, case.batch)


def low_rank_noise(built: Built) -> Tensor:
    """Return the normals behind z, [K, B, D + R], isolated by parameters of 0 and 1."""
    c = built.case
    found = []

    def decoder(z, context=None):
        found.append(z.double().flatten(1))
        return z.new_zeros(len(z), 1)

    mu, logvar, factor = (torch.zeros(t.shape, dtype=torch.float64) for t in built.q_leaves)
    scales = [(logvar, factor)]
    for r in range(factor.shape[-1]):
        one = factor.clone()
        one[..., 0, r] = 1.0
        scales.append((logvar - 80.0, one))
    for scale in scales:
        torch.manual_seed(c.index)
        x, q = torch.zeros(c.batch, 1), LowRankNormal(mu, *scale)
        fastvae.log_weights(x, q, decoder, k=c.k, likelihood=Gaussian(scale=1.0), noise=c.noise)
    own, *shared = (z.reshape(c.k, c.batch, c.latent) for z in found)
    return torch.cat([own, *(z[..., :1] for z in shared)], -1)


def _weights(built: Built, value: Tensor, which: int = 0) -> Tensor:
    """Return a result's upstream gradient: 1 for a scalar."""
    w = built.weights[which].to(value.dtype)
    return (
        torch.ones_like(value)
        if value.dim() == 0
        else w[0, : len(value)]
        if value.dim() == 1
        else w[:, : value.shape[1]]
    )


def _beta(case: Case, dtype: torch.dtype) -> Any:
    """Return β as passed to the library."""
    rows = torch.linspace(0.0, 2.0, case.batch, dtype=dtype)
    return {"": 1.0, "2": 2.0, "0": 0.0, "tensor": torch.tensor(0.7, dtype=dtype), "rows": rows}[case.beta]


def options_of(built: Built) -> dict[str, Any]:
    c = built.case
    options: dict[str, Any] = {"mask": built.mask, "size_factor": built.size, "context": built.context}
    if c.entry in ("elbo", "beta_tc") or c.entry == "reconstruction_log_prob":
        options["k"] = c.k
    else:
        options["k"] = c.k
    if c.entry in ("elbo", "iwae", "bound", "beta_tc"):
        options["reduction"] = c.reduction
    if c.entry in ("elbo", "iwae", "bound"):
        options["terms"] = c.terms
    if c.entry in ("iwae", "bound"):
        options["k_chunk"] = c.k_chunk
        options["noise"] = c.noise
    if c.entry in MEASURING:
        options["k_chunk"] = c.k_chunk
    if c.entry == "elbo":
        options |= {"kl": c.kl, "beta": _beta(c, torch.float32), "free_bits": c.free_bits}
        options["free_bits_per"] = "example"
    if c.entry == "beta_tc":
        options |= {"beta": 3.0, "alpha": 0.5, "gamma": 0.5 if _is_stratified(c) else 1.5}
        if _is_stratified(c):
            options |= {"sampling": "stratified", "dataset_size": 2 * c.batch + 1}
    if c.entry == "log_weights":
        options |= {"estimator": _log_weights_estimator(c), "noise": c.noise}
    if c.entry == "iwae":
        options["estimator"] = c.estimator
    if c.encoder:
        options["q_objective"] = oracle.ENCODERS[c.encoder][0]()
    return options


def _log_weights_estimator(case: Case) -> str:
    return "iwae" if case.estimator == "dreg" else case.estimator


def call(built: Built) -> dict[str, Tensor]:
    """Return the library's results by name."""
    c = built.case
    options = options_of(built)
    objective = oracle.BOUNDS[c.objective].make(c.estimator) if c.entry == "bound" else None
    meaning = {"likelihood": built.likelihood, "prior": built.prior()}
    if c.entry == "reconstruction_log_prob":
        meaning.pop("prior")
    if c.entry == "evaluate":
        unused = options.pop("mask"), options.pop("size_factor"), options.pop("context")
        mask, size, context = unused
        parts = {"x": built.x, "context": context, "mask": mask, "size_factor": size}
        data = Rows({n: t for n, t in parts.items() if t is not None}, c.batch)
        options |= {"prepare_batch": lambda batch: batch, "batch_size": _batch_size(c), "progress": False}
        encoder = Encoder(built)
        if c.via == "function":
            found = evaluate_parts(encoder, built.decoder, data, **options, **meaning)
        else:
            vae = fastvae.VAE(encoder, built.decoder, modules=[], **meaning)
            found = vae.evaluate(data, **options)
        return {"value": torch.as_tensor(found.log_px)}
    if c.via == "function":
        run = getattr(fastvae, c.entry)
        more = [objective] if objective is not None else []
        result = run(built.x, built.q(), built.decoder, *more, **options, **meaning)
    else:
        vae = fastvae.VAE(Encoder(built), built.decoder, latent_dim=_latent_dim(c), modules=[], **meaning)
        if c.via == "forward":
            result = vae(built.x, objective=objective if objective is not None else c.entry, **options)
        else:
            more = [objective] if objective is not None else []
            result = getattr(vae, c.entry)(built.x, *more, **options)
    if c.entry == "log_marginal":
        return {"value": result.log_px}
    if c.entry == "log_weights":
        return {"value": result.log_likelihood, "ratio": result.log_ratio}
    if c.terms and c.entry in ("elbo", "iwae", "bound"):
        return {"value": result.bound, "log_likelihood": result.log_likelihood, "kl": result.kl}
    return {"value": result}


def _latent_dim(case: Case) -> Any:
    if families.POSTERIORS[case.q].spatial:
        return (case.latent // 2, 1, 2)
    return case.latent


class Rows(torch.utils.data.Dataset):
    """Data set of examples as dicts."""

    def __init__(self, parts: dict[str, Any], count: int):
        self.parts, self.count = parts, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        take = lambda t: {n: v[i] for n, v in t.items()} if isinstance(t, dict) else t[i]  # noqa: E731
        return {n: take(t) for n, t in self.parts.items()}


def expected(
    built: Built, drawn: tuple[Tensor, list[int]], noise: Tensor | None, r: Arithmetic
) -> dict[str, Tensor]:
    """Return the oracle's results and their gradients by name."""
    c, (z, samples) = built.case, drawn
    family, prior, kind = families.POSTERIORS[c.q], families.PRIORS[c.prior], likelihoods.ZOO[c.likelihood]
    learns = c.entry not in MEASURING
    seed = _seed(c)
    with torch.set_grad_enabled(learns):
        inputs = [r(t.double(), t.dtype, exact=True) for t in family.before(*built.q_leaves)]
        q = _with_rounded_weights(family.exact(*inputs), r)
        wide = z.double()
        given = [wide]
        if c.q == "low rank":
            given.append(noise)
        if c.q == "mixture":
            given.append(families.turns(c.k, seed, 2))
        path = family.path(*inputs, *given)
        path = wide + (path - path.detach())  # the same numbers
        if c.q == "mixture":  # a component's draws have its parameters' dtype
            path = r(path, min(z.dtype, *families.component_dtypes(built.q_leaves), key=_digits), exact=True)
        at = r(path, z.dtype)  # argument of the densities
        stated = (
            built.prior()(built.context) if c.prior == "of the context" else prior.before(*built.p_leaves)
        )
        inner = [r(t.double(), t.dtype, exact=True) for t in stated]
        p = _with_rounded_weights(prior.exact(*inner), r)
        # Half precision rounds the z of the prior's density, and not the noise that some of q's are of.
        log_q = r(families.density(q, at), absolute=c.latent)
        log_p = r(families.density(p, r(path, z.dtype)), absolute=c.latent)
        frozen_q = _with_rounded_weights(family.exact(*(t.detach() for t in inputs)), r)
        log_q_of_z = r(families.density(frozen_q, at), absolute=c.latent)
        inside = min(z.dtype, decoders.dtype(c.decoder, c.net_dtype), key=_digits)
        log_likelihood = _log_likelihood(built, r(path, inside, exact=True), z.dtype, samples, r, kind)
        share = torch.zeros(c.k, 1, dtype=torch.float64)
        if family.strata:
            logits = torch.log_softmax(inputs[4], -1) + math.log(2)
            chosen = families.turns(c.k, seed, 2)
            share = logits.mT[chosen] if logits.dim() == 2 else logits[chosen][:, None]
        log_ratio = log_p - log_q + share
        log_w = log_likelihood + log_ratio
        results = _results(built, q, p, at, log_likelihood, log_ratio, log_w, share, r)
        if not learns:
            return results
        float16 = bool(r.unit) and torch.float16 in (c.net_dtype, z.dtype)
        return results | _gradients(
            built, results, log_w, log_likelihood, log_p, log_q, log_q_of_z, share, float16
        )


def _with_rounded_weights(d: Any, r: Arithmetic) -> Any:
    """Return d, with a rounding of its log weights and of their gradient if it is a mixture.

    The gradient of the logits is sum_n g_n (r_nc - pi_c), for responsibilities r and weights pi. It is
    computed as G_c - pi_c sum_c G_c from that of the log weights, G_c = sum_n g_n r_nc, which is stored: its
    rounding is relative to G, and the difference may be far smaller.
    """
    if isinstance(d, (families.MixtureOf, families.NormalMixture)):
        d.logits = r(d.logits)
    return d


def _digits(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps


def _seed(case: Case) -> Tensor:
    torch.manual_seed(case.index)
    return torch.randint(-(2**63), 2**63 - 1, ())


def _log_likelihood(
    built: Built, path: Tensor, dtype: torch.dtype, samples: list[int], r: Arithmetic, kind: Any
) -> Tensor:
    """Return log p(x|z) [K, B], with the decoder's output on the same numbers."""
    c = built.case
    given = {}
    if isinstance(built.likelihood, nn.Module):
        given = {n: r(t.double(), t.dtype, exact=True) for n, t in built.likelihood.named_parameters()}
    _seed(c)
    x, mask = built.x, built.mask
    inner = decoders.dtype(c.decoder, c.net_dtype)  # a decoder may cast its output
    narrow = lambda o: min(o.dtype, inner, key=_digits)  # noqa: E731
    found, added = [], []
    for rows in path.split(samples):
        native = rows.to(dtype).flatten(0, 1)
        if families.POSTERIORS[c.q].spatial:
            native = native.unflatten(1, _latent_dim(c))
        context = [] if built.context is None else [built.context.repeat(len(rows), 1)]
        with built.around():
            parameters = built.decoder(native, *context)
        if kind.native is not None:
            parameters = [r(o, narrow(o), exact=True) for o in likelihoods.read(parameters)]
            parameters = kind.combine(parameters)
            log_p = kind.native(x.repeat(len(rows), *[1] * (x.dim() - 1)), parameters)
            log_p = r(log_p.double(), log_p.dtype, exact=True)
            found.append(_summed(log_p, mask, len(rows), c))
            added.append(_summed(log_p.detach().abs(), mask, len(rows), c))
            continue
        outputs = likelihoods.read(parameters)
        # An evaluation has other batches, and so other roundings of its matrix products.
        same = c.entry != "evaluate"
        outputs = [r(o.double(), narrow(o), exact=same, absolute=1.0) for o in outputs]
        if built.size is not None:
            size = built.size.double().repeat(len(rows)).reshape(-1, *[1] * len(c.event))
            outputs[0] = outputs[0] * size if "rate" in c.likelihood else outputs[0] + size.log()
        data = {n: _repeated(t, rows) for n, t in x.items()} if isinstance(x, dict) else _repeated(x, rows)
        log_p = r(kind.log_prob(data, outputs, given), absolute=1.0)
        found.append(_summed(log_p, mask, len(rows), c))
        added.append(_summed(log_p.detach().abs(), mask, len(rows), c))
    # A sum's rounding is relative to its terms, which may cancel.
    return r(torch.cat(found), absolute=torch.cat(added))


def _repeated(t: Tensor, rows: Tensor) -> Tensor:
    return t.double().repeat(len(rows), *[1] * (t.dim() - 1))


def _summed(log_p: Tensor, mask: Tensor | None, samples: int, case: Case) -> Tensor:
    """Sum over the observed elements of an event: [K, B]."""
    if mask is not None:
        seen = mask.expand(case.batch, *case.event).repeat(samples, *[1] * len(case.event))
        log_p = torch.where(seen, log_p, 0.0)
    return (log_p.flatten(1).sum(1) if log_p.dim() > 1 else log_p).reshape(samples, case.batch)


def _results(built, q, p, z, log_likelihood, log_ratio, log_w, share, r) -> dict[str, Tensor]:
    c = built.case
    if c.entry in ("log_marginal", "evaluate"):
        return {"value": oracle.lme(log_w)}
    if c.entry == "reconstruction_log_prob":
        return {"value": oracle.lme(log_likelihood + share)}
    if c.entry == "log_weights":
        return {"value": log_likelihood, "ratio": log_ratio}
    if c.entry == "elbo":
        beta = _beta(c, torch.float64) if c.beta != "tensor" else torch.tensor(0.7).double()
        if c.beta == "rows":
            beta = _beta(c, torch.float32).double()
        kl = families.closed_kl(q, p) if c.kl == "analytic" else None
        weight = share.exp()
        log_p = (weight * log_likelihood).mean(0)
        if kl is None:
            kl = -(weight * (log_ratio - share)).mean(0)
        else:
            kl = r(kl, absolute=1.0)
            if c.free_bits:
                kl = kl.clamp(min=c.free_bits)
            kl = kl.sum(-1) if kl.dim() == 2 else kl
        return _reduced(c, log_p - beta * kl, log_p, kl)
    if c.entry == "beta_tc":
        whole, each = _aggregate(built, q, z)
        own = families.density(q, z)
        log_p = families.density(p, z)
        gamma = 0.5 if _is_stratified(c) else 1.5
        term = 0.5 * (own - whole) + 3.0 * (whole - each) + gamma * (each - log_p)
        return _reduced(c, (log_likelihood - r(term, absolute=1.0)).mean(0))
    value = oracle.BOUNDS[c.objective].value if c.entry == "bound" else oracle.lme
    return _reduced(c, value(log_w), log_likelihood.mean(0), -log_ratio.mean(0))


def _reduced(case: Case, bound: Tensor, log_likelihood: Any = None, kl: Any = None) -> dict[str, Tensor]:
    if case.terms:
        return {"value": bound, "log_likelihood": log_likelihood, "kl": kl}
    return {"value": bound if case.reduction == "none" else getattr(bound, case.reduction)()}


def _aggregate(built: Built, q: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return log q(z) and Σ log q(z_d) of this batch's mixture."""
    batch = built.case.batch
    weights = torch.full((batch, batch), -math.log(max(batch, 1)), dtype=torch.float64)
    if _is_stratified(built.case):
        size, others = 2 * batch + 1, batch - 1
        weights.fill_(-math.log(others))
        for b in range(batch):
            weights[b, b] = -math.log(size)
            weights[b, (b + 1) % batch] = math.log((size - others) / (size * others))
    if isinstance(q, torch.distributions.MultivariateNormal):
        variance = q.covariance_matrix.diagonal(dim1=-2, dim2=-1)
        marginal = torch.distributions.Normal(q.loc, variance.sqrt())
    else:
        marginal = q
    each = torch.logsumexp(marginal.log_prob(z.unsqueeze(2)) + weights[:, :, None], 2)
    return torch.logsumexp(families.density(q, z.unsqueeze(2)) + weights, 2), each.sum(-1)


def _is_stratified(case: Case) -> bool:
    return case.entry == "beta_tc" and case.batch > 1 and case.k % 2 == 0


def _gradients(
    built, results, log_w, log_likelihood, log_p, log_q, log_q_of_z, share, float16
) -> dict[str, Tensor]:
    """Return the gradients by autograd, or by an estimator's coefficients of each sample.

    With ``float16``, the gradients of decoder and prior are at least 2^-11 of the encoder's, as documented.
    """
    c = built.case
    learned = built.learned
    to_q = {n: t for n, t in learned.items() if n[0] == "q"}
    others = {n: t for n, t in learned.items() if n[0] != "q"}
    if c.entry == "log_weights":
        ratio = results["ratio"]
        loss = (_weights(built, log_likelihood) * log_likelihood + _weights(built, ratio, 1) * ratio).sum()
        if _log_weights_estimator(c) == "stl":
            stl = log_p - log_q_of_z + share
            through = (
                _weights(built, log_likelihood) * log_likelihood + _weights(built, ratio, 1) * stl
            ).sum()
            return _grad(loss, others) | _grad(through, to_q)
        return _grad(loss, learned)
    value = _loss_scale(c) * results["value"]
    loss = (_weights(built, value) * value).sum()
    estimator = c.encoder or (c.estimator if c.entry in ("iwae", "bound") else "iwae")
    if estimator == "iwae":
        return _grad(loss, learned)
    scale = _weights(built, value) if value.dim() else torch.ones(c.batch, dtype=value.dtype)
    scale = _loss_scale(c) * scale
    if value.dim() == 0 and c.reduction == "mean":
        scale = scale / c.batch
    objective = bound = oracle.BOUNDS[c.objective].value if c.entry == "bound" else oracle.lme
    if c.encoder:
        _, bound, estimator = oracle.ENCODERS[c.encoder]
    a, s = oracle.shares(bound, log_w, estimator)
    if float16:
        g, _ = oracle.shares(objective, log_w, "iwae")
        least = torch.copysign(2.0**-11 * a.abs(), g)
        loss = (scale * torch.where(g.abs() < least.abs(), least, g) * log_w).sum()
    through = log_likelihood + log_p - log_q_of_z + share
    surrogate = (scale * (a * through)).sum()
    if bool(s.any()):
        surrogate = surrogate + (scale * s * (log_q - log_q_of_z)).sum()  # q's density at a fixed z
    return _grad(loss, others) | _grad(surrogate, to_q)


def _loss_scale(case: Case) -> float:
    """Return a loss factor that keeps a float16 decoder's gradients of small shares from underflow."""
    by_sample = case.encoder or (case.estimator == "dreg" and case.entry in ("iwae", "bound"))
    return 64.0 if by_sample and torch.float16 in (case.net_dtype, *case.q_dtypes) else 1.0


def _grad(loss: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor]:
    if not of:
        return {}
    if not loss.requires_grad:
        return {f"grad {n}": torch.zeros_like(t).double() for n, t in of.items()}
    for t in of.values():
        t.grad = None
    loss.backward(retain_graph=True)  # needed by reentrant checkpoints
    return {
        f"grad {n}": torch.zeros_like(t).double() if t.grad is None else t.grad.double().clone()
        for n, t in of.items()
    }


def results_of(built: Built) -> dict[str, Tensor]:
    """Return the library's results and their gradients."""
    c = built.case
    torch.manual_seed(c.index)
    run = call
    if c.compiled:
        torch._dynamo.reset()
        run = torch.compile(call, backend=c.compiled)
    with built.around():
        return _with_gradients(built, run(built))


def _with_gradients(built: Built, found: dict[str, Tensor]) -> dict[str, Tensor]:
    c = built.case
    if c.entry in MEASURING:
        return found
    value = _loss_scale(c) * found["value"]
    loss = (_weights(built, value) * value).sum()
    if c.entry == "log_weights":
        loss = loss + (_weights(built, found["ratio"], 1) * found["ratio"]).sum()
    learned = built.learned
    if not learned:
        return found
    if loss.requires_grad:
        for t in learned.values():
            t.grad = None
        loss.backward()
    return found | {
        f"grad {n}": torch.zeros_like(t) if t.grad is None else t.grad for n, t in learned.items()
    }


def compare(
    case: Case, found: dict[str, Tensor], exact: dict[str, Tensor], shaken: list[dict[str, Tensor]]
) -> list[str]:
    """Return the errors found, a line each."""
    wrong = []
    for name, e in exact.items():
        f = found[name].detach()
        if f.shape != e.shape:
            wrong.append(f"{name}: shape {list(f.shape)}, expected {list(e.shape)}")
            continue
        if name[:4] != "grad" and f.dtype not in (torch.float32, torch.float64):
            wrong.append(f"{name}: dtype {f.dtype}")
        if not e.numel():
            continue
        e = e.detach()
        moved = [(s[name].detach() - e).abs().amax() for s in shaken]
        bound = TIMES * float(torch.stack(moved).amax().nan_to_num(nan=math.inf))
        info = torch.finfo(f.dtype)
        bound += 4 * info.eps * float(e.abs().amax()) + 64 * info.smallest_normal
        off = (f.double() - e).abs()
        off = torch.where((f.double() == e) | (f.isnan() & e.isnan()), 0.0, off)
        # Results, or terms that cancel in them, beyond the largest number: one roundoff of a term moves the
        # result by roundoff times the term.
        overflows = bound >= TIMES * info.eps * info.max
        off = torch.where(((e.abs() >= 0.9 * info.max) | overflows) & ~f.isfinite(), 0.0, off)
        if math.isfinite(bound) and not bool((off <= bound).all()) and bool(e.isfinite().all()):
            at = int(off.nan_to_num(nan=math.inf).argmax())
            wrong.append(
                f"{name}: got {f.flatten()[at]:.9g}, expected {e.flatten()[at]:.9g} ± {bound:.2g}, "
                f"off by {off.flatten()[at]:.2g}"
            )
    return wrong


def unit_of(case: Case) -> float:
    """Return the unit roundoff of the computation: float64's if all tensors are float64."""
    all_wide = (
        case.backend != "triton"
        and case.prior != "td number"
        and {*case.q_dtypes, case.net_dtype, case.prior_dtype} == {torch.float64}
    )
    wide = all_wide and (case.x_dtype == torch.float64 or not case.x_dtype.is_floating_point)
    wide = (
        wide
        and case.decoder not in ("float", "autocast")
        and not case.size
        and not case.likelihood.endswith("learned")
    )
    # The formula has as many float64 roundings as the library, whose polynomials have a few more.
    return 32 * torch.finfo(torch.float64).eps if wide else torch.finfo(torch.float32).eps


def outcome(case: Case) -> tuple[str, str]:
    """Return ``("ok", "")``, ``("refused", message)`` or ``("failed", errors)``."""
    validated = torch.distributions.Distribution.set_default_validate_args
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(fastvae.use_backend(case.backend))
        stack.callback(validated, True)
        validated(case.batch > 0)  # torch's own checks fail for empty tensors
        try:
            found = results_of(Built(case))
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:300]}".replace("\n", " ")
            known = isinstance(error, (ValueError, TypeError)) and any(re.search(p, text) for p in REFUSED)
            return ("refused" if known else "failed"), text
        drawn = draws(Built(case))
        noise = low_rank_noise(Built(case)) if case.q == "low rank" else None
        validated(False)
        exact = expected(Built(case), drawn, noise, Arithmetic())
        shaken = [_shaken(case, drawn, noise, torch.Generator().manual_seed(i)) for i in range(SAMPLES)]
    wrong = compare(case, found, exact, shaken)
    return ("failed", "; ".join(wrong)) if wrong else ("ok", "")


def _shaken(case: Case, drawn: Any, noise: Any, generator: torch.Generator) -> dict[str, Tensor]:
    oracle._signs = lambda t: (2 * torch.rand(t.shape, dtype=t.dtype, generator=generator) - 1) * 2
    return expected(Built(case), drawn, noise, Arithmetic(unit_of(case)))
