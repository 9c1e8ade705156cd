"""Script for test_decoders that prints a line per sharded or replicated decoder.

``python -m tests.sharded`` runs one process, a world of size one, with gloo. A line has the name, whether the
last layer can be fused, and the bound and the norms of the gradients, or the error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastvae
from fastvae.ops import head

from .decoders import HIDDEN

D, X, B, K = 3, 160, 13, 130


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(D, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, X))


def fused_head() -> nn.Module:
    return fastvae.FusedHead(nn.Sequential(nn.Linear(D, HIDDEN), nn.Tanh()), nn.Linear(HIDDEN, X))


def _decoder(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[fastvae.VAE], nn.Module]:
    def apply(vae: fastvae.VAE) -> nn.Module:
        vae.decoder = wrap(vae.decoder)
        return vae

    return apply


def _last(vae: fastvae.VAE) -> nn.Module:
    fully_shard(vae.decoder[-1])
    return vae


def _both(vae: fastvae.VAE) -> nn.Module:
    fully_shard(vae.decoder)
    return fully_shard(vae)


WRAPPED = {
    "FSDP1": lambda vae: FullyShardedDataParallel(vae, device_id=torch.device("cpu")),
    "FSDP1 of original parameters": lambda vae: FullyShardedDataParallel(
        vae, device_id=torch.device("cpu"), use_orig_params=True
    ),
    "FSDP1 of the decoder": _decoder(
        lambda d: FullyShardedDataParallel(d, device_id=torch.device("cpu"), use_orig_params=True)
    ),
    "FSDP2": fully_shard,
    "FSDP2 of the decoder": _decoder(fully_shard),
    "FSDP2 of the decoder, too": _both,
    "FSDP2 of the last layer": _last,
    "DDP": DistributedDataParallel,
    "DDP of unused parameters": lambda vae: DistributedDataParallel(vae, find_unused_parameters=True),
    "DDP of the decoder": _decoder(DistributedDataParallel),
    "DDP of the decoder, of unused parameters": _decoder(
        lambda d: DistributedDataParallel(d, find_unused_parameters=True)
    ),
}


def outcome(make: Callable[[], nn.Module], wrap: Callable[[fastvae.VAE], nn.Module], fuse: bool) -> str:
    torch.manual_seed(0)
    vae = fastvae.VAE(nn.Linear(X, 2 * D), make(), likelihood="bernoulli", latent_dim=D, fuse=fuse)
    x = torch.rand(B, X).round()
    model = wrap(vae)
    try:
        torch.manual_seed(1)
        bound = model(x, objective="iwae", k=K)
        bound.backward()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    numbers = [bound.detach()]
    for p in model.parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        numbers.append(torch.full((), -1.0) if grad is None else grad.norm())
    return " ".join(f"{float(n):.6g}" for n in numbers)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    head.FEWEST_BY_BLAS, head.NUMBERS_PER_INPUT = head.FEWEST_NUMBERS, 0
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    for name, wrap in WRAPPED.items():
        for fuse in (False, True):
            print(name, fuse, outcome(plain, wrap, fuse), sep="|", flush=True)
        if name != "FSDP2 of the last layer":
            print(name, "FusedHead", outcome(fused_head, wrap, True), sep="|", flush=True)
    distributed.destroy_process_group()
