"""AutoencoderKL of diffusers, as it is: the losses of its training scripts for the same noise."""

import math

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional

import fastvae
from fastvae.likelihoods import Gaussian, Laplace

from . import assert_same, noise

pytestmark = pytest.mark.usefixtures("float64", "one_thread")

B, IMAGE, LATENT, SEED = 2, (3, 32, 32), (4, 16, 16), 7
PIXELS = math.prod(IMAGE)
KL_SCALE = 1e-2
# What a script leaves out of a likelihood: log p = -loss - constant.
LIKELIHOODS = {
    "l2": (Gaussian(scale=0.5**0.5), functional.mse_loss, 0.5 * PIXELS * math.log(math.pi)),
    "l1": (Laplace(scale=1.0), functional.l1_loss, PIXELS * math.log(2)),
}
losses = pytest.mark.parametrize("loss", LIKELIHOODS)


@pytest.fixture
def model(monkeypatch):
    """Return a small AutoencoderKL whose posterior draws fastvae's noise."""
    from diffusers.models.autoencoders import vae

    monkeypatch.setattr(
        vae, "randn_tensor", lambda shape, **options: noise(1, *shape, dtype=torch.float64)[0]
    )
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=32,
    )  # fmt: skip


@pytest.fixture
def x():
    return torch.rand(B, *IMAGE) * 2 - 1


@pytest.fixture
def perceptual():
    """Return a stand-in for LPIPS: squared differences of the features of a fixed network, [B]."""
    features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.Conv2d(6, 6, 3)).requires_grad_(
        False
    )
    return lambda a, b: (features(a) - features(b)).square().mean((1, 2, 3))


def by_hand(model, x):
    """Return posterior, reconstruction and KL as the training scripts compute them."""
    torch.manual_seed(SEED)
    posterior = model.encode(x).latent_dist
    return posterior, model.decode(posterior.sample()).sample, posterior.kl().sum() / B


def elbo(model, x, **options):
    torch.manual_seed(SEED)
    return fastvae.elbo(x, model.encode(x), model.decode, **options)


@losses
def test_sums_over_pixels(model, x, loss):
    """diffusers' own script: the errors are summed over pixels, and the KL has a weight."""
    likelihood, error, constant = LIKELIHOODS[loss]
    _, reconstruction, kl = by_hand(model, x)
    expected = error(reconstruction, x, reduction="none").sum() / B + KL_SCALE * kl
    bound = elbo(model, x, likelihood=likelihood, beta=KL_SCALE)
    assert_same(-bound - constant, expected, model.parameters())


@losses
def test_means_over_pixels(model, x, loss):
    """Other scripts average over pixels: the same KL weight counts P times as much."""
    likelihood, error, constant = LIKELIHOODS[loss]
    _, reconstruction, kl = by_hand(model, x)
    expected = error(reconstruction, x) + KL_SCALE * kl
    bound = elbo(model, x, likelihood=likelihood, beta=KL_SCALE * PIXELS)
    assert_same((-bound - constant) / PIXELS, expected, model.parameters())


@pytest.mark.parametrize("k", [1, 2])
def test_a_perceptual_loss(model, x, perceptual, k):
    """Terms.output is the DecoderOutput of K·B rows; a loss on it trains encoder and decoder."""
    likelihood, error, constant = LIKELIHOODS["l1"]
    torch.manual_seed(SEED)
    posterior = model.encode(x).latent_dist
    z = posterior.mean + posterior.std * noise(k, B, *LATENT, dtype=torch.float64)
    reconstruction, images = model.decode(z.flatten(0, 1)).sample, x.repeat(k, 1, 1, 1)
    expected = error(reconstruction, images, reduction="sum") / (k * B) + KL_SCALE * posterior.kl().mean()
    expected = expected + 50.0 * perceptual(reconstruction, images).mean()
    terms = elbo(model, x, likelihood=likelihood, beta=KL_SCALE, k=k, terms=True)
    ours = -terms.bound.mean() - constant + 50.0 * perceptual(terms.output.sample, images).mean()
    assert_same(ours, expected, model.parameters())
    torch.testing.assert_close(terms.z, z)
    torch.testing.assert_close(terms.kl, posterior.kl())


def test_the_adaptive_weight_of_a_discriminator(model, x):
    """VQGAN's weight needs the gradient of the likelihood at the last layer before the backward pass."""
    likelihood, error, _ = LIKELIHOODS["l1"]
    critic = nn.Conv2d(3, 1, 4, stride=4).requires_grad_(False)
    last = model.decoder.conv_out.weight

    def total(nll, kl, reconstruction):
        g = -critic(reconstruction).mean()
        norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (nll, g)]
        return nll + KL_SCALE * kl + (norms[0] / (norms[1] + 1e-4)).detach() * g

    _, reconstruction, kl = by_hand(model, x)
    expected = total(error(reconstruction, x, reduction="sum") / B, kl, reconstruction)
    terms = elbo(model, x, likelihood=likelihood, terms=True)
    nll = -terms.log_likelihood.mean() - LIKELIHOODS["l1"][2]
    assert_same(total(nll, terms.kl.mean(), terms.output.sample), expected, model.parameters())


def test_scaled_latents(model, x):
    """A diffusion model gets z · scaling_factor, and the decoder z back."""
    scale = model.config.scaling_factor
    posterior, reconstruction, _ = by_hand(model, x)
    terms = elbo(model, x, likelihood=Gaussian(scale=1.0), terms=True)
    (latents,) = terms.z * scale
    torch.manual_seed(SEED)
    torch.testing.assert_close(latents, posterior.sample() * scale)
    torch.testing.assert_close(model.decode(latents / scale).sample, reconstruction)
    torch.testing.assert_close(terms.output.sample, reconstruction)


def test_a_model_of_scaled_latents(model, x):
    """Latents scaled within the model, with the prior N(0, s²): the bound is the same."""
    s = model.config.scaling_factor
    posterior, _, _ = by_hand(model, x)
    q = posterior.mean * s, posterior.logvar + 2 * math.log(s)
    prior = torch.zeros(LATENT), torch.full(LATENT, 2 * math.log(s))
    torch.manual_seed(SEED)
    scaled = fastvae.elbo(x, q, lambda z: model.decode(z / s), likelihood=Gaussian(scale=1.0), prior=prior)
    assert_same(scaled, elbo(model, x, likelihood=Gaussian(scale=1.0)), model.parameters())


def test_a_vae_of_its_methods(model, x):
    """fastvae.VAE(model.encode, model.decode) trains, evaluates and samples; the model saves as before."""
    keys = list(model.state_dict())
    vae = fastvae.VAE(model.encode, model.decode, likelihood=Gaussian(scale=1.0), latent_dim=LATENT)
    torch.manual_seed(SEED)
    assert torch.equal(vae(x), elbo(model, x, likelihood=Gaussian(scale=1.0)))
    assert len(list(vae.parameters())) == len(list(model.parameters()))
    assert vae.sample(2).shape == vae.reconstruct(x).shape == (2, *IMAGE)
    assert vae.evaluate(x, k=4, progress=False).log_px.shape == (B,)
    assert list(model.state_dict()) == keys


def test_gradient_checkpointing_and_slices(model, x):
    """Recomputed blocks and a decoder that takes one latent at a time give the same gradient."""
    expected = elbo(model, x, likelihood=Gaussian(scale=1.0), k=2)
    model.train().enable_gradient_checkpointing()
    model.enable_slicing()
    assert_same(elbo(model, x, likelihood=Gaussian(scale=1.0), k=2), expected, model.parameters())
