"""log_mean_exp."""

from __future__ import annotations

import math

import torch

from fastvae import ops

from .latent import EXP
from .measure import COMPILE, OURS, op_works


def works():
    for k, n in ((1, 128), (50, 128), (50, 8192), (5000, 256)):

        def eager(log_w, k=k):
            return torch.logsumexp(log_w, 0) - math.log(k)

        torch.manual_seed(0)
        inputs = (10 * torch.randn(k, n, requires_grad=True).detach(),)
        inputs[0].requires_grad_()
        forward = 4 * (k * n + n)
        yield from op_works(
            "log_mean_exp",
            f"{k}×{n}",
            inputs,
            {OURS: ops.log_mean_exp, "eager": eager},
            lambda outputs, *wide, eager=eager: eager(*wide),
            sampling=False,
            elements=k * n,
            moved=(forward, forward + 4 * (2 * k * n + n)),
            operations=(k * n * (EXP + 3), k * n * (2 * EXP + 6)),
            target={"eager": 2.0, COMPILE: 1.0} if k == 5000 else {},
        )
