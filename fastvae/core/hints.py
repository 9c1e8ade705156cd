"""Error messages that suggest fastvae's name for an argument, and note the inputs of a user's function."""

from __future__ import annotations

import difflib
import functools
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch.compiler import is_compiling  # by name: a compiler guards each other name of a module

F = TypeVar("F", bound=Callable[..., Any])

# Groups of synonymous arguments, of fastvae and other libraries.
_ARGUMENTS = (
    ("k", "samples", "n", "chains", "num_samples", "n_samples", "num_particles", "n_particles",
     "mc_samples", "draws", "l"),
    ("k_chunk", "chunk", "chain_chunk", "chunks", "chunk_size", "micro_batch"),
    ("beta", "kl_weight", "kld_weight", "kl_coef", "kl_beta"),
    ("free_bits", "free_nats", "min_kl", "lambda"),
    ("groups", "m", "num_groups"),
    ("mask", "observed", "missing", "weights", "observation_mask"),
    ("context", "cond", "condition", "conditioning", "labels", "y", "c"),
    ("size_factor", "size", "library", "library_size", "exposure"),
    ("scale", "sigma", "std", "stddev", "sd", "noise_scale", "variance"),
    ("generator", "seed", "rng", "random_state", "random_seed", "key"),
    ("likelihood", "loss", "recon_loss", "reconstruction_loss", "distribution", "output_dist"),
    ("prior", "p", "p_z", "pz"),
    ("q", "posterior", "guide"),
    ("x", "data", "input", "inputs", "batch"),
    ("latent_dim", "z_dim", "latent_size", "n_latent", "num_latents", "dim_z"),
    ("reduction", "reduce", "size_average"),
    ("estimator", "gradient", "gradient_estimator"),
    ("batch_size", "bs", "batchsize"),
    ("prepare_batch", "unpack", "collate", "collate_fn", "batch_fn"),
    ("scale", "temperature"),
)  # fmt: skip
# Alternatives to common arguments that fastvae does not have.
_INSTEAD = {
    "seed": "generator=torch.Generator().manual_seed(0) seeds one call, torch.manual_seed(0) all",
    "sigma": "a likelihood holds its own, such as likelihood=fastvae.likelihoods.Gaussian(scale=0.1)",
    "scale": "a likelihood holds its own, such as likelihood=fastvae.likelihoods.Gaussian(scale=0.1)",
    "beta": "fastvae.elbo and fastvae.beta_tc weight the KL",
    "m": "fastvae.bound(x, q, decoder, fastvae.bounds.IWAE(groups=8), k=64) has groups",
    "groups": "fastvae.bound(x, q, decoder, fastvae.bounds.IWAE(groups=8), k=64) has groups",
    "alpha": "fastvae.bound(x, q, decoder, fastvae.bounds.IWAE(alpha=0.5), k=50) has powers of the weights",
    "encoder": "fastvae.bound has q_objective=, the bound that trains q",
}
# Names of losses, and the likelihoods whose negative logarithms they are.
LOSSES = {
    "bce": "bernoulli", "bce_loss": "bernoulli", "binary_cross_entropy": "bernoulli",
    "bce_with_logits": "bernoulli", "binary_cross_entropy_with_logits": "bernoulli",
    "mse": "gaussian", "mse_loss": "gaussian", "l2": "gaussian", "squared_error": "gaussian",
    "mean_squared_error": "gaussian", "sse": "gaussian",
    "l1": "laplace", "l1_loss": "laplace", "mae": "laplace", "absolute_error": "laplace",
    "ce": "categorical", "cross_entropy": "categorical",
}  # fmt: skip
# Names of other libraries, and fastvae's equivalents.
_VALUES = {
    **LOSSES,
    "binary": "bernoulli", "sigmoid": "bernoulli", "normal": "gaussian",
    "nb": "negative_binomial", "zinb": "zero_inflated_negative_binomial",
    "softmax": "categorical",
    "t": "student_t", "cb": "continuous_bernoulli",
    "gauss": "standard_normal", "standard": "standard_normal",
    "vae": "elbo", "iwelbo": "iwae", "btcvae": "beta_tc", "tc": "beta_tc", "nll": "log_marginal",
    "batchmean": "mean", "avg": "mean", "monte_carlo": "mc", "exact": "analytic", "closed_form": "analytic",
    "sobol": "qmc", "prior": "posterior", "ais": "adapted",
}  # fmt: skip


