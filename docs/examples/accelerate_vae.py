"""Accelerate: bfloat16, accumulated gradients, checkpoint and resume, evaluation over the ranks.

``python docs/examples/accelerate_vae.py`` trains on two processes that it starts.
"""

import tempfile

import accelerate
import torch
from digits import BATCH, build_vae, digits, say
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 8


def build(accelerator, data):
    accelerate.utils.set_seed(0)
    vae = build_vae()
    loader = DataLoader(TensorDataset(data), BATCH, shuffle=True)
    return accelerator.prepare(vae, torch.optim.Adam(vae.parameters(), lr=2e-3), loader)


def train(accelerator, vae, optimizer, loader, epochs):
    for epoch in epochs:
        loader.set_epoch(epoch)
        for (x,) in loader:
            with accelerator.accumulate(vae):
                # All ranks have the same seed: row_offset keeps their noise apart.
                loss = -vae(x, objective="iwae", k=5, row_offset=accelerator.process_index * BATCH)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()


def main(folder):
    # The seedable sampler makes an epoch's order the same after a resumption.
    loading = accelerate.utils.DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2, dataloader_config=loading
    )
    first, second = range(EPOCHS // 2), range(EPOCHS // 2, EPOCHS)
    data, test = digits()

    whole = build(accelerator, data)
    train(accelerator, *whole, first)
    accelerator.save_state(folder)
    train(accelerator, *whole, second)

    accelerator.free_memory()
    resumed = build(accelerator, data)
    accelerator.load_state(folder)  # the random state, too
    train(accelerator, *resumed, second)

    vae = accelerator.unwrap_model(resumed[0])
    result = vae.evaluate(test, k=500, progress=False)  # each rank evaluates its share
    if accelerator.is_main_process:
        equal = all(map(torch.equal, whole[0].parameters(), resumed[0].parameters()))
        say(-result.nll, len(result.log_px), equal)
    accelerator.end_training()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        accelerate.debug_launcher(main, (folder,), num_processes=2)  # or: accelerate launch
