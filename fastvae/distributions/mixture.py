"""Mixtures: of normal distributions, of posteriors of pseudo-inputs or data, and of any distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

from .. import ops, random
from ..core.checks import check_count, check_tensor, shape_of
from ..ops.mixture import check_components
from ..ops.op import accumulator
from .base import Distribution, hold, is_family, is_real
from .covariance import FullNormal, LowRankNormal
from .normal import DiagonalNormal

# Elements of [N, U, D] computed at a time without a fused op.
MOST = 1 << 22


class _Components(Distribution):
    """Prior with many components, p(z) = Σ_u π_u p_u(z)."""

    logits: Tensor | None

    def _parts(self) -> Sequence[Distribution]:
        """Return distributions with rows, whose concatenation is the components."""
        raise NotImplementedError

    def _weights(self, like: Tensor, count: int) -> Tensor:
        """Return log π [U]."""
        if self.logits is None:
            return like.new_full((count,), -math.log(count))
        if len(self.logits) != count:
            raise ValueError(
                f"logits has shape {shape_of(self.logits)}, but there are {count} components; expected [U] = "
                f"[{count}]"
            )
        return torch.log_softmax(self.logits.to(like.dtype), 0)

    def log_prob(self, z: Tensor) -> Tensor:
        parts = self._parts()
        rows, found = z.reshape(-1, z.shape[-1]), []
        for part in parts:
            size = max(1, MOST // max(1, part.batch * z.shape[-1]))
            pieces = (piece[:, None].expand(-1, part.batch, -1) for piece in rows.split(size))
            found.append(torch.cat([part.log_prob(piece) for piece in pieces]))
        scores = torch.cat(found, 1)
        return torch.logsumexp(scores + self._weights(scores, scores.shape[1]), 1).reshape(z.shape[:-1])

    def sample(
        self,
        n: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        parts = self._parts()
        where, count = parts[0].device, sum(part.batch for part in parts)
        weights = self._weights(torch.empty((), device=where), count).detach().exp()
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
        seed = random.draw_seed(where, generator)
        z, first = None, 0
        for part in parts:
            for u in torch.unique(chosen[(chosen >= first) & (chosen < first + part.batch)]).tolist():
                row = part.rows(u - first, u - first + 1)
                if row is None:
                    raise NotImplementedError(
                        f"the components are of the family {type(part).__name__}, whose rows(start, stop) is "
                        "not implemented; drawing from the mixture needs it"
                    )
                places = (chosen == u).nonzero()[:, 0]
                draws = row.rsample(len(places), seed, row_offset=u)[0][:, 0]
                z = draws.new_empty(n, draws.shape[1]) if z is None else z
                z[places] = draws
            first += part.batch
        if z is None or z.shape[1] != dim:
            d = "none" if z is None else z.shape[1]
            raise ValueError(f"the prior has D = {d}, but z [{n}, {dim}] was asked for")
        return z


class NormalMixture(_Components, nn.Module):  # type: ignore[misc]
    r"""Mixture of diagonal normal distributions, as a prior, fixed or learned.

    .. math:: p(z) = \sum_u π_u\, N(z; μ_u, \operatorname{diag} e^{\mathrm{logvar}_u})

    Args:
        mu, logvar: means and log variances of the components, [U, D] each; ``nn.Parameter`` if learned.
        logits: π = softmax(logits), [U]. Default: equal weights.

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.

    References:
        Dilokthanakul et al., Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders,
        2016.

    Example:
        >>> import torch, fastvae
        >>> mu, logvar, logits = (torch.nn.Parameter(t) for t in (torch.randn(9, 3), torch.zeros(9, 3),
        ...                                                       torch.zeros(9)))
        >>> prior = fastvae.NormalMixture(mu, logvar, logits)
        >>> vae = fastvae.VAE(torch.nn.Linear(7, 6), torch.nn.Linear(3, 7), likelihood="bernoulli",
        ...                   prior=prior)
        >>> (-vae.iwae(torch.rand(4, 7), k=5)).backward()
        >>> mu.grad.shape
        torch.Size([9, 3])
    """

    mu: Tensor
    logvar: Tensor

    def __init__(self, mu: Tensor, logvar: Tensor, logits: Tensor | None = None):
        super().__init__()
        check_components(mu, logvar, logits)
        hold(self, mu=mu, logvar=logvar, logits=logits)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.mu.device

    @property
    def has_rows(self) -> bool:
        return False

    def log_prob(self, z: Tensor) -> Tensor:
        return ops.mixture_log_prob(z, self.mu, self.logvar, self.logits)

    def _parts(self) -> Sequence[Distribution]:
        return [DiagonalNormal(self.mu, self.logvar)]


class _Rows(_Components):
    """Mixture of the rows of posteriors of other families."""

    def __init__(self, parts: list[Distribution], logits: Tensor | None):
        super().__init__()
        self.parts = tuple(parts)
        hold(self, logits=logits)

    def _parts(self) -> Sequence[Distribution]:
        return self.parts

    @property
    def reaches_others(self) -> bool:
        return any(part.reaches_others for part in self._parts())


def mixture_of_rows(parts: list[Distribution], logits: Tensor | None) -> NormalMixture | _Rows:
    """Return the mixture of the concatenated rows of posteriors."""
    pairs = [part._wide() for part in parts if is_family(part, DiagonalNormal)]
    if len(pairs) < len(parts):
        return _Rows(parts, logits)
    mu, logvar = (t[0] if len(t) == 1 else torch.cat(t) for t in zip(*pairs, strict=True))
    return NormalMixture(mu, logvar, logits)


def log_aggregate(parts: list[Distribution], z: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return log q(z) [...] of z [..., D], and the marginals log q(z_d) [..., D].

    q is the equally weighted mixture of all rows of posteriors. The marginals are known for normal
    distributions, and are None otherwise. Each dimension is a separate mixture, D calls: evaluating all
    pairs at once, [N, U, D], takes twice the time with D = 10 and 128 rows, 25 times with D = 50 and 512.
    """
    if not sum(q.batch for q in parts):
        return z.sum(-1), z  # no rows: z is empty
    whole = mixture_of_rows(parts, None).log_prob(z)
    moments = [_marginals(q) for q in parts]
    known = [m for m in moments if m is not None]
    if len(known) < len(moments):
        return whole, None
    mu, logvar = (torch.cat(m) if len(m) > 1 else m[0] for m in zip(*known, strict=True))
    columns = zip(*(t.split(1, -1) for t in (z, mu, logvar)), strict=True)
    return whole, torch.stack([ops.mixture_log_prob(*column) for column in columns], -1)


