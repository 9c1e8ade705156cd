"""FSDP2: sharded parameters in bfloat16, accumulated gradients, checkpoint and resume, evaluation.

``python docs/examples/fsdp2_vae.py`` trains on two processes that it starts.
"""

import tempfile

import torch
from digits import BATCH, build_vae, digits, say
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

WORLD, ACCUMULATE, EPOCHS = 2, 2, 8


def build():
    vae, mesh = build_vae(), init_device_mesh("cpu", (WORLD,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (vae.encoder, vae.decoder):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(vae, mesh=mesh)  # the root: x and the bound stay in float32
    return vae, torch.optim.Adam(vae.parameters(), lr=2e-3)


def train(vae, optimizer, data, epochs):
    sampler = DistributedSampler(data)
    loader = DataLoader(TensorDataset(data), BATCH, sampler=sampler)
    for epoch in epochs:
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch)  # the same on each rank: row_offset keeps their noise apart
        for i, (x,) in enumerate(loader, 1):
            syncs = i % ACCUMULATE == 0
            vae.set_requires_gradient_sync(syncs)
            loss = -vae(x, objective="iwae", k=5, row_offset=distributed.get_rank() * BATCH)
            (loss / ACCUMULATE).backward()
            if syncs:
                optimizer.step()
                optimizer.zero_grad()


def state_of(vae, optimizer):
    model, optim = get_state_dict(vae, optimizer)
    return {"model_state_dict": model, "optim_state_dict": optim}


def main(rank, folder):
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    first, second = range(EPOCHS // 2), range(EPOCHS // 2, EPOCHS)
    data, test = digits()

    whole, optimizer = build()
    train(whole, optimizer, data, first)
    checkpoint.save(state_of(whole, optimizer), checkpoint_id=f"{folder}/half")
    train(whole, optimizer, data, second)

    resumed, optimizer = build()
    state = state_of(resumed, optimizer)
    checkpoint.load(state, checkpoint_id=f"{folder}/half")
    set_state_dict(resumed, optimizer, **state)
    train(resumed, optimizer, data, second)

    # Every rank evaluates all images, since all gather the parameters together.
    result = resumed.evaluate(test, k=500, shard="none", progress=False)
    one, other = ([p.full_tensor() for p in vae.parameters()] for vae in (whole, resumed))
    if rank == 0:
        say(-result.nll, len(result.log_px), all(map(torch.equal, one, other)))
        mine = sum(p.to_local().numel() for p in resumed.parameters())
        print(f"parameters: {mine} of {sum(p.numel() for p in resumed.parameters())} on rank 0")
    distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(main, (folder,), nprocs=WORLD)
