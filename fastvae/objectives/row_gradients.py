"""Checks before the gradient at each draw of z is weighted: rows independent in the decoder, and float16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.torch_private import AnyBatchNorm, gradient_dtypes
from ..inputs.batch import Inputs
from ..inputs.last_layer import called_by


def check_rows_apart(decoder: Any, draws: int, what: str) -> None:
    """Reject a decoder that mixes rows, where each sample's gradient by z is weighted separately."""
    decoder = called_by(decoder)
    if draws == 1 or not isinstance(decoder, torch.nn.Module):
        return
    for name, module in decoder.named_modules():
        if isinstance(module, AnyBatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{what} weighs the gradient that reaches each sample of z by itself, but the decoder's "
                f"{name or 'module'}, a {type(module).__name__}, takes statistics over all samples: the "
                "gradient of q would be wrong. Use estimator='iwae' or 'stl', decoder.eval(), or a "
                "normalization of each row, such as GroupNorm"
            )


class Float16Gradients:
    """Detector of float16 gradients by z, whose range is too small for the least share of a sample.

    It looks at the decoder's parameters, autocast, the z of q, and each step of the decoder's graph. A
    compiled decoder hides its steps, and a compiled objective its graph.
    """

    def __init__(self, inputs: Inputs):
        owner = called_by(inputs.decoder)
        parameters = owner.parameters() if isinstance(owner, torch.nn.Module) else ()
        kind = inputs.device.type
        cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        narrow = inputs.q.z_dtype == torch.float16 or any(p.dtype == torch.float16 for p in parameters)
        self.found = cast or narrow

    def see(self, z: Tensor, outputs: list[Tensor]) -> None:
        self.found = self.found or any(t.dtype == torch.float16 for t in (z, *outputs))
        if not self.found and not torch.compiler.is_compiling():
            self.found = torch.float16 in gradient_dtypes(outputs, z)
