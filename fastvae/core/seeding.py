"""Torch's generator in a state that a seed determines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import SHARED


def check_philox(seed: Tensor) -> None:
    """Reject seeds of quasi-Monte-Carlo noise, which torch's samplers do not support."""
    if seed.dim():
        raise ValueError(
            "noise='qmc' needs a q that is a function of fastvae's noise, but this one's is torch's own: "
            "a torch.distributions object that is not a function of normals and has no icdf, or a flow with "
            "such a base. Use noise='philox', or a q whose rsample_log_prob calls fastvae.random.normal"
        )


def _check_own_rows(row_offset: int) -> None:
    """Reject noise that all rows share, which torch's samplers do not support."""
    if row_offset == SHARED:
        raise ValueError(
            "shared_noise=True needs a q that is a function of fastvae's noise, but this one's is torch's "
            "own: a torch.distributions object that is not a function of normals and has no icdf, or a flow "
            "with such a base. Leave shared_noise out, or use a q whose rsample_log_prob calls "
            "fastvae.random.normal"
        )


class seeded:
    """Context manager that seeds torch's generator from these arguments, and restores its state on exit."""

    def __init__(self, seed: Tensor, device: torch.device, sample_offset: int, row_offset: int):
        check_philox(seed)
        _check_own_rows(row_offset)
        mixed = int(seed) + 0x9E3779B97F4A7C15 * (sample_offset + 1) + 0xC2B2AE3D27D4EB4F * (row_offset + 1)
        self._seed = mixed % 2**63
        # torch.manual_seed would reseed every device.
        self._generator = torch.default_generator
        if device.type != "cpu":
            self._generator = torch.get_device_module(device).default_generators[device.index]
        devices = [] if device.type == "cpu" else [device]
        self._fork = torch.random.fork_rng(devices, device_type=device.type)

    def __enter__(self) -> None:
        self._fork.__enter__()
        self._generator.manual_seed(self._seed)

    def __exit__(self, *error: Any) -> Any:
        return self._fork.__exit__(*error)
