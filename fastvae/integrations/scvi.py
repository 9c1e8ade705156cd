r"""scvi-tools with fastvae's fused likelihoods, and log p(x) of its cells.

:func:`fast` makes a model class train faster and leaves everything else of it as it is; :func:`evaluate` estimates
log p(x) of the cells of a trained model.

scvi-tools adds ε = 10⁻⁸ within logarithms. With m = log(μ + ε) and t = log θ the fused negative binomial is

.. math:: \log Γ(x + θ) - \log Γ(θ) - \log x! + θ \log\frac{θ}{θ + μ + ε} + x \log\frac{μ + ε}{θ + μ + ε}

and scvi-tools' is larger by :math:`θ \log(1 + ε/θ)`, which lies between 0 and ε. Zero inflation takes a count's
log p through functions of slope at most 1, so a gene's log p differs by at most 10⁻⁸ there, too.
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

# The losses of these versions are the same code.
VERSIONS = ("1.3.3", "1.4.0", "1.4.1", "1.4.2")
EPS = 1e-8  # that of scvi-tools' logarithms

Model = TypeVar("Model", bound=type)


def fast(model_class: Model) -> Model:
    """Return a subclass of a model of scvi-tools that computes its likelihood by fastvae's fused ops.

    Use it as the class itself: ``setup_anndata`` of either class serves both, and files saved by one are loaded
    by the other. Only log p(x|z) within the loss is replaced, for ``gene_likelihood`` ``"zinb"``, ``"nb"`` and
    ``"poisson"`` with any dispersion; ``"normal"`` stays scvi-tools' own, with a warning. Values differ by
    rounding and by at most 1e-8 a gene. TOTALVI's proteins stay scvi-tools' own. Outside the loss, as in
    posterior predictive samples, p(x|z) is scvi-tools' distribution.

    The loss does not look for counts that are no whole numbers, which ``setup_anndata`` warns of: scvi-tools'
    zero-inflated distribution warns again in each batch, its Poisson raises, and here the same formula is
    computed. A negative count raises on a CPU; on a GPU with ``FASTVAE_CHECK=1``.

    Args:
        model_class: ``scvi.model.SCVI``, ``LinearSCVI``, ``SCANVI`` or ``TOTALVI``, or a subclass that does
            not override the loss of its module.

    Returns:
        The subclass, the same for every call. For a version of scvi-tools whose loss is unknown, model_class
        itself, with a warning.

    Raises:
        ImportError: without scvi-tools.
        TypeError: for another class, and for one whose module has its own loss.

    Example::

        from fastvae.integrations.scvi import fast

        SCVI = fast(scvi.model.SCVI)
        SCVI.setup_anndata(adata, batch_key="batch")
        model = SCVI(adata)
        model.train()
    """
    scvi = _scvi()
    if not (isinstance(model_class, type) and hasattr(model_class, "_module_cls")):
        raise TypeError(f"model_class must be a class such as scvi.model.SCVI; got {model_class!r}")
    if scvi.__version__ not in VERSIONS:
        warnings.warn(
            f"fastvae.integrations.scvi knows the loss of scvi-tools {', '.join(VERSIONS)}, not of "
            f"{scvi.__version__}; {model_class.__name__} stays as it is. Install one of these versions for fused "
            "likelihoods",
            stacklevel=2,
        )
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
    r"""Estimate log p(x) of the cells of a trained SCVI or LinearSCVI model, with errors and Pareto k̂.

    .. math:: \log p(x) = \log \int p(x|z, s)\, N(z; 0, I)\, dz

    given a cell's batch, covariates and label s. The size of a library is given with it, too, if the model takes
    the observed one or a size factor, as in ``get_marginal_ll``; otherwise it is the last latent, with its prior
    for the batch. For ``latent_distribution="ln"`` z is the logistic normal's normal variable. The networks and
    p(x|z) are the model's, in eval mode.

    Args:
        model: the model, made by :func:`fast` or by scvi-tools.
        adata: cells, set up as for the model's other methods. Default: those that it was made with.
        indices: indices of cells in adata. Default: all.
        k: draws per cell. Default: 5000; with ``tol`` at most 100 000.
        proposal: distribution of the draws, as of :func:`fastvae.evaluate`. Default ``"adapted"``.
        batch_size: cells per batch. Default: scvi-tools' own, 128.
        **options: other arguments of :func:`fastvae.evaluate`, such as ``tol``, ``checkpoint`` and ``progress``.

    Returns:
        :class:`fastvae.Evaluation`, with cells in the order of ``indices``.

    Raises:
        ImportError: without scvi-tools.
        TypeError: for a model whose latents have another prior (SCANVI), that has more than genes (TOTALVI), or
            whose module has its own ``generative``.
        ValueError: for minified data without counts.

    Example::

        result = evaluate(model, indices=model.validation_indices, k=1000)
        print(result)
    """
    scvi = _scvi()
    module = getattr(model, "module", None)
    known = isinstance(module, scvi.module.VAE) and not isinstance(module, scvi.module.SCANVAE)
    if not known or not _is_own(module, "generative", scvi.module.VAE):
        raise TypeError(
            f"model is a {type(model).__name__}, for which p(x|z) p(z) is not that of scvi.model.SCVI: expected "
            "SCVI or LinearSCVI, whose module does not override generative; for another model write it as a "
            "fastvae.VAE, and use fastvae.evaluate"
        )
    adata = model._validate_anndata(adata)
    if module.minified_data_type == "latent_posterior_parameters":
        raise ValueError("adata is minified and holds no counts; pass the data of which it was made")
    batches = model._make_data_loader(adata=adata, indices=indices, batch_size=batch_size)
    cells = _Cells(module)
    vae = VAE(
        cells.encode, cells.decode, likelihood=cells.likelihood(), prior=cells.prior, modules=[module]
    )
    return _evaluate(
        vae, batches, k=k, proposal=proposal, prepare_batch=_prepared, **options
    )


# The fused likelihood


def _log_prob(x: Tensor, mu: Tensor, log_theta: Tensor, zi_logits: Tensor | None = None) -> Tensor:
    """Return log p(x|z), summed over genes, of counts x [B, G] with means mu [..., B, G]."""
    log_mean = torch.log(mu + EPS)
    if zi_logits is None:
        return ops.negative_binomial_log_prob(x, log_mean, log_theta)
    return ops.zero_inflated_negative_binomial_log_prob(x, log_mean, log_theta, zi_logits)


class _Rows:
    """Stand-in for a distribution within a loss that calls ``log_prob(x).sum(-1)`` and nothing else."""

    def __init__(self, log_prob: Callable[[Tensor], Tensor]):
        self._log_prob = log_prob

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(x|z), summed over genes, as [..., 1]."""
        return self._log_prob(x)[..., None]


