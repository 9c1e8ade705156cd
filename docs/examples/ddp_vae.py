"""DistributedDataParallel: bfloat16, accumulated gradients, checkpoint and resume, evaluation over the ranks.

``python docs/examples/ddp_vae.py`` trains on two processes that it starts.
"""

import contextlib
import tempfile

import torch
from digits import BATCH, build_vae, digits, say
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

WORLD, ACCUMULATE, EPOCHS = 2, 2, 8


def build():
    ddp = DistributedDataParallel(build_vae())
    return ddp, torch.optim.Adam(ddp.parameters(), lr=2e-3)


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
                    loss = -ddp(x, objective="iwae", k=5, row_offset=distributed.get_rank() * BATCH)
                (loss / ACCUMULATE).backward()
            if syncs:
                optimizer.step()
                optimizer.zero_grad()


def main(rank, folder):
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    first, second = range(EPOCHS // 2), range(EPOCHS // 2, EPOCHS)
    data, test = digits()

    whole, optimizer = build()
    train(whole, optimizer, data, first)
    if rank == 0:
        torch.save([whole.module.state_dict(), optimizer.state_dict()], f"{folder}/half.pt")
    distributed.barrier()
    train(whole, optimizer, data, second)

    resumed, optimizer = build()
    states = torch.load(f"{folder}/half.pt")
    resumed.module.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    train(resumed, optimizer, data, second)

    result = resumed.module.evaluate(test, k=500, progress=False)  # each rank evaluates its share
    if rank == 0:
        equal = all(map(torch.equal, whole.parameters(), resumed.parameters()))
        say(-result.nll, len(result.log_px), equal)
    distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(main, (folder,), nprocs=WORLD)
