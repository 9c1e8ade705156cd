"""Lightning, Accelerate and DDP: the examples print what they should, and old checkpoints load strictly."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae

from . import run_example

# Untrained the examples have 64 log ½ = -44.4, and Lightning's -27.3 after half of its training.
TRAINED = -27.0


def check_example(name: str) -> list[str]:
    """Run an example and validate its first two lines; return the others."""
    first, second, *others = run_example(name).splitlines()
    log_px, images = first.removeprefix("log p(x): ").split(" nats, of ")
    assert TRAINED < float(log_px) < -20 and images == "261 images"
    assert second == "resumed: equal"
    return others


@pytest.mark.slow
def test_ddp():
    assert check_example("ddp_vae") == []


@pytest.mark.slow
def test_accelerate():
    assert check_example("accelerate_vae") == []


@pytest.mark.slow
def test_lightning():
    (keys,) = check_example("lightning_vae")
    names = [f"{part}.{i}.{p}" for part in ("encoder", "decoder") for i in (0, 2) for p in ("weight", "bias")]
    assert keys == f"state_dict: {' '.join(names)}"


@pytest.fixture(scope="module")
def modules():
    """Return LightningModules by name: before fastvae, with functions, a cached VAE, a member."""
    import lightning

    class Before(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(7, 4), nn.Linear(2, 7)

        def training_step(self, batch, index):
            mu, logvar = self.encoder(batch[0]).chunk(2, dim=1)
            logits = self.decoder(mu + (0.5 * logvar).exp() * torch.randn_like(mu))
            nll = nn.functional.binary_cross_entropy_with_logits(logits, batch[0], reduction="sum")
            return (nll - 0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()) / len(mu)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Functions(Before):
        def training_step(self, batch, index):
            return -fastvae.elbo(batch[0], self.encoder(batch[0]), self.decoder, likelihood="bernoulli")

    class Cached(Before):
        @functools.cached_property
        def vae(self):
            return fastvae.VAE(self.encoder, self.decoder, likelihood="bernoulli")

        def training_step(self, batch, index):
            return -self.vae.elbo(batch[0])

    class Member(Before):
        def __init__(self):
            super().__init__()
            self.vae = fastvae.VAE(self.encoder, self.decoder, likelihood="bernoulli")

    return {cls.__name__: cls for cls in (Before, Functions, Cached, Member)}


@pytest.fixture
def checkpoint(modules, tmp_path):
    """Train the module of before for an epoch; return its weights and Lightning's checkpoint."""
    import lightning

    model = modules["Before"]()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(torch.rand(20, 7).round()), 10))
    trainer.save_checkpoint(path := tmp_path / "before.ckpt")
    return model.state_dict(), path


@pytest.mark.parametrize("name", ["Functions", "Cached"])
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_an_old_checkpoint_loads_strictly(modules, checkpoint, name):
    """The keys are the old ones, also once the VAE was used, copied and trained."""
    state, path = checkpoint
    used = modules[name]()
    x = torch.rand(5, 7).round()
    used.training_step([x], 0).backward()
    assert all(p.grad is not None for p in used.parameters())
    for model in (used, copy.deepcopy(used)):
        assert list(model.state_dict()) == list(state)
        model.load_state_dict(state, strict=True)
        assert len(list(model.parameters())) == 4
    loaded = modules[name].load_from_checkpoint(path, strict=True)
    torch.manual_seed(3)
    expected = -fastvae.elbo(x, loaded.encoder(x), loaded.decoder, likelihood="bernoulli")
    for model in (loaded, used):  # its VAE computes with the loaded weights
        torch.manual_seed(3)
        assert torch.equal(model.training_step([x], 0), expected)


def test_a_copy_has_its_own_networks(modules):
    model = modules["Cached"]()
    twin = copy.deepcopy(model) if model.vae else None
    assert twin.vae.encoder is twin.encoder is not model.encoder
    assert model.to(torch.float64).vae.decoder.weight.dtype == torch.float64
    assert not model.eval().vae.encoder.training


def test_a_learned_likelihood_is_a_member(modules):
    """A cached VAE registers nothing, so the module registers what its likelihood learns."""

    class Learned(modules["Cached"]):
        def __init__(self):
            super().__init__()
            self.likelihood = fastvae.likelihoods.Gaussian(scale=0.1, learned=True)

        @functools.cached_property
        def vae(self):
            return fastvae.VAE(self.encoder, self.decoder, likelihood=self.likelihood)

    model = Learned()
    model.training_step([torch.rand(5, 7)], 0).backward()
    added = dict(model.named_parameters()).keys() - dict(modules["Before"]().named_parameters()).keys()
    assert added == {"likelihood.log_scale"} and model.likelihood.log_scale.grad is not None


def test_a_member_has_each_key_twice(modules, checkpoint):
    """The reason why a VAE should not be a member of a module with old checkpoints."""
    state, _ = checkpoint
    member = modules["Member"]()
    assert len(member.state_dict()) == 2 * len(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*vae\.encoder\.weight"):
        member.load_state_dict(state, strict=True)
