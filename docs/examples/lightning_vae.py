"""Lightning: a LightningModule with its own encoder and decoder, and a VAE that registers nothing twice.

``python docs/examples/lightning_vae.py`` trains it on two processes, in bfloat16 and with accumulated
gradients, and resumes from a checkpoint.
"""

import functools
import logging
import tempfile
import warnings

import lightning
import torch
from digits import BATCH, digits, networks, say
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import fastvae

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = networks()

    @functools.cached_property  # a plain attribute: state_dict has encoder.* and decoder.*, as without a VAE
    def vae(self):
        return fastvae.VAE(self.encoder, self.decoder, likelihood="bernoulli", latent_dim=4)

    def on_train_batch_start(self, batch, index):
        # Lightning saves no random state. The ranks share the seed: row_offset keeps their noise apart.
        torch.manual_seed(1000 * self.current_epoch + index)

    def training_step(self, batch, index):
        (x,) = batch
        return -self.vae.iwae(x, k=5, row_offset=self.global_rank * BATCH)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def train(folder, resume=None):
    lightning.seed_everything(0, verbose=False)
    model = Digits()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", precision="bf16-mixed", max_epochs=6,
        accumulate_grad_batches=2, callbacks=ModelCheckpoint(folder, "{epoch}", save_top_k=-1), logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(digits()[0]), BATCH, shuffle=True)
    trainer.fit(model, loader, ckpt_path=resume)
    return model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        whole = train(folder)
        resumed = train(f"{folder}/resumed", f"{folder}/epoch=2.ckpt")
    result = resumed.vae.evaluate(digits()[1], k=500, progress=False)
    say(-result.nll, len(result.log_px), all(map(torch.equal, whole.parameters(), resumed.parameters())))
    print("state_dict:", *whole.state_dict())
