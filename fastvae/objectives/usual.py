"""The usual call of an objective: validated once, and sent to the two ops without the layers between.

For a model of ten features Python's layers cost more than the kernels. Any other call takes the general path,
which computes the same numbers from the same random state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.constants import cached_constant
from ..core.fast_path import in_eager_mode, is_native, is_usual
from ..core.hints import noted
from ..core.nested import note_of_call
from ..distributions import DiagonalNormal, Distribution, StandardNormal
from ..distributions.base import is_family
from ..distributions.draws import STANDARD
from ..distributions.normal import diagonal
from ..inputs.batch import Inputs
from ..inputs.misread import is_new, look
from ..likelihoods.declared import DECLARED, SHARED, Declared, of_the_event
from ..ops.normal_diagonal import direct_draw
from ..ops.op import accumulator
from ..ops.reduce import BoundReduction, direct_reduce
from ..random import draw_seed
from .reduce import reduce_parameters


def usual_bound(
    x: Any,
    q: Any,
    decoder: Any,
    likelihood: Any,
    prior: Any,
    k: int,
    how: BoundReduction,
    estimator: str | None,
    generator: torch.Generator | None,
) -> Tensor | None:
    """Return the bound of a call without conditioning inputs, or None if it is not usual.

    Usual are plain tensors x [B, *event] and q, a pair of [B, D], [B, 2 D] or a VAE's reading of these, on
    the CPU or one GPU, in eager mode on the native backend, one of fastvae's likelihoods with a fused op, and
    the prior N(0, I). A decoder may return anything.

    Args:
        x: data, not yet validated, as are the next four.
        q: the encoder's output.
        decoder: the decoder.
        likelihood: the likelihood.
        prior: the prior.
        k: draws per example.
        how: the reduction.
        estimator: gradient of the log-ratio that reaches q; None for the KL in place of the log-ratio.
        generator: source of the noise.
    """
    known = SHARED.get(likelihood) if type(likelihood) is str else likelihood
    if not isinstance(known, Declared) or not _is_own(known):
        return None
    if prior is not None and not (isinstance(prior, Distribution) and is_family(prior, StandardNormal)):
        return None
    pair = _pair(x, q) if in_eager_mode() and is_native(x) else None
    if pair is None or not callable(decoder) or k > 2**32:
        return None
    if x.requires_grad and not known.differentiable:
        return None
    mu, logvar = pair
    z, term, counter = direct_draw(mu, logvar, draw_seed(mu.device, generator), k, estimator)
    try:
        output = decoder(z)
    except Exception as error:
        noted(error, note_of_call("decoder", z, None))
        raise
    parameters = _parameters(known, x, k, output)
    if parameters is None:
        inputs = Inputs(x, diagonal(mu, logvar), decoder, known, STANDARD)
        return reduce_parameters(inputs, z, inputs.read_output(z, output, k), term, k, None, how, False)[0]
    if (known.reads or known.counts) and is_new(decoder):
        look(decoder, known, x, output, output)
    if x.dim() > 2:
        # The likelihood's own numbers and rows stay as they are.
        x, parameters = x.flatten(1), tuple([p if p.dim() < 2 else p.flatten(1) for p in parameters])
    return direct_reduce(known.name, x, parameters, term, how, counter)


def _pair(x: Any, q: Any) -> tuple[Tensor, Tensor] | None:
    """Return mu and logvar, [B, D] each, if they and x [B, *event] are usual and x is not empty."""
    gpu = None if x.is_cpu else x.device
    if not is_usual(x, gpu) or x.dim() < 2 or not x.numel():
        return None
    if type(q) is Tensor:
        if not is_usual(q, gpu) or q.dim() != 2:
            return None
        batch, width = q.shape
        if batch != x.shape[0] or width % 2 or not width:
            return None
        mu, logvar = q.chunk(2, 1)
        return mu, logvar
    if type(q) is DiagonalNormal and q.form is None and q.latent is None and q.z_dtype is None:
        q = q.mu, q.logvar
    if type(q) is not tuple or len(q) != 2 or not (is_usual(q[0], gpu) and is_usual(q[1], gpu)):
        return None
    shape = q[0].shape
    fits = len(shape) == 2 and shape[0] == x.shape[0] and q[1].shape == shape and q[1].dtype == q[0].dtype
    return q if fits else None


def _parameters(known: Declared, x: Tensor, k: int, output: Any) -> tuple[Tensor, ...] | None:
    """Return all parameters of the fused op if the decoder's are usual, [K·B, *event] each, else None."""
    returned = output if type(output) is tuple else (output,)
    given = known._given(x)
    if len(returned) + len(given) != len(known.outputs) or not in_eager_mode():
        return None
    shape = (k * x.shape[0], *x.shape[1:])
    gpu = None if x.is_cpu else x.device
    if not all([is_usual(p, gpu) and p.shape == shape for p in returned]):
        return None
    if not given:
        return returned
    wide = accumulator(returned[0].dtype)
    own = [_number(p, wide, gpu) if type(p) is float else of_the_event(p, returned[0], x) for p in given]
    return known._arranged(returned, own) if all([is_usual(p, gpu) for p in own]) else None


def _number(value: float, dtype: torch.dtype, gpu: torch.device | None) -> Tensor:
    """Return a likelihood's own number as a tensor, which later calls share."""
    if gpu is None:
        return _shared_number(value, dtype, "cpu", 0)
    if torch.cuda.is_current_stream_capturing():
        # Memory of the graph, in which it is written at each replay.
        return torch.full((), value, dtype=dtype, device=gpu)
    # Another stream might read it before it is written.
    return _shared_number(value, dtype, gpu, torch.cuda.current_stream(gpu).cuda_stream)


@cached_constant(64)
def _shared_number(value: float, dtype: torch.dtype, device: torch.device | str, stream: int) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


_own: dict[type[Declared], bool] = {}


def _is_own(known: Declared) -> bool:
    """Return True for a likelihood of fastvae's, not a subclass, that reads the decoder's output as it is."""
    kind = type(known)
    own = _own.get(kind)
    if own is None:
        own = _own[kind] = DECLARED.get(kind.name) is kind and kind.fused is Declared.fused
    return own and not known.converts