def _fused(module: Any, px: Any) -> Any:
    """Return the stand-in for a distribution of module's, or the distribution itself if it has none."""
    distributions = _scvi().distributions
    if type(px) is distributions.Poisson:
        # It has no epsilon.
        return _Rows(lambda x: ops.poisson_log_prob(x, log_of_positive(px.rate)))
    if type(px) not in (distributions.NegativeBinomial, distributions.ZeroInflatedNegativeBinomial):
        warnings.warn(
            f"fastvae.integrations.scvi has no fused op for {type(px).__name__}, which stays as it is; use "
            'gene_likelihood="zinb", "nb" or "poisson"',
            stacklevel=4,
        )
        return px
    if module.dispersion == "gene" and _is_own(module, "generative", _scvi().module.VAE):
        log_theta = module.px_r  # [G], which px expands to all cells
    else:
        log_theta = torch.log(px.theta)
    return _Rows(lambda x: _log_prob(x, px.mu, log_theta, getattr(px, "zi_logits", None)))


def _with_fused_loss(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loss of a module, given generative outputs whose log_prob is fused."""
    signature = inspect.signature(theirs)
    outputs = list(signature.parameters)[3]  # self, tensors, inference_outputs, generative_outputs

    # The signature stays, too: training plans look for kl_weight in it.
    @functools.wraps(theirs)
    def loss(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments[outputs]
        bound.arguments[outputs] = {**given, "px": _fused(args[0], given["px"])}
        return theirs(*bound.args, **bound.kwargs)

    return loss


def _with_fused_genes(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Return TOTALVI's get_reconstruction_loss with the part of the genes fused."""

    @functools.wraps(theirs)
    def get_reconstruction_loss(
        self: Any, x: Tensor, y: Tensor, px_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rate, theta, dropout = (px_dict[name] for name in ("rate", "r", "dropout"))
        # Theirs, for no genes, computes the proteins.
        none = {"rate": rate[..., :0], "r": theta[..., :0], "dropout": dropout[..., :0]}
        _, proteins = theirs(self, x[..., :0], y, none, *args, **kwargs)
        inflated = self.gene_likelihood == "zinb"
        return -_log_prob(x, rate, torch.log(theta), dropout if inflated else None), proteins

    return get_reconstruction_loss


# The classes


def _scvi() -> Any:
    """Return scvi-tools, which fastvae does not require."""
    try:
        import scvi
    except ImportError as error:
        raise ImportError("fastvae.integrations.scvi needs scvi-tools: pip install scvi-tools") from error
    return scvi


def _is_own(module: Any, name: str, owner: type) -> bool:
    """Return True if a module's method is owner's, not an override."""
    return getattr(type(module), name) is getattr(owner, name) and name not in vars(module)


@functools.cache
def _fast_model(model_class: Any) -> Any:
    module_class = model_class._module_cls
    if model_class in _FAST:
        return model_class
    made = _subclass(_fast_model, model_class, _module_cls=_fast_module(module_class))
    # Data that one of the classes has set up serve the other.
    made._setup_adata_manager_store = model_class._setup_adata_manager_store
    return made


@functools.cache
def _fast_module(module_class: Any) -> Any:
    modules = _scvi().module
    for owner, name, fused in (
        (modules.TOTALVAE, "get_reconstruction_loss", _with_fused_genes),
        (modules.SCANVAE, "loss", _with_fused_loss),
        (modules.VAE, "loss", _with_fused_loss),
    ):
        if issubclass(module_class, owner) and getattr(module_class, name) is getattr(owner, name):
            return _subclass(_fast_module, module_class, **{name: fused(getattr(owner, name))})
    raise TypeError(
        f"model_class has the module {module_class.__name__}, whose loss is not that of scvi.model.SCVI, "
        "LinearSCVI, SCANVI or TOTALVI, and fastvae would change what it computes; use the class without fast, "
        "and in its loss fastvae.ops.negative_binomial_log_prob or zero_inflated_negative_binomial_log_prob"
    )


# Classes made here.
_FAST: set[type] = set()


def _subclass(maker: Callable[[Any], Any], base: Any, **attributes: Any) -> Any:
    """Return a subclass that scvi-tools takes for its base, and pickle finds by calling maker(base)."""
    # Saved files contain the name, and another is refused.
    made = type(base)(base.__name__, (base,), {"__doc__": base.__doc__, "__module__": __name__, **attributes})
    made.__qualname__ = f"fast({base.__name__})"
    copyreg.pickle(made, lambda self: (_blank, (maker, base), *self.__reduce_ex__(2)[2:]))
    _FAST.add(made)
    return made


def _blank(maker: Callable[[Any], Any], base: Any) -> Any:
    made = maker(base)
    return made.__new__(made)


# The marginal likelihood


def _prepared(batch: dict[str, Tensor]) -> dict[str, Any]:
    """Divide a batch of scvi-tools' loader into the counts and their conditions."""
    context = dict(batch)
    x = context.pop("X")
    return {"x": x, "context": {**context, "library": torch.log(x.sum(1, keepdim=True))}}


class _Cells:
    """The parts of a module as fastvae's objectives call them: its latents are z, and l if it is not observed."""

    def __init__(self, module: Any):
        self._module = module

    def likelihood(self) -> likelihoods.Likelihood:
        """Return p(x|z); with one dispersion a gene it has the dispersions, else the decoder returns them."""
        module = self._module
        theta = torch.exp(module.px_r.detach()) if module.dispersion == "gene" else None
        if module.gene_likelihood == "nb":
            return likelihoods.NegativeBinomial(theta)
        if module.gene_likelihood == "zinb":
            return likelihoods.ZeroInflatedNegativeBinomial(theta)
        return likelihoods.from_distribution(lambda px: px)

    def encode(self, x: Tensor, context: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return mu and logvar of q(z|x)."""
        module = self._module
        outputs = module.inference(
            **module._get_inference_input({"X": x, **context}, full_forward_pass=True)
        )
        qs = [q for q in (outputs["qz"], outputs["ql"]) if q is not None]
        return torch.cat([q.loc for q in qs], -1), 2 * torch.log(torch.cat([q.scale for q in qs], -1))

    @property
    def prior(self) -> Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]] | None:
        """p(z, l), given the batch."""
        return None if self._module.use_observed_lib_size else self._prior

    def _prior(self, context: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        mean, variance = self._module._compute_local_library_params(context["batch"])
        zeros = mean.new_zeros(len(mean), self._module.n_latent)
        return torch.cat((zeros, mean), 1), torch.cat((zeros, torch.log(variance)), 1)

    def decode(self, z: Tensor, context: dict[str, Tensor]) -> Any:
        """Return the parameters of p(x|z)."""
        module, library = self._module, context["library"]
        if not module.use_observed_lib_size:
            z, library = z[:, :-1], z[:, -1:]
        latent = {"z": module.z_encoder.z_transformation(z), "library": library}
        px = module.generative(**module._get_generative_input(context, latent))["px"]
        if module.gene_likelihood not in ("nb", "zinb"):
            return px
        outputs = [torch.log(px.mu + EPS)]
        if module.dispersion != "gene":
            outputs.append(torch.log(px.theta))
        if module.gene_likelihood == "zinb":
            outputs.append(px.zi_logits)
        return tuple(outputs)
