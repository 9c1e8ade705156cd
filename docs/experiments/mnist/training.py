"""Training that can be interrupted, on a CPU or, as CUDA graphs, on a GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae

from .runs import RUNS, beta_of, build


class Trained(NamedTuple):
    """A model, its epochs, the seconds of training, and the mean bound of each epoch on its training data."""

    vae: fastvae.VAE
    epochs: int
    seconds: float
    curve: list[float]


def trained(
    name: str, train: Tensor, epochs: int, folder: Path, graph: bool = False, train_on: bool = True
) -> Trained:
    """Return a run's model after this many epochs, continued from its checkpoint in the folder.

    Args:
        name: a run of RUNS.
        train: training images [N, pixels] in [0, 1], on the device.
        epochs: epochs in total, those of the checkpoint included.
        folder: folder of checkpoints, one file per run, written after each epoch.
        graph: replay the step as a CUDA graph.
        train_on: False to return the checkpoint as it is.
    """
    run, file = RUNS[name], folder / f"{name}.pt"
    torch.manual_seed(0)
    vae = build(run, train).to(train.device)
    # A learning rate that changes is a tensor in a graph, changed in place.
    rate: Any = torch.tensor(run.rate(0), device=train.device) if graph else run.rate(0)
    optimizer = torch.optim.Adam(vae.parameters(), lr=rate, eps=run.eps, capturable=graph, fused=not graph)
    beta = torch.ones((), device=train.device)
    data = torch.bernoulli(train, generator=_noise(train, -1)) if run.static else train
    done, seconds, curve = 0, 0.0, []
    if file.exists():
        found = torch.load(file, map_location=train.device)
        vae.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        done, seconds, curve = found["epochs"], found["seconds"], found["curve"]

    def step(x: Tensor, beta: Tensor) -> Tensor:
        optimizer.zero_grad()
        bound = RUNS[name].objective(vae, x, beta)
        (-bound).backward()
        optimizer.step()
        return bound.detach()

    if graph:
        step = fastvae.graphed(step)
    while train_on and done < epochs:
        begin, total = time.perf_counter(), torch.zeros((), device=train.device)
        torch.manual_seed(done + 1)
        noise = _noise(train, done)
        if graph:
            rate.fill_(run.rate(done))
        else:
            optimizer.param_groups[0]["lr"] = run.rate(done)
        beta.fill_(beta_of(run, done))
        x = data if run.static else torch.bernoulli(data, generator=noise)
        order = torch.randperm(len(x), generator=noise, device=x.device)
        for rows in order.split(run.batch):
            total += step(x[rows], beta) * len(rows)
        curve.append(total.item() / len(x))
        done += 1
        seconds += time.perf_counter() - begin
        state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict()}
        part = file.with_suffix(".part")
        torch.save(state | {"epochs": done, "seconds": seconds, "curve": curve}, part)
        part.rename(file)
        print(f"{name}: epoch {done}, {curve[-1]:.2f} nats, {seconds:.0f} s", file=sys.stderr, flush=True)
    return Trained(vae.eval(), done, seconds, curve)


def _noise(like: Tensor, epoch: int) -> torch.Generator:
    """Return the generator of an epoch's data, the same for a run that was interrupted."""
    return torch.Generator(like.device).manual_seed(1000 + epoch)