def word_of(name: str) -> str:
    """Return a name in the spelling of fastvae's: lower case, with underscores."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def did_you_mean(came: Any, known: Iterable[str]) -> str:
    """Return "; did you mean 'bernoulli'?" for a name close to a known one, or another library's synonym."""
    if not isinstance(came, str):
        return ""
    known = tuple(known)
    word = word_of(came)
    ours = next((k for k in known if word in (k, k.replace("_", ""))), None) or _VALUES.get(word)
    if ours not in known and word in ("normal", "gaussian", "gauss"):
        ours = "standard_normal"
    if ours not in known:
        ours = next(iter(difflib.get_close_matches(word, known, 1)), None)
    return f"; did you mean {ours!r}?" if ours else ""


def teaches(function: F, traced: Callable[..., Any] | None = None) -> F:
    """Wrap a function so that an unknown keyword raises with the closest argument and the full list.

    Args:
        function: the function.
        traced: takes the same arguments in a compiled graph; returns None where the function is needed.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():  # the compiler does not support graph breaks within a try
            found = None if traced is None else traced(*args, **kwargs)
            return function(*args, **kwargs) if found is None else found
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            own = call.__qualname__.removesuffix(".__init__")
            message = _explained(function, own, kwargs, error)
            if message is None:
                raise
        raise TypeError(message)

    return cast(F, call)


def teaches_with(traced: Callable[..., Any]) -> Callable[[F], F]:
    """Apply :func:`teaches` with a function for compiled graphs."""
    return lambda function: teaches(function, traced)


def teaches_by(cls: type) -> None:
    """Apply :func:`teaches` to the (possibly inherited) constructor of a class, under the class's name."""
    init = teaches(inspect.unwrap(cls.__init__))  # type: ignore[misc]
    init.__qualname__ = f"{cls.__name__}.__init__"
    cls.__init__ = init  # type: ignore[misc]


def _explained(function: Callable[..., Any], own: str, given: dict[str, Any], error: TypeError) -> str | None:
    """Return a better message if the arguments do not match the signature; None for another error."""
    function, text = inspect.unwrap(function), str(error)
    if not text.startswith(f"{function.__qualname__}() "):
        return None
    if any(frame.f_code is function.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
        return None  # raised inside the function
    if "unexpected keyword" in text:
        return _unknown(function, own, given)
    return own + text.removeprefix(function.__qualname__)


def _unknown(function: Callable[..., Any], name: str, given: dict[str, Any]) -> str:
    parameters = inspect.signature(function).parameters
    known = [n for n, p in parameters.items() if n != "self" and p.kind != p.VAR_KEYWORD]
    free = [n for n in known if n not in given]
    word = next((n for n in given if n not in known), "")
    same = [n for group in _ARGUMENTS if word.lower() in group for n in group if n in free]
    meant = next(iter(same or difflib.get_close_matches(word, free, 1)), None)
    parts = [f"{name}() got an unexpected keyword argument {word!r}"]
    if meant is not None:
        parts.append(f"did you mean {meant}=?")
    if word in _INSTEAD and meant != "scale":
        parts.append(_INSTEAD[word])
    return "; ".join([*parts, f"it takes {', '.join(known) or 'none'}"])


def explained(function: Callable[..., Any], given: tuple[Any, ...], note: Callable[[], str]) -> Any:
    """Call a user's ``function(*given)``; an error gets a note that describes its inputs."""
    if is_compiling():  # the compiler does not support graph breaks within a try
        return function(*given)
    try:
        return function(*given)
    except Exception as error:
        noted(error, note())
        raise


def described(value: Any) -> str:
    """Return the shape and dtype of a tensor, or of each in a dict or sequence."""
    if isinstance(value, torch.Tensor):
        return f"[{', '.join(map(str, value.shape))}] {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{n!r}: {described(v)}' for n, v in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(described, value))})"
    return type(value).__name__


def noted(error: BaseException, note: str) -> None:
    """Add a note to a user function's error, once (Python 3.11 or newer)."""
    if hasattr(error, "add_note") and note not in getattr(error, "__notes__", ()):
        error.add_note(note)
