"""Exact sum over a discrete latent: clusters, and semi-supervised labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from .. import ops
from ..core.checks import (
    FLOATING,
    check_choice,
    check_count,
    check_same_device,
    check_tensor,
    check_weight,
    may_look,
    on_same_device,
    shape_of,
)
from ..core.hints import teaches
from ..core.nested import each, tensors
from ..core.options import REDUCTIONS, Reduction
from ..core.records import registered
from ..core.sparse import at_rows, is_sparse
from ..core.torch_private import functorch_is_active

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class MarginalOptions(TypedDict, total=False):
        classes: int | None
        log_q: Tensor | None
        log_prior: Tensor | None
        labels: Tensor | None
        alpha: float | Tensor
        class_chunk: int | None
        reduction: Reduction


__all__ = ["Marginal", "marginalize"]


@registered
@dataclass(frozen=True, eq=False)
class Marginal:
    """Bound [B] to be maximised, in nats, and the log responsibilities of the classes [B, C].

    ``log_responsibilities`` is log q(y|x) if a classifier was given, else the exact log p(y|x) of the bounds.
    Labels do not change it.
    """

    bound: Tensor
    """Bound to be maximised, in nats [B]."""
    log_responsibilities: Tensor
    """log q(y|x) if a classifier was given, else the exact log p(y|x) of the bounds [B, C]; labels do not
    change it."""


@overload
def marginalize(
    x: Any,
    bound: Callable[[Any, Tensor], Tensor],
    *,
    terms: Literal[False] = False,
    **options: Unpack[MarginalOptions],
) -> Tensor: ...
@overload
def marginalize(
    x: Any,
    bound: Callable[[Any, Tensor], Tensor],
    *,
    terms: Literal[True],
    **options: Unpack[MarginalOptions],
) -> Marginal: ...
@overload
def marginalize(
    x: Any,
    bound: Callable[[Any, Tensor], Tensor],
    *,
    terms: bool,
    **options: Unpack[MarginalOptions],
) -> Tensor | Marginal: ...
@teaches
def marginalize(
    x: Any,
    bound: Callable[[Any, Tensor], Tensor],
    *,
    classes: int | None = None,
    log_q: Tensor | None = None,
    log_prior: Tensor | None = None,
    labels: Tensor | None = None,
    alpha: float | Tensor = 0.0,
    class_chunk: int | None = None,
    reduction: Reduction = "mean",
    terms: bool = False,
) -> Tensor | Marginal:
    r"""Return a bound on log p(x) of a model with a discrete latent y, summed exactly over its C classes.

    This covers Gaussian mixture VAEs and semi-supervised VAEs. With :math:`F_y(x)`, a bound on
    :math:`\log p(x|y)` or its exact value, the bound of an example is, for a classifier q(y|x), for the
    optimal classifier, which needs no network, and for a label y, respectively,

    .. math::
        \sum_y q(y|x) \big[F_y(x) + \log p(y) - \log q(y|x)\big] \;\le\;
        \log \sum_y p(y)\, e^{F_y(x)}, \qquad
        F_y(x) + \log p(y) + α \log q(y|x)

    The optimal classifier is :math:`q(y|x) ∝ p(y)\, e^{F_y(x)}`. A class with q(y|x) = 0 contributes 0 for
    any bound. Without a classifier, noise in F raises the mean of the bound, since log Σ exp is convex. It
    stays below log p(x) if :math:`e^{F_y}` has a mean of at most p(x|y), as for :func:`fastvae.iwae`,
    :func:`fastvae.log_marginal`, and :func:`fastvae.elbo` with ``kl="mc"``, but not with its analytic KL.

    Args:
        x: data [B, ...], or a dict of all inputs of ``bound`` per example, such as a mask, or features
            that do not depend on y and are computed once.
        bound: function of rows of x and their classes, one-hot [N, C] in x's floating dtype, that returns
            F [N], such as ``lambda x, y: vae.elbo(x, context=y, kl="mc", reduction="none")``. It is called
            once, with N = B·C rows: each example with all classes, then the next one.
        classes: C. Default: the size of log_q or log_prior.
        log_q: logits or log-probabilities of q(y|x), a classifier's output [B, C]. Default: the optimal
            q(y|x).
        log_prior: logits or log-probabilities of p(y), [C], or [B, C] if it depends on the example.
            Default: uniform.
        labels: class of each example, int64 [B]; −1 where it is unknown. All classes are evaluated in any
            case: for a batch of labelled examples only, calling ``bound`` directly costs 1/C.
        alpha: α, weight of log q(y|x) in labelled examples, a number or a tensor []; with 0 the classifier
            gets no gradient from them. Default 0.
        class_chunk: classes per call of ``bound``. Default: all. Fewer take less memory without gradients.
            With 1, each call gets x unchanged, so that ``bound`` may use other tensors of B rows. Each call
            draws new noise.
        reduction: ``"mean"`` (default) or ``"sum"`` over the batch, or ``"none"`` for [B].
        terms: return :class:`Marginal` (bound [B], log_responsibilities [B, C]), for any reduction.

    Returns:
        A number in nats, or [B], or Marginal. Processes that split a batch give ``bound`` a ``row_offset``
        counted in its rows: C times that of x.

    Raises:
        TypeError, ValueError: for an invalid argument, which the message names. Labels out of range give NaN
            where reading them would synchronise with the device.

    References:
        Kingma, Mohamed, Rezende & Welling, Semi-supervised Learning with Deep Generative Models, 2014, eqs. 6
        to 9 (model M2); Dilokthanakul et al., Deep Unsupervised Clustering with Gaussian Mixture Variational
        Autoencoders, 2016; Jiang et al., Variational Deep Embedding, 2017.

    Example:
        Clusters: y is given to the encoder, and to the prior of z, not to the decoder.

        >>> import torch, fastvae
        >>> class Encoder(torch.nn.Linear):
        ...     def forward(self, x, y):
        ...         return super().forward(torch.cat([x, y], 1))
        >>> class Decoder(torch.nn.Linear):
        ...     def forward(self, z, y):
        ...         return super().forward(z)
        >>> prior = torch.nn.Linear(3, 4)  # mu and logvar of p(z|y)
        >>> vae = fastvae.VAE(Encoder(11, 4), Decoder(2, 8), likelihood="bernoulli",
        ...                   prior=lambda y: prior(y).chunk(2, 1), modules=[prior])
        >>> def bound(x, y):
        ...     return vae.elbo(x, context=y, kl="mc", reduction="none")
        >>> x = torch.rand(16, 8)
        >>> (-fastvae.marginalize(x, bound, classes=3)).backward()
        >>> fastvae.marginalize(x, bound, classes=3, terms=True).log_responsibilities.argmax(1).shape
        torch.Size([16])

        Their log p(x), by importance sampling:

        >>> def log_px_of_class(x, y):
        ...     return vae.log_marginal(x, context=y, k=100).log_px
        >>> log_px = fastvae.marginalize(x, log_px_of_class, classes=3, reduction="none")

        M2: y is given to encoder and decoder; a classifier; labels of some examples.

        >>> classifier = torch.nn.Linear(8, 3)
        >>> m2 = fastvae.VAE(Encoder(11, 4), Encoder(5, 8), likelihood="bernoulli")
        >>> labels = torch.tensor([0, 2, 1, 0] + 12 * [-1])
        >>> def bound(x, y):
        ...     return m2.elbo(x, context=y, reduction="none")
        >>> J = fastvae.marginalize(x, bound, log_q=classifier(x), labels=labels, alpha=10.0)
        >>> (-J).backward()
    """
    like, batch = _batch_of(x)
    if not callable(bound):
        raise TypeError(
            f"bound must be a function of x and one-hot classes that returns [N]; got {type(bound).__name__}"
        )
    classes = _classes(classes, log_q, log_prior, like, batch)
    if labels is not None:
        _check_labels(labels, like, batch, classes)
    alpha = check_weight("alpha", alpha, "the weight of log q(y|x)", like, per_row=False)
    uses_label_weights = isinstance(alpha, Tensor) or alpha != 0
    if uses_label_weights and (log_q is None or labels is None):
        raise ValueError(
            "alpha is the weight of log q(y|x) in examples that have a label; it needs log_q and labels"
        )
    chunk = classes if class_chunk is None else check_count("class_chunk", class_chunk, "classes per call")
    check_choice("reduction", reduction, REDUCTIONS)

    bounds = _of_each_class(bound, x, like, batch, classes, chunk)
    given = [t.dtype for t in (bounds, log_q, log_prior) if t is not None]
    dtype = functools.reduce(torch.promote_types, given, torch.float32)
    # log p(x, y) + log C, so that a uniform prior needs no addition.
    joint = bounds.to(dtype)
    if log_prior is not None:
        joint = joint + (torch.log_softmax(log_prior.to(dtype), -1) + math.log(classes))
    if log_q is not None:
        log_q = torch.log_softmax(log_q.to(dtype), 1)
    result = _summed(joint, log_q, labels)
    if labels is not None:
        if log_q is not None and uses_label_weights:
            log_q_of_label = log_q.gather(1, labels.clamp(0, classes - 1)[:, None])[:, 0]
            result = result + torch.where(labels == -1, 0.0, alpha * log_q_of_label)
        if not _may_look(labels):
            result = result.masked_fill((labels < -1) | (labels >= classes), math.nan)
    if terms:
        return Marginal(result, torch.log_softmax(joint, 1) if log_q is None else log_q)
    return result if reduction == "none" else getattr(result, reduction)()


def _summed(joint: Tensor, log_q: Tensor | None, labels: Tensor | None) -> Tensor:
    """Sum over classes, given log p(x, y) + log C and log q(y|x), each [B, C]; returns the bounds [B].

    A label is treated as a classifier with probability 1.
    """
    classes = joint.shape[1]
    excluded = None
    if labels is not None:
        is_label = labels[:, None] == torch.arange(classes, device=labels.device)
        excluded = ~is_label & (labels != -1)[:, None]
    if log_q is None:
        return ops.log_mean_exp(joint if excluded is None else joint.masked_fill(excluded, -math.inf), dim=1)
    if excluded is not None:
        log_q = log_q.masked_fill(is_label, 0.0).masked_fill(excluded, -math.inf)
    weight = log_q.exp()
    # 0 · ∞ is NaN, in the gradient as well.
    return (weight * (joint - log_q).masked_fill(weight == 0, 0.0)).sum(1) - math.log(classes)


def _of_each_class(
    bound: Callable[[Any, Tensor], Tensor], x: Any, like: Tensor, batch: int, classes: int, chunk: int
) -> Tensor:
    """Compute F [B, C], in chunks of classes."""
    dtype = next((t.dtype for t in tensors(x) if t.dtype in FLOATING), torch.get_default_dtype())
    one_hot = torch.eye(classes, dtype=dtype, device=like.device)
    parts = []
    for some in one_hot.split(chunk):
        part = bound(_repeated(x, some.shape[0]), some.repeat(batch, 1))
        _check_bounds(part, batch, some.shape[0], like)
        parts.append(part.reshape(batch, some.shape[0]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _repeated(x: Any, times: int) -> Any:
    """Repeat each row consecutively, so that its position in the noise is the same in any shard."""

    def repeated(t: Tensor) -> Tensor:
        if not is_sparse(t):
            return t.repeat_interleave(times, 0)
        return at_rows(t, torch.arange(t.shape[0], device=t.device).repeat_interleave(times))

    return x if times == 1 else each(repeated, x)


def _check_bounds(part: Any, batch: int, classes: int, like: Tensor) -> None:
    rows = batch * classes

    def expected() -> str:  # not formatted without an error: that would fix a compiler's symbolic sizes
        return f"expected B·C = {batch}·{classes} bounds [{rows}], one for each row that it is given"

    if not isinstance(part, Tensor):
        is_result = isinstance(part, tuple) or is_dataclass(part)
        hint = ", such as its log_px or bound" if is_result else ""
        raise TypeError(f"bound returned {type(part).__name__}; {expected()}, in one tensor{hint}")
    if part.shape != (rows,):
        hint = ": give the objective reduction='none'" if part.dim() == 0 else ""
        raise ValueError(f"bound returned a tensor of shape {shape_of(part)}; {expected()}{hint}")
    if part.dtype not in FLOATING:
        raise TypeError(f"bound returned a tensor of {part.dtype}; {expected()}, of a floating-point dtype")
    if not on_same_device(part.device, like.device):
        raise ValueError(f"bound returned a tensor on {part.device} but x is on {like.device}; {expected()}")


def _batch_of(x: Any) -> tuple[Tensor, int]:
    """Return one tensor of x, and B."""
    parts = tensors(x)
    if not parts:
        raise TypeError(f"x must be a tensor [B, ...] or a dict of such, got {type(x).__name__}")
    if any(t.dim() == 0 or t.shape[0] != parts[0].shape[0] for t in parts):
        shapes = ", ".join(shape_of(t) for t in parts)
        raise ValueError(
            f"x has the shape {shapes}; the first axis must be the batch, of the same size in all"
        )
    for t in parts:
        check_same_device("x", t, "another part of x", parts[0])
    return parts[0], parts[0].shape[0]


def _classes(classes: Any, log_q: Any, log_prior: Any, like: Tensor, batch: int) -> int:
    """Return C, and validate that all arguments agree on it."""
    found: dict[str, int] = {}
    if classes is not None:
        found["classes"] = check_count("classes", classes, "the classes of y")
    if log_q is not None:
        check_tensor("log_q", log_q, 2, "[B, C]")
        found["log_q"] = log_q.shape[1]
    if log_prior is not None:
        check_tensor("log_prior", log_prior)
        if log_prior.dim() not in (1, 2):
            raise ValueError(f"log_prior has shape {shape_of(log_prior)}; expected [C] or [B, C]")
        found["log_prior"] = log_prior.shape[-1]
    if not found:
        raise ValueError("the number of classes is not known: give classes, log_q [B, C] or log_prior [C]")
    if len(set(found.values())) > 1:
        said = ", ".join(f"{n} by {name}" for name, n in found.items())
        raise ValueError(f"the number of classes is {said}; they must be equal")
    count = next(iter(found.values()))
    for name, value in (("log_q", log_q), ("log_prior", log_prior)):
        if value is None:
            continue
        check_same_device(name, value, "x", like)
        if value.dim() == 2 and value.shape[0] != batch:
            raise ValueError(f"{name} has shape {shape_of(value)}; expected [B, C] = [{batch}, {count}]")
        if not count:
            raise ValueError(f"{name} has shape {shape_of(value)}, without a class; expected at least one")
    return count


def _may_look(labels: Tensor) -> bool:
    return may_look(labels) and not functorch_is_active()


def _check_labels(labels: Any, like: Tensor, batch: int, classes: int) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        came = f"{labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        hint = "; fix it with labels.long()" if isinstance(labels, Tensor) else ""
        raise TypeError(f"labels must be a tensor of int64 [B], −1 where unknown; got {came}{hint}")
    if labels.shape != (batch,):
        hint = "; a one-hot tensor becomes labels by argmax(1)" if labels.dim() == 2 else ""
        raise ValueError(f"labels has shape {shape_of(labels)}; expected [B] = [{batch}]{hint}")
    check_same_device("labels", labels, "x", like)
    if _may_look(labels):
        wrong = (labels < -1) | (labels >= classes)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"labels must lie in 0 … {classes - 1}, or be −1 where unknown; example {row} has "
                f"{int(labels[row])}"
            )