def _marginals(q: Distribution) -> tuple[Tensor, Tensor] | None:
    """Return mean and log variance of each dimension [B, D], or None if q is not normal."""
    if is_family(q, DiagonalNormal):
        return q._wide()
    if is_family(q, FullNormal):
        mu, scale, _ = q._parts()
        return mu, scale.square().sum(-1).log()
    if is_family(q, LowRankNormal):
        mu, logvar, factor = q._wide()
        return mu, (logvar.exp() + factor.square().sum(-1)).log()
    return None


class _Encoded(Distribution, nn.Module):  # type: ignore[misc]
    """Mixture of the posteriors of inputs that the prior stores."""

    encoder: Any
    logits: Tensor | None

    def __init__(self, encoder: Callable[..., Any], logits: Tensor | None):
        super().__init__()
        if not callable(encoder):
            raise TypeError(
                "encoder must be a module or another callable, x -> q(z|x), got " + type(encoder).__name__
            )
        self.encoder = encoder
        if logits is not None:
            check_tensor("logits", logits, 1, "[U]")
        hold(self, logits=logits)

    def _inputs(self) -> Iterator[Any]:
        """Yield the inputs batch by batch."""
        raise NotImplementedError

    def prepared(self) -> Distribution:
        from .read import as_posterior

        name, parts = self.family.__name__, []
        for x in self._inputs():
            try:
                parts.append(as_posterior(self.encoder(x)))
            except Exception as error:
                if hasattr(error, "add_note"):  # Python 3.11
                    given = shape_of(x) if isinstance(x, Tensor) else type(x).__name__
                    error.add_note(f"fastvae.{name} gave the encoder inputs of its own, {given}")
                raise
        made = mixture_of_rows(parts, self.logits)
        made.__dict__["made_by"] = name
        return made

    def log_prob(self, z: Tensor) -> Tensor:
        return self.prepared().log_prob(z)

    def sample(
        self,
        n: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return self.prepared().sample(n, dim, device=device, generator=generator)


class VampPrior(_Encoded):
    r"""Variational mixture of posteriors (VampPrior): a mixture of q(z|u) over U learned pseudo-inputs.

    .. math:: p(z) = \sum_u π_u\, q(z | u_u)

    An objective encodes the pseudo-inputs once, whatever its number of draws and chunks; an evaluation
    encodes them once for the whole data set.

    Args:
        encoder: the VAE's encoder, x -> q in a form that :func:`fastvae.elbo` accepts.
        pseudo_inputs: [U, \*event], ``nn.Parameter`` if learned; or a module (or another callable) without
            arguments that returns them, such as one that keeps them within [0, 1].
        logits: π = softmax(logits), [U]. Default: equal weights.

    Raises:
        TypeError, ValueError: for invalid arguments.

    References:
        Tomczak & Welling, VAE with a VampPrior, 2018, eq. 9.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(7, 6), torch.nn.Linear(3, 7)
        >>> prior = fastvae.VampPrior(encoder, torch.nn.Parameter(torch.rand(9, 7)))
        >>> vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli", prior=prior, latent_dim=3)
        >>> (-vae.elbo(torch.rand(4, 7), kl="mc")).backward()
        >>> vae.sample(2).shape
        torch.Size([2, 7])
    """

    pseudo_inputs: Any

    def __init__(self, encoder: Callable[..., Any], pseudo_inputs: Any, logits: Tensor | None = None):
        super().__init__(encoder, logits)
        if isinstance(pseudo_inputs, Tensor):
            check_tensor("pseudo_inputs", pseudo_inputs)
            if pseudo_inputs.dim() < 2 or not len(pseudo_inputs):
                raise ValueError(
                    f"pseudo_inputs has shape {shape_of(pseudo_inputs)}; expected [U, *event], inputs of the "
                    "encoder, at least one"
                )
            hold(self, pseudo_inputs=pseudo_inputs)
        elif callable(pseudo_inputs):
            self.pseudo_inputs = pseudo_inputs
        else:
            raise TypeError(
                "pseudo_inputs must be a tensor [U, *event] or a callable that returns one, got "
                f"{type(pseudo_inputs).__name__}"
            )

    def _inputs(self) -> Iterator[Any]:
        yield self.pseudo_inputs if isinstance(self.pseudo_inputs, Tensor) else self.pseudo_inputs()


class AggregatePosterior(_Encoded):
    r"""Aggregate posterior of a data set, as a prior or for inspection.

    .. math:: q(z) = \frac{1}{N} \sum_n q(z | x_n)

    Among all priors it maximises the ELBO, and it overfits: use it as a diagnostic
    (:func:`fastvae.diagnostics.latents`). An objective encodes the whole data set in every call, an
    evaluation once.

    Args:
        encoder: the VAE's encoder, x -> q in a form that :func:`fastvae.elbo` accepts.
        data: [N, \*event].
        batch_size: number of examples encoded at a time.

    Raises:
        TypeError, ValueError: for invalid arguments.

    References:
        Hoffman & Johnson, ELBO surgery, 2016; Makhzani et al., Adversarial Autoencoders, 2015.

    Example:
        >>> import torch, fastvae
        >>> encoder = torch.nn.Linear(7, 6)
        >>> fastvae.AggregatePosterior(encoder, torch.rand(40, 7)).log_prob(torch.zeros(5, 4, 3)).shape
        torch.Size([5, 4])
    """

    data: Tensor

    def __init__(self, encoder: Callable[..., Any], data: Tensor, *, batch_size: int = 1000):
        super().__init__(encoder, None)
        check_tensor("data", data)
        if data.dim() < 2 or not len(data):
            raise ValueError(f"data has shape {shape_of(data)}; expected [N, *event], at least one example")
        self.batch_size = check_count("batch_size", batch_size, "the examples that are encoded at a time")
        # Excluded from checkpoints.
        self.register_buffer("data", data, persistent=False)

    def _inputs(self) -> Iterator[Any]:
        yield from self.data.split(self.batch_size)


class Mixture(Distribution):
    r"""Mixture of a few distributions of any families, as a posterior or a prior.

    .. math:: q(z|x) = \sum_c π_c(x)\, q_c(z|x)

    A posterior's draws are stratified: they cycle through the C components, starting at one that the seed
    chooses. A draw from component c has weight C π_c, so that gradients reach the logits, too, and is
    evaluated under the mixture's density. The weights are unbiased for any number of samples; a multiple of C
    draws equally often from each component. Components that are the same for all examples, such as the prior,
    make it a defensive proposal, whose weights are bounded.

    ``estimator="dreg"`` raises: its identity holds for draws from q itself. The ELBO that
    :func:`fastvae.evaluate` reports weights the components equally: it is a lower bound, too.

    Args:
        components: C distributions, in any form that :func:`fastvae.elbo` accepts for q or for the prior.
        logits: π = softmax(logits): [B, C] for a posterior, or [C]. Default: equal weights.

    Raises:
        TypeError, ValueError: for invalid components or logits.

    References:
        Morningstar et al., Automatic Differentiation Variational Inference with Mixtures, 2021, eq. 6 and 8;
        Hesterberg, Weighted average importance sampling and defensive mixture distributions, 1995.

    Example:
        >>> import torch, fastvae
        >>> x, decoder = torch.ones(4, 7), torch.nn.Linear(3, 7)
        >>> near, wide = (torch.zeros(4, 3), torch.zeros(4, 3)), fastvae.StandardNormal()
        >>> q = fastvae.Mixture([near, wide], torch.tensor([2.0, 0.0]))
        >>> fastvae.iwae(x, q, decoder, k=10, likelihood="bernoulli").shape
        torch.Size([])
    """

    logits: Tensor | None

    def __init__(self, components: Sequence[Any], logits: Tensor | None = None):
        from .read import as_component

        super().__init__()
        if not isinstance(components, (list, tuple)) or not components:
            raise TypeError(
                "components must be a list of distributions, at least one; got "
                f"{'an empty one' if components in ([], ()) else type(components).__name__}"
            )
        self.components: tuple[Distribution, ...] = tuple(as_component(c) for c in components)
        for i, component in enumerate(self.components):
            if isinstance(self, nn.Module) and isinstance(component, nn.Module):
                self.add_module(f"component_{i}", component)
        count = len(components)
        batches = {c.batch for c in self.components if c.has_rows} - {1}
        if len(batches) > 1:
            raise ValueError(f"the components are of {sorted(batches)} examples; expected the same B of all")
        if logits is not None:
            check_tensor("logits", logits)
            shapes = [[count], *([b, count] for b in batches or {1})]
            if list(logits.shape) not in shapes:
                raise ValueError(
                    f"logits has shape {shape_of(logits)} for {count} components; expected [C] or [B, C], "
                    f"one of {shapes}"
                )
        hold(self, logits=logits)

    def _first(self) -> Distribution:
        """Return the first component among those with the most rows."""
        found: Distribution | None = None
        for c in self.components:
            if c.has_rows and (found is None or c.batch > found.batch):
                found = c
        assert found is not None
        return found

    @property
    def strata(self) -> int:  # type: ignore[override]
        return len(self.components)

    @property
    def has_rows(self) -> bool:
        return any(c.has_rows for c in self.components)

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self._first().batch

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._first().device

    @property
    def support(self) -> Any:
        supports = [c.support for c in self.components]
        return td.constraints.real if any(is_real(s) for s in supports) else supports[0]

    @property
    def z_dtype(self) -> torch.dtype | None:  # type: ignore[override]
        found = {c.z_dtype for c in self.components}
        return found.pop() if len(found) == 1 else None

    @property
    def per_row(self) -> bool:  # type: ignore[override]
        by_row = self.logits is not None and self.logits.dim() == 2
        return by_row or any(c.per_row for c in self.components)

    @property
    def reaches_others(self) -> bool:
        return any(c.reaches_others for c in self.components)

    @property
    def mean(self) -> Tensor | None:  # type: ignore[override]
        known = [c.mean for c in self.components]
        means = [m for m in known if m is not None]
        if len(means) < len(known):
            return None
        shares = self._log_weights(means[0]).exp().unbind(-1)
        return torch.stack([s[..., None] * m for s, m in zip(shares, means, strict=True)]).sum(0)

    def _log_weights(self, like: Tensor) -> Tensor:
        """Return log π, [C] or [B, C]."""
        if self.logits is None:
            return like.new_full((self.strata,), -math.log(self.strata))
        return torch.log_softmax(self.logits.to(like.dtype), -1)

    def log_prob(self, z: Tensor) -> Tensor:
        values = torch.stack([c.log_prob(z) for c in self.components], -1)
        return torch.logsumexp(values + self._log_weights(values), -1)

    def prepared(self) -> Distribution:
        parts = [c.prepared() for c in self.components]
        return self if all(a is b for a, b in zip(parts, self.components, strict=True)) else self._of(parts)

    def _of(self, parts: list[Distribution], logits: Any = ...) -> Mixture:
        return Mixture(parts, self.logits if logits is ... else logits)

    def _turns(self, samples: int, seed: Tensor, sample_offset: int) -> tuple[Tensor, Tensor | int]:
        """Return each sample's turn, whose remainder by C is its component, and its randomisation's index.

        Turns start where the seed says, and are counted separately in each randomisation.
        """
        numbers = torch.arange(sample_offset, sample_offset + samples, device=seed.device)
        if not seed.dim():
            return numbers + torch.remainder(seed, self.strata), 0
        turn = torch.remainder(numbers, seed.shape[0])
        return numbers // seed.shape[0] + torch.remainder(seed, self.strata)[turn], turn

    def rsample(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        count, batch = self.strata, self.batch
        # Draw from each component the range that any seed could select, in each randomisation.
        r = random.randomisations_of(seed) or 1
        first = sample_offset // r // count
        last = ((sample_offset + samples - 1) // r + count - 1) // count
        parts, like = [], None
        for c in sorted(range(count), key=lambda c: not self.components[c].has_rows):
            component = self.components[c]
            if not component.has_rows or component.batch < batch:
                assert like is not None or component.has_rows  # components with rows come first
                component = component.expand(batch, component.rsample(1, seed)[0] if like is None else like)
            z, _ = component.rsample(
                r * (last - first + 1), _derived(seed, c), sample_offset=r * first, row_offset=row_offset
            )
            like = z
            parts.append((c, z))
        turns, randomisation = self._turns(samples, seed, sample_offset)
        places = torch.remainder(turns, count) * (last - first + 1) + turns // count - first
        places = r * places + randomisation
        z = torch.cat([z for _, z in sorted(parts, key=lambda p: p[0])]).index_select(0, places)
        return z, self.log_prob(z)

    def log_shares(self, samples: int, seed: Tensor, *, sample_offset: int = 0) -> Tensor:
        dtype = torch.float32 if self.logits is None else accumulator(self.logits.dtype)
        weights = self._log_weights(torch.empty((), dtype=dtype, device=seed.device)) + math.log(self.strata)
        chosen = torch.remainder(self._turns(samples, seed, sample_offset)[0], self.strata)
        return weights.mT[chosen] if weights.dim() == 2 else weights[chosen][:, None]

    def sample(
        self,
        n: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        draws = [c.sample(n, dim, device=device, generator=generator) for c in self.components]
        weights = self._log_weights(draws[0]).detach().exp()
        if weights.dim() != 1:
            raise ValueError(
                f"the prior's logits are of rows, {shape_of(weights)}; drawing from it needs [C]"
            )
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
        return torch.stack(draws, 1)[torch.arange(n, device=chosen.device), chosen]

    def rows(self, start: int, stop: int) -> Mixture | None:
        if not is_family(self, Mixture):
            return None
        parts = [c.rows(start, stop) if c.has_rows and c.batch > 1 else c for c in self.components]
        known = [p for p in parts if p is not None]
        by_row = self.logits is not None and self.logits.dim() == 2
        logits = self.logits[start:stop] if by_row else self.logits  # type: ignore[index]
        return Mixture(known, logits) if len(known) == len(parts) else None


def _derived(seed: Tensor, number: int) -> Tensor:
    """Return a distinct seed for each number (multiplier of Knuth's MMIX)."""
    return seed * 6364136223846793005 + 1442695040888963407 * (number + 1) % 2**63
