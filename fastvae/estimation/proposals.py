r"""Proposal distributions for :func:`fastvae.log_marginal` and :func:`fastvae.evaluate`, ``proposal=``.

Any density r that is positive wherever p(x, z) is can be used: with :math:`w = p(x, z) / r(z)`, the mean of K
weights is an unbiased estimate of p(x), and its error depends on how well r approximates p(z|x).
``"posterior"`` is q, ``"defensive"`` takes a share of the draws from the prior, which bounds the weights, and
``"adapted"`` fits a proposal to each example during sampling.

A name selects an object with its defaults: ``proposal="defensive"`` is ``fastvae.proposals.Defensive()``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.checks import check_count, check_number
from ..core.hints import did_you_mean
from ..distributions import Distribution
from ..distributions.draws import check_everywhere, describe
from ..distributions.stratified import StratifiedMixture, expanded_at_address
from ..inputs.batch import Inputs
from .adaptive import AdaptedDraws, Fit
from .draws import Alone, Draws, Sharing, example_of, with_latent_of
from .pareto import tail_length
from .refined import NoDerivative, Settings, begin
from .stream import Chunks

__all__ = ["Adapted", "Defensive", "Posterior", "Proposal", "Refined"]

# Draws from q before the first fit.
_FIRST = 64
# Latents up to which a refined proposal is adapted, too: the moments of more need more draws.
_MOST_ADAPTED = 16
# Relative variance of the weights below which a refined proposal is not adapted.
_NORMAL = 1.0


class Proposal:
    """Base class of the proposals below; not for subclassing by users, who pass their posterior as q."""

    def of(self, q: Distribution, prior: Distribution) -> Distribution:
        """Return the distribution to draw from, for this posterior and prior.

        Raises:
            TypeError, ValueError: for a posterior or a prior that this proposal does not support.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is the base of proposals, and has none itself; use one of "
            "fastvae.proposals, such as Defensive()"
        )

    def draws(
        self,
        inputs: Inputs,
        seed: Tensor,
        row_offset: int,
        k: int,
        chunks: Chunks,
        tail: int,
        ranks: Sharing | None = None,
    ) -> Draws:
        """Return the draws for a batch, at most k per example.

        Args:
            inputs: the batch and its distributions.
            seed: seed of the noise, int64 [], or [R] for R randomisations.
            row_offset: index of the first row in the noise's address.
            k: maximum number of draws per example.
            chunks: number of draws per chunk.
            tail: number of largest weights to store.
            ranks: processes that share each example's draws. Default: None, this process alone.
        """
        r = self.of(inputs.q, inputs.prior)
        made = inputs._replace(q=with_latent_of(inputs.q, r))
        return Draws(made, seed, row_offset, chunks, tail, ranks or Alone(), r is inputs.q)


@dataclass(frozen=True)
class Posterior(Proposal):
    """Posterior q(z|x) as the proposal, the default.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.ones(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> options = {"k": 50, "likelihood": "bernoulli"}
        >>> options["proposal"] = fastvae.proposals.Posterior()
        >>> fastvae.log_marginal(x, q, decoder, **options).log_px.shape
        torch.Size([4])
    """

    def of(self, q: Distribution, prior: Distribution) -> Distribution:
        return q


