"""torch.compile and DistributedDataParallel: one graph while β warms up, bfloat16, checkpoint and resume.

``python docs/examples/compile_vae.py`` trains on two processes that it starts. β is a tensor, since each new
number would be compiled anew.
"""

import contextlib
import copy
import tempfile

import torch
from digits import BATCH, build_vae, digits, say
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastvae

WORLD, ACCUMULATE, EPOCHS = 2, 2, 8
BETA = fastvae.schedules.linear(0.0, 1.0, EPOCHS // 2)


def train(ddp, optimizer, data, epochs):
    sampler = DistributedSampler(data)
    loader = DataLoader(TensorDataset(data), BATCH, sampler=sampler)
    for epoch in epochs:
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch)  # the same on each rank: row_offset keeps their noise apart
        for i, (x,) in enumerate(loader, 1):
            syncs = i % ACCUMULATE == 0
            with contextlib.nullcontext() if syncs else ddp.no_sync():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = -ddp(x, beta=BETA(epoch), row_offset=distributed.get_rank() * BATCH)
                (loss / ACCUMULATE).backward()
            if syncs:
                optimizer.step()
                optimizer.zero_grad()


def main(rank, folder):
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    first, second = range(EPOCHS // 2), range(EPOCHS // 2, EPOCHS)
    data, test = digits()

    vae = build_vae()
    ddp = DistributedDataParallel(torch.compile(vae, fullgraph=True))
    optimizer = torch.optim.Adam(ddp.parameters(), lr=2e-3)
    train(ddp, optimizer, data, first)
    half = copy.deepcopy([vae.state_dict(), optimizer.state_dict()])  # of vae: without _orig_mod in the keys
    train(ddp, optimizer, data, second)

    whole = copy.deepcopy(vae)
    vae.load_state_dict(half[0])
    optimizer.load_state_dict(half[1])
    train(ddp, optimizer, data, second)

    result = vae.evaluate(test, k=500, progress=False)  # each rank evaluates its share
    if rank == 0:
        say(-result.nll, len(result.log_px), all(map(torch.equal, whole.parameters(), vae.parameters())))
        print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])
    distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(main, (folder,), nprocs=WORLD)
