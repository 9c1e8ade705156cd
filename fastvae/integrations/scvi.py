r"""Adapter for scvi-tools: fused likelihoods for its models, and log p(x) of its cells.

:func:`fast` returns a model class whose training steps take less time; :func:`evaluate` estimates log p(x) of
the cells of a trained model.

scvi-tools adds ε = 1e-8 to the arguments of logarithms. With log mean log(μ + ε) and log inverse dispersion
log θ, fastvae's negative binomial is

.. math:: \log Γ(x + θ) - \log Γ(θ) - \log x! + θ \log\frac{θ}{θ + μ + ε} + x \log\frac{μ + ε}{θ + μ + ε}

and that of scvi-tools is larger by :math:`θ \log(1 + ε/θ)`, which lies between 0 and ε. Zero inflation is a
function of it with a slope between 0 and 1, so that the bound of ε per gene applies there, too.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import likelihoods, ops
from ..estimation.evaluation import Evaluation
from ..estimation.evaluation import evaluate as _evaluate
from ..likelihoods.natural import log_of_positive
from ..vae import VAE

__all__ = ["evaluate", "fast"]

# Versions of scvi-tools with the losses and distributions that are replaced here.
VERSIONS = ("1.3.3", "1.4.0", "1.4.1", "1.4.2")
EPS = 1e-8  # scvi-tools'

ModelClass = TypeVar("ModelClass", bound=type)


def fast(model_class: ModelClass) -> ModelClass:
    """Return a subclass of a scvi-tools model that computes its likelihood with fastvae's fused ops.

    The subclass is used like the class itself: data set up with either serve both, and each loads the other's
    files. Only log p(x|z) within the loss is replaced, for the gene likelihoods ``"zinb"``, ``"nb"`` and
    ``"poisson"`` with any dispersion; it differs by rounding and by at most 1e-8 per gene. The normal
    likelihood (with a warning), the proteins of TOTALVI, and p(x|z) outside the loss, such as in posterior
    predictive samples, remain those of scvi-tools.

    The loss does not look for fractional counts, for which the same formula is computed: ``setup_anndata``
    warns of them, and scvi-tools' loss would warn again for ``"zinb"`` and raise for ``"poisson"``. Negative
    counts raise ValueError, on a GPU only with ``FASTVAE_CHECK=1``.

    Args:
        model_class: ``scvi.model.SCVI``, ``LinearSCVI``, ``SCANVI`` or ``TOTALVI``, or a subclass whose
            module does not override ``loss`` (of TOTALVI: ``get_reconstruction_loss``).

    Returns:
        The subclass, the same in every call; for an unknown version of scvi-tools model_class itself, with a
        warning.

    Raises:
        ImportError: if scvi-tools is not installed.
        TypeError: for any other class, or if its module overrides the loss.

    Example::

        SCVI = fastvae.integrations.scvi.fast(scvi.model.SCVI)
        SCVI.setup_anndata(adata, batch_key="batch")
        model = SCVI(adata)
        model.train()
    """
    scvi = _scvi()
    if not (isinstance(model_class, type) and hasattr(model_class, "_module_cls")):
        raise TypeError(f"model_class must be a model of scvi-tools such as SCVI; got {model_class!r}")
    if not _is_known(scvi, f"{model_class.__name__} is returned unchanged"):
        return model_class
    return _fast_model(model_class)  # type: ignore[no-any-return]


def evaluate(
    model: Any,
    adata: Any = None,
    indices: Sequence[int] | None = None,
    *,
    k: int | None = None,
    proposal: Any = "adapted",
    batch_size: int | None = None,
    **options: Any,
) -> Evaluation:
    r"""Estimate log p(x) of cells under a trained SCVI or LinearSCVI model, with errors and diagnostics.

    .. math:: \log p(x|s) = \log \int p(x|z, s)\, N(z; 0, I)\, dz

    where s are the cell's batch, covariates and label, and its observed library size or size factor. For
    ``use_observed_lib_size=False`` the log library size is another latent, with its prior given the batch.
    For ``latent_distribution="ln"`` the latent is z before the softmax. The model is in eval mode meanwhile.

    Args:
        model: a model of scvi-tools, or one of a class from :func:`fast`.
        adata: AnnData with the genes of the model. Default: the model's own.
        indices: indices of cells in adata. Default: all cells.
        k: draws per cell. Default: 5000; with ``tol`` the maximum, 100 000.
        proposal: distribution of the draws, as in :func:`fastvae.evaluate`. Default ``"adapted"``.
        batch_size: cells per batch, which does not change results. Default: ``scvi.settings.batch_size``.
        **options: further arguments of :func:`fastvae.evaluate`, such as ``tol`` or ``progress``.

    Returns:
        :class:`fastvae.Evaluation`, with one entry per cell, in the order of ``indices``.

    Raises:
        ImportError: if scvi-tools is not installed.
        TypeError: for any other model, or if its module overrides ``generative``.
        ValueError: if the model's data are minified, without counts.

    Example::

        result = fastvae.integrations.scvi.evaluate(model, indices=model.validation_indices, k=1000)
        print(result)
    """
    scvi = _scvi()
    module: Any = getattr(model, "module", None)
    known = isinstance(module, scvi.module.VAE) and not isinstance(module, scvi.module.SCANVAE)
    if not known or not _is_own(module, "generative", scvi.module.VAE):
        raise TypeError(
            "model must be an SCVI or LinearSCVI whose module does not override generative, got a "
            f"{type(model).__name__}: its p(z) or p(x|z) may differ. Pass the encoder, decoder and prior of "
            "such a model to fastvae.evaluate as a fastvae.VAE"
        )
    if model.minified_data_type == scvi.data._constants.ADATA_MINIFY_TYPE.LATENT_POSTERIOR:
        raise ValueError(
            "the model's data are minified, without counts, and log p(x) needs them; load the model with the "
            "full AnnData"
        )
    _is_known(scvi, "log p(x|z) may differ from the model's")
    batches = model._make_data_loader(model._validate_anndata(adata), indices=indices, batch_size=batch_size)
    cells = _Cells(module)
    prior = None if module.use_observed_lib_size else cells.prior
    vae = VAE(cells.encode, cells.decode, likelihood=cells.likelihood(), prior=prior, modules=[module])
    return _evaluate(vae, batches, k=k, proposal=proposal, prepare_batch=_prepared, **options)


# The fused likelihood


def _log_prob(x: Tensor, mu: Tensor, log_theta: Tensor, zi_logits: Tensor | None = None) -> Tensor:
    """Return log p(x|z) [..., B], summed over genes, of counts x [B, G] with means mu [..., B, G]."""
    log_mean = torch.log(mu + EPS)
    if zi_logits is None:
        return ops.negative_binomial_log_prob(x, log_mean, log_theta)
    return ops.zero_inflated_negative_binomial_log_prob(x, log_mean, log_theta, zi_logits)


class _Rows:
    """Stand-in for a distribution, for a loss that calls ``log_prob(x).sum(-1)`` and nothing else."""

    def __init__(self, log_prob: Callable[[Tensor], Tensor]):
        self._log_prob = log_prob

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(x|z), summed over genes, as [..., B, 1]."""
        return self._log_prob(x)[..., None]


