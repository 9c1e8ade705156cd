"""Decoders whose outputs name their parameters, in every form."""

from __future__ import annotations

import collections
import math
import types
from dataclasses import make_dataclass

import torch
from torch import nn

from .cases import DEVICE

K, B, D, X = 5, 3, 2, 7


class ModelOutput(collections.OrderedDict):
    """Mapping whose entries are attributes, too, as in diffusers, transformers and pythae."""

    def __getattr__(self, name):
        return self[name]


class Decoder(nn.Module):
    """A linear layer for each name, of an output shape, returned as ``form`` makes it."""

    def __init__(self, shapes, form, activation=None, dtype=torch.float32):
        super().__init__()
        self.shapes, self.form, self.activation = shapes, form, activation
        generator = torch.Generator().manual_seed(3)
        self.weights = nn.ParameterDict(
            {
                name: (0.5 * torch.randn(D, math.prod(shape), generator=generator)).to(DEVICE, dtype)
                for name, shape in shapes.items()
            }
        )

    def forward(self, z):
        out = {n: (z @ self.weights[n]).reshape(len(z), *s) for n, s in self.shapes.items()}
        if self.activation is not None:
            out = {n: self.activation(t) for n, t in out.items()}
        return self.form(out)


def as_tuple(out):
    return tuple(out.values()) if len(out) > 1 else next(iter(out.values()))


def reversed_with_more(out):
    more = {"features": torch.ones(4), "epoch": 3, "loss": None}
    return {**more, **dict(reversed(out.items()))}


FORMS = {
    "mapping": reversed_with_more,
    "model output": lambda out: ModelOutput(**out),
    "object": lambda out: types.SimpleNamespace(**out, z=torch.ones(3)),
    "dataclass": lambda out: make_dataclass("Out", list(out))(**out),
    "named tuple": lambda out: collections.namedtuple("Out", reversed(out))(**out),
}


def posterior(dtype=torch.float32):
    return 0.3 * torch.randn(B, 2 * D, generator=torch.Generator().manual_seed(4)).to(DEVICE, dtype)


def graded(run, decoder):
    """Return the value of ``run(decoder)`` and its gradients."""
    torch.manual_seed(7)
    value = run(decoder)
    return [value, *torch.autograd.grad(value.sum(), list(decoder.parameters()))]


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def positive(t):
    return nn.functional.softplus(t) + 0.1