@dataclass(frozen=True)
class Defensive(Proposal):
    r"""Mixture of q and the prior: :math:`r = (1 - s)\, q(z|x) + s\, p(z)`.

    The weights are bounded by :math:`\max_z p(x|z) / s`. In few dimensions the prior's draws may find a mode
    of p(z|x) that q misses. The draws are stratified: one of every 1/s consecutive draws comes from the
    prior, within each randomisation for ``noise="qmc"``. All weights are relative to the mixture's density.

    The prior must support draws at an address: N(0, I), a normal or another location-scale family of
    fastvae's, or a torch distribution with a quantile function; not a VampPrior, a NormalMixture or a
    Hierarchy.

    Args:
        share: s, the prior's share of the draws, between 0.01 and 0.99, rounded to hundredths. Default 0.1.

    Raises:
        TypeError, ValueError: if share is not a number between 0.01 and 0.99.

    References:
        Hesterberg, Weighted average importance sampling and defensive mixture distributions, 1995.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.ones(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> options = {"k": 50, "likelihood": "bernoulli"}
        >>> options["proposal"] = fastvae.proposals.Defensive(0.2)
        >>> fastvae.log_marginal(x, q, decoder, **options).log_px.shape
        torch.Size([4])
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0.01 <= check_number("share", self.share, "the prior's share of the draws") <= 0.99:
            raise ValueError(
                f"share must lie in 0.01 … 0.99, the prior's share of the draws; got {self.share!r}"
            )

    def of(self, q: Distribution, prior: Distribution) -> Distribution:
        _check_density("defensive", q)
        like = example_of(q)
        other = expanded_at_address(prior, q.batch, like)
        if other is None:
            raise ValueError(
                "proposal='defensive' needs a prior that can be drawn from at an address, which "
                f"{describe(prior)} cannot be: those of fastvae.distributions with parameters, such as "
                "NormalMixture or Flow, and torch's families with icdf can. Write the prior as one, or use "
                "another proposal, such as 'adapted'"
            )
        return StratifiedMixture([q, other], [1 - self.share, self.share], dtype=like.dtype)


@dataclass(frozen=True)
class Adapted(Proposal):
    r"""Adaptive proposal for each example, refitted to its weighted draws in rounds.

    The first 64 draws come from q. Then, at draws 64, 80, 100, 125, …, a quarter more each time, a
    multivariate Student t with a full covariance is fitted to the weighted moments of all draws so far, and
    the next round is drawn, stratified, from

    .. math:: r_t = s_q\, q + s_p\, p + (1 - s_q - s_p)\, t_ν(μ_t, Σ_t)

    until nine tenths of the draws (four fifths for small k) or ``most`` are reached; the rest come from the
    last fit. All draws enter the estimate

    .. math:: \hat p(x) = \sum_t c_t \sum_{k ∈ t} \frac{p(x, z_k)}{r_t(z_k)} \Big/ \sum_t c_t n_t,
              \quad c_t = t

    **Each draw is weighted by the mixture density of its round**, which depends only on earlier rounds, so
    :math:`\hat p(x)` is unbiased for any k, however good or bad the fits are (its log is low by half its
    relative variance, as always). Weighting early draws by densities that were fitted to them, as AMIS does,
    is consistent but biased: by 0.1 nats and more at k = 500 and D = 8 (docs/log.md). Later rounds have
    larger coefficients because their fits are better; ``stderr`` and ``ess`` account for this.

    If the first weights are degenerate the fit tempers them, :math:`w^a` with the largest a ≤ 1 that leaves
    an effective sample size of 3 D + 5. Correlations are shrunk by :math:`4 (D - 1) / (4 (D - 1) +
    \mathrm{ESS})`. An example whose weights have a relative variance below 0.01 has nothing to gain, and
    keeps q.

    It needs q's ``log_prob``, and latents on all of R^D. If the prior does not support draws at an address
    (a VampPrior, a Hierarchy, a torch distribution without a quantile function) its share goes to q. Memory:
    one number per draw that is fitted to, at most ``most`` per example, and matrices [B, D, D] in float64.
    The ELBO of q, as reported by :class:`fastvae.Evaluation`, is that of the first 64 draws.

    Args:
        posterior: :math:`s_q`, q's share of the draws. Default: max(0.1, D/(D + 50)) of the share not drawn
            from the prior: in many dimensions a good fit needs more draws than are available, and a good q
            must not be lost (docs/log.md).
        prior: :math:`s_p`, the prior's share, which finds modes that q misses, in few dimensions.
            Default 0.05.
        df: ν, an int. Default: max(8, D). In many dimensions heavier tails would cost more than they
            save: the radii of a t vary by :math:`1 / \sqrt{2ν}`, those of a normal by :math:`1 / \sqrt{2 D}`.
        scale: factor of the fitted standard deviations. Default: :math:`1 + 0.3 / \sqrt D`.
        most: maximum number of draws to fit to. Default 4000.

    Raises:
        TypeError, ValueError: for invalid numbers, or for shares that leave less than 0.01 for the fit.

    References:
        Oh & Berger, Adaptive Importance Sampling in Monte Carlo Integration, 1992; Owen & Zhou, Safe and
        Effective Importance Sampling, 2000, and The square root rule for adaptive importance sampling, 2020;
        Cornuet, Marin, Mira & Robert, Adaptive Multiple Importance Sampling, 2012.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.ones(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> options = {"k": 500, "likelihood": "bernoulli", "proposal": "adapted"}
        >>> fastvae.log_marginal(x, q, decoder, **options).log_px.shape
        torch.Size([4])
    """

    posterior: float | None = None
    prior: float = 0.05
    df: int | None = None
    scale: float | None = None
    most: int = 4000

    def __post_init__(self) -> None:
        _check_shares(self.posterior, self.prior)
        if self.df is not None:
            object.__setattr__(self, "df", check_count("df", self.df, "the degrees of freedom"))
        if self.scale is not None:
            _check_positive("scale", self.scale, "what the fitted standard deviations are multiplied by")
        most = check_count("most", self.most, "the draws that are fitted to at most")
        object.__setattr__(self, "most", most)

    def of(self, q: Distribution, prior: Distribution) -> Distribution:
        """Return q, the proposal of the first round, after validating q and the prior."""
        return _everywhere("adapted", q, prior)

    def rounds(self, k: int) -> list[int]:
        """Return the draw counts, out of k, at which the proposal is fitted."""
        found, stop = [], _FIRST
        # The last round, of equal coefficients, must be at least as long as the tail that k̂ is fitted to.
        while stop <= min(0.9 * k, k - tail_length(k), self.most):
            found.append(stop)
            stop += stop // 4
        return found

    def draws(
        self,
        inputs: Inputs,
        seed: Tensor,
        row_offset: int,
        k: int,
        chunks: Chunks,
        tail: int,
        ranks: Sharing | None = None,
    ) -> Draws:
        self.of(inputs.q, inputs.prior)
        fit = Fit(self.posterior, self.prior, self.df, self.scale, self.rounds(k))
        return AdaptedDraws(fit, inputs, seed, row_offset, chunks, tail, ranks or Alone())


@dataclass(frozen=True)
class Refined(Proposal):
    r"""Gaussian with a full covariance, fitted to each example's p(z|x) by gradients of the decoder.

    From q it takes natural-gradient steps towards the Gaussian that maximises the example's ELBO, with the
    Gauss–Newton matrix in place of the Hessian. Then it moves to the mean and covariance of p(z|x), by
    importance weights of the decoder's gradients (:mod:`fastvae.estimation.refined` has the formulas). The
    draws are stratified, from

    .. math:: r = s_q\, q + s_p\, p + (1 - s_q - s_p)\, N(m, c^2 Σ)

    The noise of the fit is independent of the draws, so that :math:`\hat p(x)` is unbiased. An example is
    drawn from N(m, Σ) alone if its weights there have a relative variance below 0.01, and are no larger at
    draws of the prior: for a linear decoder with Gaussian noise all weights are equal.

    The fit costs as much as ``steps · (3 draws_per_step + 2 D curvature_draws) + 3 moment_steps ·
    moment_draws`` draws of each example, and needs matrices [B, D, D] in float64. The decoder must be
    differentiable by z, in reverse and in forward mode; for others a RuntimeWarning says why, and the draws
    are those of ``"adapted"``, or with ``noise="qmc"`` q's. It needs q's ``log_prob``, and latents on all of
    R^D. If the prior does not support draws at an address its share goes to q. One Gaussian covers one mode:
    others are left to the shares of q and the prior.

    Args:
        steps: number of natural-gradient steps. Default 6. A step that lowers the ELBO is repeated at a third
            of its size, and an example that none improves keeps q's mean and variance.
        draws_per_step: draws per example for the ELBO and its gradient, rounded up to an even number.
            Default 8.
        curvature_draws: draws per example and step for the Gauss–Newton matrix. Default 2.
        moment_steps: number of steps towards the mean and covariance of p(z|x). Default 8.
        moment_draws: draws per example of such a step, rounded up to an even number. Default 128.
        diagonal: fit a diagonal covariance. Default False.
        posterior: :math:`s_q`, q's share of the draws. Default 0.05.
        prior: :math:`s_p`, the prior's share. Default 0.05.
        scale: c, factor of the fitted standard deviations. Default: :math:`1 + 0.4 / \sqrt D`.
        adapted: fit the proposal further, to the weighted draws, as :class:`Adapted` does from q, for
            examples whose weights have a relative variance above 1: their posteriors are not normal. Not
            for ``noise="qmc"``. Default: for at most 16 latents.

    Raises:
        TypeError, ValueError: for invalid numbers, or for shares that leave less than 0.01 for the fit.

    References:
        Opper & Archambeau, The Variational Gaussian Approximation Revisited, 2009; Khan & Nielsen, Fast yet
        Simple Natural-Gradient Descent for Variational Inference in Complex Models, 2018; Stein, Estimation
        of the Mean of a Multivariate Normal Distribution, 1981, lemma 1; Hesterberg, Weighted average
        importance sampling and defensive mixture distributions, 1995.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.ones(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> options = {"k": 500, "likelihood": "bernoulli", "proposal": "refined"}
        >>> fastvae.log_marginal(x, q, decoder, **options).log_px.shape
        torch.Size([4])
    """

    steps: int = 6
    draws_per_step: int = 8
    curvature_draws: int = 2
    moment_steps: int = 8
    moment_draws: int = 128
    diagonal: bool = False
    posterior: float = 0.05
    prior: float = 0.05
    scale: float | None = None
    adapted: bool | None = None

    def __post_init__(self) -> None:
        for name, meaning in _COUNTS.items():
            least = int(name != "moment_steps")
            object.__setattr__(self, name, check_count(name, getattr(self, name), meaning, least))
        _check_shares(self.posterior, self.prior)
        if self.scale is not None:
            _check_positive("scale", self.scale, "what the fitted standard deviations are multiplied by")

    def of(self, q: Distribution, prior: Distribution) -> Distribution:
        """Return q, from which the fit begins, after validating q and the prior."""
        return _everywhere("refined", q, prior)

    def draws(
        self,
        inputs: Inputs,
        seed: Tensor,
        row_offset: int,
        k: int,
        chunks: Chunks,
        tail: int,
        ranks: Sharing | None = None,
    ) -> Draws:
        self.of(inputs.q, inputs.prior)
        settings = Settings(
            self.steps,
            self.draws_per_step,
            self.curvature_draws,
            self.moment_steps,
            self.moment_draws,
            self.diagonal,
            self.posterior,
            self.prior,
            self.scale,
        )
        if not inputs.q.batch:  # nothing to fit
            return Posterior().draws(inputs, seed, row_offset, k, chunks, tail, ranks)
        adapts = self.adapted
        if adapts is None:
            adapts = example_of(inputs.q, row_offset).shape[1] <= _MOST_ADAPTED
        try:
            made, elbo = begin(settings, inputs, seed, row_offset, chunks)
        except NoDerivative as error:
            instead = "q's" if seed.dim() else "those of 'adapted'"
            warnings.warn(
                f"proposal='refined': {error}; the draws are {instead}", RuntimeWarning, stacklevel=2
            )
            fallback = Posterior() if seed.dim() else Adapted()
            return fallback.draws(inputs, seed, row_offset, k, chunks, tail, ranks)
        if adapts and not seed.dim():
            fit = Fit(None, self.prior, None, None, Adapted().rounds(k), _NORMAL)
            drawn: Draws = AdaptedDraws(fit, made, seed, row_offset, chunks, tail, ranks or Alone())
        else:
            drawn = Draws(made, seed, row_offset, chunks, tail, ranks or Alone(), False)
        drawn.elbo_of_q = elbo
        return drawn


_COUNTS = {
    "steps": "the steps of the fit",
    "draws_per_step": "the draws of a step",
    "curvature_draws": "the draws of a step's curvature",
    "moment_steps": "the steps towards the mean and covariance",
    "moment_draws": "the draws of such a step",
}
_NAMED: dict[str, Callable[[], Proposal]]
_NAMED = {
    "posterior": Posterior,
    "defensive": Defensive,
    "adapted": Adapted,
    "refined": Refined,
}


def as_proposal(proposal: Any, noise: str) -> Proposal:
    """Return the proposal for a name or an object of this module, and validate it for this kind of noise.

    Raises:
        TypeError, ValueError: for anything else, or a proposal that does not support the noise.
    """
    if isinstance(proposal, Proposal):
        if noise == "qmc" and isinstance(proposal, Adapted):
            raise ValueError(
                "proposal='adapted' is fitted between rounds, which together are not a point set; use "
                "noise='philox', or another proposal"
            )
        return proposal
    known = ", ".join(map(repr, _NAMED))
    if not isinstance(proposal, str):
        raise TypeError(
            f"proposal must be a name ({known}) or an object such as "
            f"fastvae.proposals.Defensive(share=0.1); got {proposal!r}"
        )
    if proposal not in _NAMED:
        raise ValueError(f"proposal={proposal!r} is unknown; known: {known}{did_you_mean(proposal, _NAMED)}")
    return as_proposal(_NAMED[proposal](), noise)


def _everywhere(name: str, q: Distribution, prior: Distribution) -> Distribution:
    """Return q, which must have a density and, like the prior, be over all of R^D."""
    _check_density(name, q)
    check_everywhere(f"proposal={name!r}", "another proposal", q, prior)
    return q


def _check_shares(posterior: float | None, prior: float) -> None:
    check_number("prior", prior, "a share of the draws")
    if posterior is not None:
        check_number("posterior", posterior, "a share of the draws")
    if (posterior or 0.0) + prior > 0.99:
        raise ValueError(
            f"posterior + prior must leave a share of the draws, 0.01 at least; got {posterior!r} + {prior!r}"
        )


def _check_positive(name: str, value: Any, meaning: str) -> None:
    if not check_number(name, value, meaning):
        raise ValueError(f"{name} must be greater than 0, {meaning}; got {value!r}")


def _check_density(name: str, q: Distribution) -> None:
    if type(q).log_prob is Distribution.log_prob:
        raise TypeError(
            f"proposal={name!r} needs the density of q at any z, but {describe(q)} has no log_prob; write "
            "one, or use proposal='posterior'"
        )
