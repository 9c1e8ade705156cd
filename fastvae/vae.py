"""Module VAE: an encoder, a decoder, a likelihood and a prior."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch import distributions as td
from typing_extensions import Unpack

from .core.checks import FLOATING, INTEGERS, check_choice, check_count
from .core.hints import teaches
from .core.nested import Conditioning, as_mask, called, decoded, each, repeat, tensors, where_observed
from .core.options import OBJECTIVES, Objective
from .distributions import Distribution, Hierarchy, as_posterior, as_prior
from .distributions.base import as_module
from .distributions.read import is_conditional
from .distributions.tensors import tensors_of
from .distributions.words import known_mean
from .estimation.audit.annealed import AnnealedMarginal, MarginalBounds, ais, bdmc
from .estimation.evaluation import Evaluation, evaluate
from .estimation.imputation import Imputation, check_mean, impute, posterior_mean
from .estimation.log_marginal import log_marginal as _log_marginal
from .estimation.log_marginal import reconstruction_log_prob as _reconstruction_log_prob
from .estimation.options import (
    AISOptions,
    BDMCOptions,
    EvaluateOptions,
    LogMarginalOptions,
    ReconstructionOptions,
)
from .estimation.refined import refined_posterior
from .estimation.stream import Chunks
from .estimation.weights import LogMarginal
from .inputs.batch import Inputs
from .inputs.functions import as_registered
from .inputs.last_layer import called_by, may_end_in_a_layer, run_to_last_layer
from .inputs.misread import look_at_structure
from .inputs.modules import check_modules, evaluating, is_known
from .likelihoods.base import Likelihood
from .likelihoods.read import as_likelihood
from .objectives.beta_tc import BetaTCTerms, beta_tc
from .objectives.bounds import Bound
from .objectives.elbo import elbo as _elbo
from .objectives.iwae import bound as _bound
from .objectives.iwae import iwae as _iwae
from .objectives.options import (
    BetaTCOptions,
    ElboOptions,
    IwaeOptions,
    QObjectiveOptions,
    SleepOptions,
    Terms,
)
from .objectives.wake_sleep import simulate, sleep
from .ops.head import FEWEST_NUMBERS
from .random import draw_seed

__all__ = ["VAE"]


class VAE(nn.Module):
    r"""Variational autoencoder: encoder, decoder, likelihood and prior in one module.

    Args:
        encoder: module x [B, \*event] -> q: a tensor [B, 2 D], mu and logvar concatenated, a pair (mu,
            logvar) or any other posterior that :func:`fastvae.elbo` takes, such as a convolutional encoder's
            [B, 2 C, H, W].
        decoder: module z [N, D] -> parameters of the likelihood; z is [N, C, H, W] for latents of that shape.
        likelihood: ``"gaussian"`` (default), ``"bernoulli"``, another name or an object.
        prior: an object such as ``fastvae.distributions.DiagonalNormal``, or a module context -> prior.
            Default: the :class:`fastvae.distributions.Hierarchy` inside the encoder, if it has one, else N(0,
            I).
        latent_dim: D, or (C, H, W). Default: read from the encoder's first output, and unknown to
            :meth:`sample` before that. If given, the encoder's outputs are validated against it, and
            torch.compile compiles only once.
        fuse: fuse the decoder's last layer into the objective or evaluation, so that its output is never
            stored, where this is unobservable and not slower: the decoder is an ``nn.Linear`` or an
            ``nn.Sequential`` that ends in one, without hooks, on a CPU, for outputs of some hundred thousand
            numbers or more. On a GPU, without gradients, the whole decoder is one kernel in half precision.
            Values and gradients agree to rounding. For other decoders use :class:`fastvae.FusedHead`. Default
            True.
        modules: all modules that encoder, decoder and prior reach where these are functions, lambdas or other
            callables, in any order, such as ``fastvae.VAE(lambda x: net(x)[0], decoder, modules=[net])``; an
            empty list if there are none. Parameters outside of modules are not trained by
            ``vae.parameters()``. Default: None, no such callables.

    Conditional models: with ``context=``, encoder and decoder are called with the context as their second
    argument, and a prior that is a function with the context alone.

    Encoder, decoder and prior may also be methods of modules, such as ``fastvae.VAE(net.encode,
    net.decode)``: their modules are registered as modules of the VAE, so that optimisers, ``state_dict``,
    ``.to()`` and ``.eval()`` find them. For any other callable ``modules`` names them. Inside a module that
    holds the VAE, pass the networks, ``fastvae.VAE(self.encoder, self.decoder)``, since methods of this
    module would make each a part of the other. As a member the VAE adds a second key for each of their
    parameters, ``vae.encoder.*``, which old checkpoints lack; a ``functools.cached_property`` that returns it
    adds none.

    Raises:
        TypeError, ValueError: for an invalid argument; for a function without ``modules``. ``train()``,
            ``state_dict()`` and the like raise if a method or function reaches the module that holds the VAE.

    Example:
        >>> import torch, fastvae
        >>> vae = fastvae.VAE(torch.nn.Linear(8, 4), torch.nn.Linear(2, 8), likelihood="bernoulli")
        >>> x = torch.rand(16, 8)
        >>> (-vae(x)).backward()
        >>> vae.sample(3).shape, vae.reconstruct(x).shape, vae.log_marginal(x, k=10).log_px.shape
        (torch.Size([3, 8]), torch.Size([16, 8]), torch.Size([16]))
    """

    # Modules, or functions that reach no module.
    encoder: Any
    decoder: Any
    # A distribution, or a function of the context.
    prior: Any
    latent_dim: int | tuple[int, ...] | None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "prior":  # may change from a module to another object
            self.__dict__.get("_modules", {}).pop(name, None)
        super().__setattr__(name, value)

    @teaches
    def __init__(
        self,
        encoder: Callable[..., Any],
        decoder: Callable[..., Any],
        *,
        likelihood: str | Likelihood = "gaussian",
        prior: Any = None,
        latent_dim: int | tuple[int, ...] | None = None,
        fuse: bool = True,
        modules: Sequence[nn.Module] | None = None,
    ):
        super().__init__()
        self.fuse = fuse
        reached = None if modules is None else check_modules(modules)
        for name, value in (("encoder", encoder), ("decoder", decoder)):
            if not callable(value):
                raise TypeError(f"{name} must be a module or another callable, got {type(value).__name__}")
            setattr(self, name, as_registered(name, value, self, reached, VAE))
        self.likelihood = as_likelihood(likelihood)
        # Another module may return a distribution, for which an activation is right: its first call tells.
        if isinstance(called_by(self.decoder), nn.Sequential):
            look_at_structure(self.decoder, self.likelihood)
        if isinstance(prior, td.Distribution) and any(t.requires_grad for t in tensors_of(prior)):
            raise TypeError(
                f"prior is a torch.distributions.{type(prior).__name__} with learned parameters, which a "
                "module does not register: they would not be trained. Use "
                "fastvae.distributions.DiagonalNormal(mu, logvar) "
                "with nn.Parameters, or a subclass of fastvae.distributions.Distribution with the "
                "parameters and a log_prob"
            )
        if prior is None:
            prior = self._own_prior()
        if is_conditional(prior):
            self.prior = as_registered("prior", prior, self, reached, VAE)
        else:
            self.prior = as_module(as_prior(prior))
        functions = encoder, decoder, *[prior] * is_conditional(prior)
        if reached and all([is_known(f) for f in functions]):
            raise TypeError(
                "modules names the modules that functions reach, but encoder, decoder and prior are modules "
                "or methods of modules; leave it out"
            )
        given = latent_dim is not None
        if latent_dim is None and isinstance(self.prior, Hierarchy):
            latent_dim = self.prior.dim
        self.latent_dim = None if latent_dim is None else _as_latent_dim(latent_dim)
        self._checks_latent_dim = given

    def extra_repr(self) -> str:
        # What was given, not what a batch showed: the repr is a part of a checkpoint's digest.
        known = [f"latent_dim={self.latent_dim}"] if self._checks_latent_dim else []
        return ", ".join([*known, *["fuse=False"] * (not self.fuse)])

    def forward(
        self, x: Any, objective: Objective | Bound = "elbo", **options: Any
    ) -> Tensor | Terms | BetaTCTerms | LogMarginal:
        """Call the method named by ``objective``, or :meth:`bound` for a bound object.

        Wrappers that act on a module's ``forward`` need this: ``DistributedDataParallel(vae)(x,
        objective="iwae", k=5)`` synchronises gradients, which ``ddp.module.iwae(x)`` does not.
        ``torch.compile(vae)``, ``torch.export`` and hooks need it as well.

        Args:
            x: data [B, *event]; for ``"sleep"`` the number of examples to simulate.
            objective: ``"elbo"`` (default), ``"iwae"``, ``"beta_tc"``, ``"sleep"``, ``"log_marginal"``, or a
                bound of :mod:`fastvae.bounds`. With DistributedDataParallel call ``"log_marginal"`` under
                ``torch.no_grad()``, since it computes no gradients, and set ``find_unused_parameters=True``
                for ``"sleep"``, since the decoder gets no gradient.
            options: keyword arguments of the method, such as ``k``, ``beta`` or ``reduction``. Processes with
                the same random state need ``row_offset``, see :func:`fastvae.elbo`, or they draw the same
                noise for different data.

        Raises:
            ValueError: for an unknown objective.
        """
        if isinstance(objective, Bound):
            return self.bound(x, objective, **options)  # type: ignore[no-any-return]
        check_choice("objective", objective, OBJECTIVES)
        return getattr(self, objective)(x, **options)  # type: ignore[no-any-return]

    def posterior(self, x: Any, context: Any = None) -> Distribution:
        """Return q(z|x), the encoder's output as a posterior object."""
        floating = type(x) is Tensor and x.dtype in FLOATING
        if not floating and any(t.dtype in INTEGERS for t in tensors(x)):
            self.likelihood.check(x)
            # The likelihood gets integer counts, the encoder gets them in the dtype of the parameters.
            dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
            x = each(lambda t: t.to(dtype) if t.dtype in INTEGERS else t, x)
        q = as_posterior(called("encoder", self.encoder, x, context))
        if self.latent_dim is None or self._checks_latent_dim:
            found = q.latent or q.known_dim
            if self.latent_dim is None:
                self.latent_dim = found
            elif found is not None:
                self._check_latent_dim(found)
        return q

    @overload
    def elbo(self, x: Any, *, terms: Literal[False] = False, **options: Unpack[ElboOptions]) -> Tensor: ...
    @overload
    def elbo(self, x: Any, *, terms: Literal[True], **options: Unpack[ElboOptions]) -> Terms: ...
    @overload
    def elbo(self, x: Any, *, terms: bool, **options: Unpack[ElboOptions]) -> Tensor | Terms: ...
    def elbo(self, x: Any, **options: Any) -> Tensor | Terms:
        """Return :func:`fastvae.elbo` of x; options are its keyword arguments.

        Options: ``k``, ``beta``, ``free_bits``, ``free_bits_per``, ``kl``, ``mask``, ``size_factor``,
        ``context``, ``reduction``, ``terms``, ``generator``, ``row_offset``, ``shared_noise``.
        """
        decoder = self._fused(x, options.get("k", 1), options)
        return _elbo(x, self._q(x, options), decoder, **self._meaning(), **options)  # type: ignore[no-any-return]

    @overload
    def iwae(
        self, x: Any, k: int = 50, *, terms: Literal[False] = False, **options: Unpack[IwaeOptions]
    ) -> Tensor: ...
    @overload
    def iwae(self, x: Any, k: int = 50, *, terms: Literal[True], **options: Unpack[IwaeOptions]) -> Terms: ...
    @overload
    def iwae(self, x: Any, k: int = 50, *, terms: bool, **options: Unpack[IwaeOptions]) -> Tensor | Terms: ...
    def iwae(self, x: Any, k: int = 50, **options: Any) -> Tensor | Terms:
        """Return :func:`fastvae.iwae` of x with k samples; options are its keyword arguments.

        Options: ``estimator``, ``k_chunk``, ``noise``, ``mask``, ``size_factor``, ``context``, ``reduction``,
        ``terms``, ``generator``, ``row_offset``, ``shared_noise``.
        """
        decoder = self._fused(x, options.get("k_chunk") or k, options)
        return _iwae(x, self._q(x, options), decoder, k=k, **self._meaning(), **options)  # type: ignore[no-any-return]

    @overload
    def bound(
        self,
        x: Any,
        objective: Bound,
        k: int = 50,
        *,
        terms: Literal[False] = False,
        **options: Unpack[QObjectiveOptions],
    ) -> Tensor: ...
    @overload
    def bound(
        self,
        x: Any,
        objective: Bound,
        k: int = 50,
        *,
        terms: Literal[True],
        **options: Unpack[QObjectiveOptions],
    ) -> Terms: ...
    @overload
    def bound(
        self, x: Any, objective: Bound, k: int = 50, *, terms: bool, **options: Unpack[QObjectiveOptions]
    ) -> Tensor | Terms: ...
    def bound(self, x: Any, objective: Bound, k: int = 50, **options: Any) -> Tensor | Terms:
        """Return :func:`fastvae.bound` of x with k samples; options are its keyword arguments.

        Options: ``q_objective``, ``k_chunk``, ``noise``, ``mask``, ``size_factor``, ``context``,
        ``reduction``, ``terms``, ``generator``, ``row_offset``, ``shared_noise``.
        """
        decoder = self._fused(x, options.get("k_chunk") or k, options)
        return _bound(  # type: ignore[no-any-return]
            x, self._q(x, options), decoder, objective, k=k, **self._meaning(), **options
        )

    @overload
    def beta_tc(
        self, x: Any, *, terms: Literal[False] = False, **options: Unpack[BetaTCOptions]
    ) -> Tensor: ...
    @overload
    def beta_tc(self, x: Any, *, terms: Literal[True], **options: Unpack[BetaTCOptions]) -> BetaTCTerms: ...
    @overload
    def beta_tc(self, x: Any, *, terms: bool, **options: Unpack[BetaTCOptions]) -> Tensor | BetaTCTerms: ...
    def beta_tc(self, x: Any, **options: Any) -> Tensor | BetaTCTerms:
        """Return :func:`fastvae.beta_tc` of x; options are its keyword arguments.

        Options: ``beta``, ``alpha``, ``gamma``, ``dataset_size``, ``sampling``, ``k``, ``mask``,
        ``size_factor``, ``context``, ``reduction``, ``terms``, ``generator``, ``row_offset``,
        ``shared_noise``.
        """
        decoder = self._fused(x, options.get("k", 1), options)
        return beta_tc(x, self._q(x, options), decoder, **self._meaning(), **options)  # type: ignore[no-any-return]

    def log_marginal(self, x: Any, k: int = 5000, **options: Unpack[LogMarginalOptions]) -> LogMarginal:
        """Return :func:`fastvae.log_marginal` of x with k samples; options are its keyword arguments.

        Options: ``k_chunk``, ``noise``, ``proposal``, ``mask``, ``size_factor``, ``context``, ``generator``,
        ``row_offset``, ``shared_noise``.

        The module stays in its current mode (train or eval).
        """
        # Not around the function, itself without gradients: torch cannot load the program exported from a
        # nested no_grad, whose last region is empty.
        with torch.no_grad():
            decoder, q = self._fused(x, k, options), self._q(x, options)
        return _log_marginal(x, q, decoder, k=k, **self._meaning(), **options)

    @torch.no_grad()
    def ais(self, x: Any, **options: Unpack[AISOptions]) -> AnnealedMarginal:
        """Return :func:`fastvae.audit.ais` of x; options are its keyword arguments.

        Options: ``k``, ``steps``, ``leapfrog``, ``start``, ``k_chunk``, ``mask``, ``size_factor``,
        ``context``, ``generator``, ``row_offset``.

        The module, its encoder included, is in eval mode meanwhile.
        """
        with evaluating([self]):
            return ais(x, self._q(x, options), self.decoder, modules=[self], **self._meaning(), **options)

    def bdmc(self, **options: Unpack[BDMCOptions]) -> MarginalBounds:
        """Return :func:`fastvae.audit.bdmc` of the model; options are its keyword arguments.

        Options: ``latent_dim``, ``n``, ``k``, ``steps``, ``leapfrog``, ``start``, ``k_chunk``,
        ``likelihood``, ``prior``, ``context``, ``generator``.
        """
        given = {**self._meaning(), "latent_dim": self._known_latent_dim(), **options}
        return bdmc(self.posterior, self.decoder, modules=[self], **given)

    def evaluate(self, data: Any, **options: Unpack[EvaluateOptions]) -> Evaluation:
        """Return :func:`fastvae.evaluate` of a data set; options are its keyword arguments.

        Options: ``k``, ``tol``, ``k_chunk``, ``noise``, ``proposal``, ``batch_size``, ``prepare_batch``,
        ``checkpoint``, ``audit``, ``shard``, ``progress``, ``generator``, ``shared_noise``.
        """
        return evaluate(self, data, **options)

    def evaluated_parts(self) -> tuple[Any, Any, Likelihood, Any]:
        """Return encoder, decoder, likelihood and prior as :func:`fastvae.evaluate` calls them."""
        fuses = self.fuse and may_end_in_a_layer(self.decoder)
        decoder = functools.partial(run_to_last_layer, self.decoder) if fuses else self.decoder
        return self.posterior, decoder, self.likelihood, self.prior

    @torch.no_grad()
    def reconstruction_log_prob(
        self, x: Any, k: int = 100, **options: Unpack[ReconstructionOptions]
    ) -> Tensor:
        """Return :func:`fastvae.reconstruction_log_prob` of x, [B]; options are its keyword arguments.

        Options: ``k_chunk``, ``elementwise``, ``likelihood``, ``mask``, ``size_factor``, ``context``,
        ``generator``, ``row_offset``, ``shared_noise``.

        Its negative is an anomaly score, by An and Cho's reconstruction probability; with
        ``elementwise=True`` it is that of each element of x, [B, *event]. Minus
        :meth:`log_marginal` is the other usual score, which also penalises latents that are rare under the
        prior.
        """
        given: dict[str, Any] = {"likelihood": self.likelihood, "k": k, **options}
        decoder = self._fused(x, k, options)
        return _reconstruction_log_prob(x, self._q(x, options), decoder, **given)

    @teaches
    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        mean: bool = False,
        context: Any = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Draw n examples [n, *event]: z from the prior, then x from p(x|z).

        Args:
            n: number of examples.
            mean: return the means of p(x|z) instead, as is usual for images. Default False.
            context: conditioning input of decoder and prior, with n rows.
            generator: source of the noise. Default: torch's global random state.
        """
        reference = next(self.parameters(), torch.empty(()))
        _, parameters = simulate(
            self.decoder, self.prior, n, self._known_latent_dim(), context, reference, generator
        )
        parameters = self.likelihood.read(parameters)
        if mean:
            return self.likelihood.mean(parameters)
        return self.likelihood.sample(parameters, generator=generator)

    def sleep(self, n: int, **options: Unpack[SleepOptions]) -> Tensor:
        """Return :func:`fastvae.sleep` on n examples simulated by the model, to train the encoder.

        Options: ``latent_dim``, ``likelihood``, ``prior``, ``context``, ``reduction``, ``modules``,
        ``generator``.
        """
        given = {**self._meaning(), "latent_dim": self._known_latent_dim(), **options}
        return sleep(self.posterior, self.decoder, n, **given)

    @teaches
    @torch.no_grad()
    def reconstruct(
        self, x: Any, k: int | None = None, *, context: Any = None, generator: torch.Generator | None = None
    ) -> Any:
        r"""Return the mean of p(x'\|z) at the mean of q(z\|x), or over the posterior p(z\|x), [B, \*event].

        .. math:: E[x' | x] \approx \sum_{k=1}^{K} \tilde w_k\, E[x' | z_k], \quad z_k \sim q(z|x), \quad
                  \tilde w_k \propto p(x, z_k) / q(z_k|x)

        A q trained by IWAE covers p(z|x), and its mean may lie where p(z|x) is small: give a k.

        Args:
            x: data [B, \*event]; a dict of such tensors for a Joint.
            k: importance samples of the mean over p(z|x). Default: None, the mean of q(z|x).
            context: conditioning input of encoder, decoder and prior. Default: none.
            generator: source of the noise, with a k. Default: torch's global random state.

        Raises:
            ValueError: without a k, for a q whose mean is not known.
        """
        if k is not None:
            return posterior_mean(*self._weighted(x, x, k, None, None, context, generator))[0]
        mean, latent = self._posterior_mean(x, context)
        return self.likelihood.mean(self._decode(mean, context, latent))

    @teaches
    @torch.no_grad()
    def impute(
        self,
        x: Any,
        mask: Any,
        *,
        k: int = 1000,
        draws: int = 0,
        fill: float = 0.0,
        k_chunk: int | None = None,
        context: Any = None,
        generator: torch.Generator | None = None,
    ) -> Imputation:
        r"""Return means and draws of the missing elements of x, given the observed ones.

        .. math:: E[x_m | x_o] \approx \sum_{k=1}^{K} \tilde w_k\, E[x_m | z_k], \quad
                  z_k \sim q(z|x_o), \quad \tilde w_k \propto p(x_o | z_k)\, p(z_k) / q(z_k|x_o)

        Draws are of z by these weights, and then of x from p(x|z). Train the model with ``vae.iwae(filled,
        mask=mask)``, filled being ``torch.where(mask, x, fill)``.

        Args:
            x: data [B, \*event], of any value where they are missing, NaN included; a dict for a Joint.
            mask: bool, [B, \*event] or [\*event], True for observed elements; a dict for a Joint.
            k: importance samples. Default 1000.
            draws: number of draws of each example. Default 0.
            fill: value that the encoder gets in place of missing elements, as in training. Default 0.
            k_chunk: samples per chunk, which bounds memory and changes results only by rounding. Default: as
                for :func:`fastvae.log_marginal`.
            context: conditioning input of encoder, decoder and prior. Default: none.
            generator: source of the noise. Default: torch's global random state.

        Returns:
            :class:`fastvae.estimation.imputation.Imputation`: ``mean`` and ``draws``, which are x where it is
            observed, and ``ess`` and ``khat`` [B] of the weights. The mean of a categorical likelihood is
            that of the class index: use draws.

        Raises:
            TypeError, ValueError: for an invalid argument; for a multinomial likelihood; for draws of an
                example whose weights are NaN or all 0.

        References:
            Mattei & Frellsen, MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets, 2019,
            eq. 12 and 13.

        Example:
            >>> import torch, fastvae
            >>> vae = fastvae.VAE(torch.nn.Linear(8, 4), torch.nn.Linear(2, 8), likelihood="bernoulli")
            >>> x, mask = torch.rand(16, 8).round(), torch.rand(16, 8) > 0.3
            >>> found = vae.impute(x, mask, k=50, draws=3)
            >>> found.mean.shape, found.draws.shape, bool((found.mean == x)[mask].all())
            (torch.Size([16, 8]), torch.Size([3, 16, 8]), True)
        """
        if type(draws) is not int or draws:
            draws = check_count("draws", draws, "the draws of each example")
        check_mean(self.likelihood)
        mask = as_mask(mask, x)
        seen = where_observed(x, mask, fill)
        inputs, seed, k, chunks = self._weighted(x, seen, k, k_chunk, mask, context, generator)
        return impute(inputs, seed, k, draws, chunks, generator)

    @teaches
    @torch.no_grad()
    def refine(
        self,
        x: Any,
        *,
        steps: int = 8,
        diagonal: bool = False,
        mask: Any = None,
        context: Any = None,
        generator: torch.Generator | None = None,
    ) -> Distribution:
        r"""Return the Gaussian of the largest ELBO of each example, found by gradients of the decoder.

        It starts from q(z|x) and takes natural-gradient steps towards the Gaussian of the largest ELBO; see
        :class:`fastvae.proposals.Refined`. As q of the objectives it has no gradient for the encoder:
        ``fastvae.elbo(x, vae.refine(x), vae.decoder)`` trains the decoder alone.
        :func:`fastvae.diagnostics.inference_gaps` compares its ELBO with that of the encoder's q. The module
        is in eval mode meanwhile.

        Args:
            x: data [B, \*event]; a dict of such tensors for a Joint.
            steps: number of steps. Default 8.
            diagonal: fit a diagonal covariance. Default False, a full one.
            mask: bool, [B, \*event] or [\*event], True for observed elements of x. Default: all are observed.
            context: conditioning input of encoder, decoder and prior. Default: none.
            generator: source of the noise. Default: torch's global random state.

        Returns:
            :class:`fastvae.distributions.FullNormal` of B rows; for a half-precision q a Student t.

        Raises:
            RuntimeError: for a decoder that has no derivatives by z, in reverse and in forward mode.
            ValueError: for a q or a prior on a part of R^D only.

        References:
            Opper & Archambeau, The Variational Gaussian Approximation Revisited, 2009; Cremer, Li & Duvenaud,
            Inference Suboptimality in Variational Autoencoders, 2018.

        Example:
            >>> import torch, fastvae
            >>> vae = fastvae.VAE(torch.nn.Linear(8, 4), torch.nn.Linear(2, 8), likelihood="bernoulli")
            >>> x = torch.rand(16, 8).round()
            >>> bool(fastvae.elbo(x, vae.refine(x), vae.decoder, likelihood="bernoulli") > vae.elbo(x))
            True
        """
        what = "steps", "the steps of the fit"
        with evaluating([self]):
            inputs, seed, steps, chunks = self._weighted(x, x, steps, None, mask, context, generator, what)
            return refined_posterior(inputs, seed, steps, diagonal, chunks)

    @teaches
    @torch.no_grad()
    def interpolate(self, first: Any, last: Any, steps: int = 9, *, context: Any = None) -> Any:
        """Return the means of p(x|z) on the line between the means of q(z|first) and q(z|last).

        Args:
            first: data [B, *event].
            last: data [B, *event].
            steps: points on the line, with both ends. Default 9.
            context: conditioning input of encoder and decoder. Default: none.

        Returns:
            [steps, B, *event]; a dict of such tensors for a Joint.

        Raises:
            ValueError: for a q whose mean is not known.
        """
        steps = check_count("steps", steps, "the points of the line")
        begin, latent = self._posterior_mean(first, context)
        end, _ = self._posterior_mean(last, context)
        share = torch.linspace(0, 1, steps, dtype=begin.dtype, device=begin.device).view(-1, 1, 1)
        return self._means(torch.lerp(begin, end, share), context, latent)

    @teaches
    @torch.no_grad()
    def traverse(self, x: Any, latent: int, values: Tensor | Sequence[float], *, context: Any = None) -> Any:
        """Return the means of p(x|z) as one latent takes these values, the others at the mean of q(z|x).

        Args:
            x: data [B, *event].
            latent: index of the latent, among D.
            values: values of the latent, such as ``torch.linspace(-3, 3, 7)``.
            context: conditioning input of encoder and decoder. Default: none.

        Returns:
            [len(values), B, *event]; a dict of such tensors for a Joint.

        Raises:
            ValueError: for a q whose mean is not known.
            IndexError: for an unknown latent.
        """
        mean, shape = self._posterior_mean(x, context)
        if not -mean.shape[1] <= latent < mean.shape[1]:
            raise IndexError(f"latent is {latent}, but there are {mean.shape[1]} latents")
        points = torch.as_tensor(values, dtype=mean.dtype, device=mean.device)
        z = mean.repeat(points.shape[0], 1, 1)
        z[:, :, latent] = points[:, None]
        return self._means(z, context, shape)

    def _means(self, z: Tensor, context: Any, latent: tuple[int, ...] | None) -> Any:
        """Return the means of p(x|z) for z [K, B, D]."""
        context = None if context is None else repeat(context, z.shape[0])
        mean = self.likelihood.mean(self._decode(z.flatten(0, 1), context, latent))
        return each(lambda t: t.unflatten(0, z.shape[:2]), mean)

    def _posterior_mean(self, x: Any, context: Any) -> tuple[Tensor, tuple[int, ...] | None]:
        """Return the mean of q(z|x) [B, D], and the shape of the decoder's z."""
        q = self.posterior(x, context)
        mean = known_mean(q)
        if mean is None:
            raise ValueError("the mean of q(z|x) is not known, and this method needs it")
        return mean, q.latent

    def _weighted(
        self,
        x: Any,
        seen: Any,
        count: int,
        k_chunk: int | None,
        mask: Any,
        context: Any,
        generator: torch.Generator | None,
        what: tuple[str, str] = ("k", "the importance samples per example"),
    ) -> tuple[Inputs, Tensor, int, Chunks]:
        """Return the validated inputs of importance sampling; the encoder gets ``seen`` in place of x."""
        conditioning = Conditioning.of(mask, None, context)
        q = self.posterior(seen, context)
        inputs = Inputs.read(x, q, self.decoder, self.likelihood, self.prior, conditioning)
        count = check_count(what[0], count, what[1])
        return inputs, draw_seed(inputs.q.device, generator), count, Chunks(k_chunk)

    def _check_latent_dim(self, found: int | tuple[int, ...]) -> None:
        """Raise ValueError if q's latent dimension differs from ``latent_dim``."""
        known: Any = self.latent_dim
        if isinstance(found, tuple) and isinstance(known, tuple):
            same = found == known
        else:
            same = math.prod(_axes(found)) == math.prod(_axes(known))
        if not same:
            raise ValueError(
                f"the encoder returned a q of {found} latents, but the VAE has latent_dim={known}; let the "
                "encoder return that many (mu and logvar side by side are "
                f"[B, {2 * math.prod(_axes(known))}]), or give latent_dim={found}"
            )

    def _own_prior(self) -> Hierarchy | None:
        """Return the hierarchy inside the encoder, or None."""
        encoder = self.encoder.modules() if isinstance(self.encoder, nn.Module) else ()
        found = [m for m in encoder if isinstance(m, Hierarchy)]
        if len(found) > 1:
            raise ValueError(
                f"the encoder holds {len(found)} hierarchies; pass VAE(..., prior=) the one whose posterior "
                "it returns"
            )
        return found[0] if found else None

    def _known_latent_dim(self) -> int | tuple[int, ...]:
        if self.latent_dim is None:
            raise ValueError(
                "the latent dimension is not known yet: give VAE(..., latent_dim=D), or a shape "
                "(C, H, W), or encode a batch first"
            )
        return self.latent_dim

    def _q(self, x: Any, options: Mapping[str, Any]) -> Distribution:
        return self.posterior(x, options.get("context"))

    def _fused(self, x: Any, samples: Any, options: Mapping[str, Any]) -> Any:
        """Return the decoder, without its last layer where fusing that into the objective may be faster."""
        if options.get("terms"):  # which return the decoder's output
            return self.decoder
        # An exported program must serve any batch size, so the choice cannot depend on it.
        may_pay = self.fuse and isinstance(x, Tensor) and isinstance(samples, int)
        may_pay = may_pay and (x.is_cpu or not torch.is_grad_enabled()) and not torch.compiler.is_exporting()
        if may_pay and samples * x.numel() >= FEWEST_NUMBERS and may_end_in_a_layer(self.decoder):
            return functools.partial(run_to_last_layer, self.decoder)
        return self.decoder

    def _decode(self, z: Tensor, context: Any, latent: tuple[int, ...] | None) -> Any:
        returned = decoded(self.decoder, z, context, latent)
        return self.likelihood.read(returned)

    def _meaning(self) -> dict[str, Any]:
        return {"likelihood": self.likelihood, "prior": self.prior}


def _as_latent_dim(value: Any) -> int | tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        return check_count("latent_dim", value, "the number of latents, or their shape, such as (C, H, W)")
    sizes = tuple([check_count("each of latent_dim", n, "the size of an axis") for n in value])
    if not sizes:
        raise ValueError("latent_dim is (), a shape without axes; expected D, or a shape such as (C, H, W)")
    return sizes if len(sizes) > 1 else sizes[0]


def _axes(latent_dim: int | tuple[int, ...]) -> tuple[int, ...]:
    return latent_dim if isinstance(latent_dim, tuple) else (latent_dim,)
