"""The usual call of an objective: validated once, and sent to the C++ without the layers between.

For a model of ten features Python's layers cost more than the kernels. Any other call takes the general path,
which computes the same numbers from the same random state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import backend as _backend
from ..core.fast_path import in_eager_mode, is_usual
from ..core.hints import noted
from ..core.nested import note_of_call
from ..distributions import STANDARD, diagonal
from ..inputs.batch import Inputs
from ..inputs.misread import is_new, look
from ..likelihoods.declared import SHARED, Declared
from ..ops.normal_diagonal import direct_draw
from ..ops.reduce import BoundReduction, direct_reduce
from ..random import draw_seed
from .reduce import reduce_parameters


def usual_bound(
    x: Any,
    q: Any,
    decoder: Any,
    likelihood: Any,
    k: int,
    how: BoundReduction,
    estimator: str | None,
    generator: torch.Generator | None,
) -> Tensor | None:
    """Return the bound for the prior N(0, I) without conditions, or None for a call that is not usual.

    Usual are plain CPU tensors x [B, X] and q, a pair of [B, D] or [B, 2 D], in eager mode on the native
    backend, and a named likelihood without parameters of its own. A decoder may return anything.

    Args:
        x: data, not yet validated, as are the next three.
        q: the encoder's output.
        decoder: the decoder.
        likelihood: the likelihood.
        k: draws per example.
        how: the reduction.
        estimator: gradient of the log-ratio that reaches q; None for the KL in place of the log-ratio.
        generator: source of the noise.
    """
    known = SHARED.get(likelihood) if type(likelihood) is str else None
    pair = _pair(x, q) if known is not None and _backend.on_cpu() == "native" and in_eager_mode() else None
    if pair is None or not callable(decoder) or k > 2**32:
        return None
    assert known is not None
    if x.requires_grad and not known.differentiable:
        return None
    mu, logvar = pair
    z, term = direct_draw(mu, logvar, draw_seed(mu.device, generator), k, estimator)
    try:
        output = decoder(z)
    except Exception as error:
        noted(error, note_of_call("decoder", z, None))
        raise
    parameters = output if type(output) is tuple else (output,)
    if not _fits(known, x, k, parameters):
        inputs = Inputs(x, diagonal(mu, logvar), decoder, known, STANDARD)
        return reduce_parameters(inputs, z, inputs.read_output(z, output, k), term, k, None, how, False)[0]
    if (known.reads or known.counts) and is_new(decoder):
        look(decoder, known, x, output)
    return direct_reduce(known.name, x, parameters, term, how)


def _pair(x: Any, q: Any) -> tuple[Tensor, Tensor] | None:
    """Return mu and logvar, [B, D] each, if they and x [B, X] are usual and x is not empty."""
    if not is_usual(x) or x.dim() != 2 or not x.numel():
        return None
    if type(q) is Tensor:
        if not is_usual(q) or q.dim() != 2:
            return None
        batch, width = q.shape
        if batch != x.shape[0] or width % 2 or not width:
            return None
        mu, logvar = q.chunk(2, 1)
        return mu, logvar
    if type(q) is not tuple or len(q) != 2 or not (is_usual(q[0]) and is_usual(q[1])):
        return None
    shape = q[0].shape
    fits = len(shape) == 2 and shape[0] == x.shape[0] and q[1].shape == shape and q[1].dtype == q[0].dtype
    return q if fits else None


def _fits(known: Declared, x: Tensor, k: int, parameters: tuple[Any, ...]) -> bool:
    """Return True if the decoder's outputs are all that the likelihood takes, [K·B, X] each."""
    if len(parameters) != _number_of_outputs(known, x) or not in_eager_mode():
        return False
    shape = (k * x.shape[0], x.shape[1])
    return all([is_usual(p) and p.shape == shape for p in parameters])


_numbers: dict[str, int] = {}


def _number_of_outputs(known: Declared, x: Tensor) -> int:
    """Return the number of a likelihood's outputs; 0 if it has some of its own, or reads them in its way."""
    number = _numbers.get(known.name)
    if number is None:
        own = type(known).fused is not Declared.fused or not known.is_declared or known.converts
        number = _numbers[known.name] = 0 if own or known._given(x) else len(known.outputs)
    return number