def _fused(module: Any, px: Any) -> Any:
    """Return the stand-in for p(x|z), or p(x|z) itself if it has no fused op."""
    scvi = _scvi()
    if type(px) is scvi.distributions.Poisson:
        return _Rows(lambda x: ops.poisson_log_prob(x, log_of_positive(px.rate)))  # without epsilon
    if type(px) not in (scvi.distributions.NegativeBinomial, scvi.distributions.ZeroInflatedNegativeBinomial):
        warnings.warn(
            f"fastvae.integrations.scvi has no fused op for {type(px).__name__}, and scvi-tools computes it; "
            'gene_likelihood="zinb", "nb" and "poisson" have one',
            stacklevel=4,
        )
        return px
    if module.dispersion == "gene" and _is_own(module, "generative", scvi.module.VAE):
        log_theta = module.px_r  # [G]; px.theta repeats its exponential for every cell
    else:
        log_theta = torch.log(px.theta)
    return _Rows(lambda x: _log_prob(x, px.mu, log_theta, getattr(px, "zi_logits", None)))


def _with_fused_loss(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loss of VAE or SCANVAE, called with a stand-in for p(x|z)."""
    signature = inspect.signature(theirs)
    name = list(signature.parameters)[3]  # of the generative outputs; SCANVAE spells it differently

    @functools.wraps(theirs)  # also the signature, in which training plans look for kl_weight
    def loss(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        outputs = bound.arguments[name]
        bound.arguments[name] = {**outputs, "px": _fused(args[0], outputs["px"])}
        return theirs(*bound.args, **bound.kwargs)

    return loss


def _with_fused_genes(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Return TOTALVAE's get_reconstruction_loss with fused genes."""

    @functools.wraps(theirs)
    def get_reconstruction_loss(
        self: Any, x: Tensor, y: Tensor, px_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rate, theta, dropout = (px_dict[name] for name in ("rate", "r", "dropout"))
        # With no genes, theirs computes the proteins alone.
        no_genes = {"rate": rate[..., :0], "r": theta[..., :0], "dropout": dropout[..., :0]}
        _, proteins = theirs(self, x[..., :0], y, no_genes, *args, **kwargs)
        zi_logits = dropout if self.gene_likelihood == "zinb" else None
        return -_log_prob(x, rate, torch.log(theta), zi_logits), proteins

    return get_reconstruction_loss


# The classes


def _scvi() -> Any:
    try:
        import scvi
    except ImportError as error:
        raise ImportError("fastvae.integrations.scvi needs scvi-tools: pip install scvi-tools") from error
    return scvi


def _is_known(scvi: Any, consequence: str) -> bool:
    """Return True for a version in VERSIONS; warn of the consequence otherwise."""
    known = scvi.__version__ in VERSIONS
    if not known:
        warnings.warn(
            f"fastvae.integrations.scvi knows scvi-tools {', '.join(VERSIONS)}, not {scvi.__version__}, so "
            f"{consequence}; install one of those versions",
            stacklevel=3,
        )
    return known


def _is_own(module: Any, name: str, owner: type) -> bool:
    """Return True if a module's method is that of owner."""
    return getattr(type(module), name) is getattr(owner, name) and name not in vars(module)


_MADE: set[type] = set()  # all classes from _subclass


@functools.cache
def _fast_model(model_class: Any) -> Any:
    if model_class in _MADE:
        return model_class
    made = _subclass(_fast_model, model_class, _module_cls=_fast_module(model_class._module_cls))
    made._setup_adata_manager_store = model_class._setup_adata_manager_store
    return made


@functools.cache
def _fast_module(module_class: Any) -> Any:
    if module_class in _MADE:
        return module_class
    modules = _scvi().module
    for owner, name, fused in (
        (modules.TOTALVAE, "get_reconstruction_loss", _with_fused_genes),
        (modules.SCANVAE, "loss", _with_fused_loss),
        (modules.VAE, "loss", _with_fused_loss),
    ):
        theirs = getattr(owner, name)
        if issubclass(module_class, owner) and getattr(module_class, name) is theirs:
            return _subclass(_fast_module, module_class, **{name: fused(theirs)})
    raise TypeError(
        f"model_class has a {module_class.__name__}, whose loss is not one of SCVI, LinearSCVI, SCANVI or "
        "TOTALVI, and would be changed; use the class as it is, and call the op in its loss: "
        "fastvae.ops.negative_binomial_log_prob or fastvae.ops.zero_inflated_negative_binomial_log_prob"
    )


def _subclass(maker: Callable[[Any], Any], base: Any, **attributes: Any) -> Any:
    """Return a subclass of base, which pickle restores as maker(base)."""
    # scvi-tools compares names when it loads a file.
    made = type(base)(base.__name__, (base,), {"__module__": __name__, "__doc__": base.__doc__, **attributes})
    made.__qualname__ = f"fast({base.__name__})"
    copyreg.pickle(made, lambda instance: (_blank, (maker, base), *instance.__reduce_ex__(2)[2:]))
    _MADE.add(made)
    return made


def _blank(maker: Callable[[Any], Any], base: Any) -> Any:
    """Return an instance without a state."""
    made = maker(base)
    return made.__new__(made)


# The marginal likelihood


def _prepared(batch: dict[str, Tensor]) -> dict[str, Any]:
    """Divide a batch of scvi-tools' loader into counts and context."""
    context = dict(batch)
    x = context.pop("X")
    return {"x": x, "context": {**context, "library": torch.log(x.sum(1, keepdim=True))}}


class _Cells:
    """A module as :class:`fastvae.VAE` calls it; a library size that is not observed is its last latent."""

    def __init__(self, module: Any):
        self._module = module
        self._own_theta = module.dispersion == "gene" and module.gene_likelihood in ("nb", "zinb")

    def likelihood(self) -> likelihoods.Likelihood:
        """Return p(x|z), with the dispersions of genes; the decoder returns any others."""
        theta = torch.exp(self._module.px_r.detach()) if self._own_theta else None
        kinds: dict[str, likelihoods.Likelihood] = {
            "nb": likelihoods.NegativeBinomial(theta),
            "zinb": likelihoods.ZeroInflatedNegativeBinomial(theta),
            "poisson": likelihoods.Poisson(rate=True),
            "normal": likelihoods.Gaussian(),
        }
        return kinds[self._module.gene_likelihood]

    def encode(self, x: Tensor, context: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return mu and logvar of q(z|x)."""
        module = self._module
        given = module._get_inference_input({"X": x, **context}, full_forward_pass=True)
        outputs = module.inference(**given)
        qs = [q for q in (outputs["qz"], outputs["ql"]) if q is not None]
        return torch.cat([q.loc for q in qs], 1), 2 * torch.log(torch.cat([q.scale for q in qs], 1))

    def decode(self, z: Tensor, context: dict[str, Tensor]) -> Any:
        """Return the parameters of p(x|z)."""
        module, library = self._module, context["library"]
        if not module.use_observed_lib_size:
            z, library = z[:, :-1], z[:, -1:]
        latents = {"z": module.z_encoder.z_transformation(z), "library": library}
        px = module.generative(**module._get_generative_input(context, latents))["px"]
        if module.gene_likelihood == "poisson":
            return px.rate
        if module.gene_likelihood == "normal":
            return px.loc, 2 * torch.log(px.scale)
        outputs = [torch.log(px.mu + EPS)]
        if not self._own_theta:
            outputs.append(torch.log(px.theta))
        if module.gene_likelihood == "zinb":
            outputs.append(px.zi_logits)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def prior(self, context: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return mu and logvar of p(z, l), whose l has moments of the cell's batch."""
        mean, variance = self._module._compute_local_library_params(context["batch"])
        zeros = mean.new_zeros(len(mean), self._module.n_latent)
        return torch.cat((zeros, mean), 1), torch.cat((zeros, torch.log(variance)), 1)
