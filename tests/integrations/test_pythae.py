"""pythae's models, as they are, through fastvae: the same loss for the same noise; what its bounds are."""

import math

import pytest
import torch
from pythae import models
from torch import nn

import fastvae
from fastvae.likelihoods import Bernoulli, Gaussian

from . import assert_same, gradient, noise

pytestmark = pytest.mark.usefixtures("float64", "one_thread")

B, SHAPE, D, SEED = 6, (1, 4, 5), 3, 7
PIXELS = math.prod(SHAPE)
# pythae leaves the constant of its unit normal out.
CONSTANT = 0.5 * PIXELS * math.log(2 * math.pi)
LIKELIHOODS = {"bce": (Bernoulli(probs=True), 0.0), "mse": (Gaussian(scale=1.0), CONSTANT)}
losses = pytest.mark.parametrize("loss", LIKELIHOODS)


@pytest.fixture
def fastvae_noise(monkeypatch):
    """Return ``replace(sample)``: pythae's next randn_like is ``sample(shape)``."""

    def replace(sample):
        monkeypatch.setattr(torch, "randn_like", lambda like: sample(tuple(like.shape)))

    replace(lambda shape: noise(1, *shape, dtype=torch.float64)[0])
    return replace


def build(name, **options):
    """Return a model of pythae's with its default networks, and data."""
    torch.manual_seed(1)
    config = getattr(models, f"{name}Config")(input_dim=SHAPE, latent_dim=D, **options)
    return getattr(models, name)(config), torch.rand(B, *SHAPE)


def theirs(model, x):
    torch.manual_seed(SEED)
    return model({"data": x}).loss


@losses
def test_vae(loss, fastvae_noise):
    """VAE: the loss is minus the ELBO, less the constant of the normal distribution."""
    model, x = build("VAE", reconstruction_loss=loss)
    likelihood, constant = LIKELIHOODS[loss]
    expected = theirs(model, x)
    torch.manual_seed(SEED)
    bound = fastvae.elbo(x, model.encoder(x), model.decoder, likelihood=likelihood)
    assert_same(-bound - constant, expected, model.parameters())
    vae = fastvae.VAE(model.encoder, model.decoder, likelihood=likelihood)
    torch.manual_seed(SEED)
    assert torch.equal(vae(x), bound)


@losses
def test_beta_vae(loss, fastvae_noise):
    model, x = build("BetaVAE", reconstruction_loss=loss, beta=4.0)
    likelihood, constant = LIKELIHOODS[loss]
    expected = theirs(model, x)
    torch.manual_seed(SEED)
    terms = fastvae.elbo(x, model.encoder(x), model.decoder, likelihood=likelihood, beta=4.0, terms=True)
    assert_same(-terms.bound.mean() - constant, expected, model.parameters())
    torch.manual_seed(SEED)
    output = model({"data": x})  # the parts that its trainer logs
    torch.testing.assert_close(output.reg_loss, terms.kl.mean())
    torch.testing.assert_close(output.recon_loss, -terms.log_likelihood.mean() - constant)


@losses
def test_nll(loss, fastvae_noise):
    """get_nll returns log p(x) by importance sampling, not its negative: log_marginal's number."""
    model, x = build("VAE", reconstruction_loss=loss)
    vae = fastvae.VAE(model.encoder, model.decoder, likelihood=LIKELIHOODS[loss][0])
    # One example, whose K draws pythae makes as a batch of K.
    fastvae_noise(lambda shape: noise(shape[0], 1, D, dtype=torch.float64)[:, 0])
    torch.manual_seed(SEED)
    expected = model.get_nll(x[:1], n_samples=50, batch_size=50)
    torch.manual_seed(SEED)
    assert float(vae.log_marginal(x[:1], k=50).log_px) == pytest.approx(expected, rel=1e-12)
    result = vae.evaluate(x, k=200, progress=False)
    assert -result.nll == pytest.approx(model.get_nll(x, 200, 200), abs=10 * result.mc_stderr)
    assert vae.sample(2).shape == vae.reconstruct(x[:2]).shape == (2, *SHAPE)


@losses
def test_modules_are_untouched(loss, fastvae_noise):
    """A VAE over pythae's networks trains the model, whose checkpoint has the same keys as before."""
    model, x = build("VAE", reconstruction_loss=loss)
    keys = list(model.state_dict())
    vae = fastvae.VAE(model.encoder, model.decoder, likelihood=LIKELIHOODS[loss][0])
    optimizer = torch.optim.SGD(vae.parameters(), lr=1e-3)
    before = theirs(model, x)
    for _ in range(5):
        optimizer.zero_grad()
        (-vae(x, k=20)).backward()
        optimizer.step()
    assert theirs(model, x) < before
    assert list(model.state_dict()) == keys


def test_its_trainer(tmp_path):
    """A forward of three lines gives pythae's own trainer another bound, here IWAE's."""
    from pythae.data.datasets import BaseDataset
    from pythae.models.base.base_utils import ModelOutput
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    class Fast(models.VAE):
        def forward(self, inputs, **kwargs):
            x, q = inputs["data"], self.encoder(inputs["data"])
            return ModelOutput(loss=-fastvae.iwae(x, q, self.decoder, k=5, likelihood=Bernoulli(probs=True)))

    torch.set_default_dtype(torch.float32)  # of its data sets
    model = Fast(models.VAEConfig(input_dim=SHAPE, latent_dim=D, reconstruction_loss="bce"))
    x = torch.rand(1, *SHAPE).round().expand(60, *SHAPE)
    vae = fastvae.VAE(model.encoder, model.decoder, likelihood=Bernoulli(probs=True))
    before = vae.evaluate(x[:10], k=50, progress=False).nll
    config = BaseTrainerConfig(
        output_dir=str(tmp_path), num_epochs=5, per_device_train_batch_size=20, no_cuda=True
    )
    BaseTrainer(model, BaseDataset(x, torch.zeros(60)), training_config=config).train()
    assert vae.evaluate(x[:10], k=50, progress=False).nll < before - 1


@losses
def test_iwae_has_the_gradient_but_not_the_value(loss, fastvae_noise):
    """pythae reports Σ w̃ log w, the bound and log K less the entropy of the weights w̃."""
    k = 5
    model, x = build("IWAE", reconstruction_loss=loss, number_samples=k)
    likelihood, constant = LIKELIHOODS[loss]
    fastvae_noise(lambda shape: noise(k, B, D, dtype=torch.float64).transpose(0, 1))
    expected = theirs(model, x)
    torch.manual_seed(SEED)
    bound = fastvae.iwae(x, model.encoder(x), model.decoder, k=k, likelihood=likelihood)
    torch.manual_seed(SEED)
    w = fastvae.log_weights(x, model.encoder(x), model.decoder, k=k, likelihood=likelihood)
    weights = (w.log_likelihood + w.log_ratio).softmax(0)
    entropy = torch.special.entr(weights).sum(0).mean().detach()
    excess = math.log(k) - entropy
    assert float(excess) > 0.01
    assert_same(-(bound + excess) - constant, expected, model.parameters())


def test_the_value_of_iwae_exceeds_log_px():
    """On a linear model, where log p(x) is known: pythae's number is above it, fastvae's below."""
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Prior(BaseEncoder):
        def forward(self, x):
            zeros = x.new_zeros(len(x), 2)
            return ModelOutput(embedding=zeros, log_covariance=zeros)

    class Linear(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0]]))

        def forward(self, z):
            return ModelOutput(reconstruction=z @ self.weight)

    k, decoder = 20, Linear()
    config = models.IWAEConfig(input_dim=(3,), latent_dim=2, reconstruction_loss="mse", number_samples=k)
    model = models.IWAE(config, Prior(), decoder)
    w = decoder.weight.detach()
    x = torch.randn(2000, 2) @ w + torch.randn(2000, 3)
    covariance = w.T @ w + torch.eye(3)
    exact = torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(x).mean()
    with torch.no_grad():
        value = -model({"data": x}).loss - 1.5 * math.log(2 * math.pi)
        bound = fastvae.iwae(x, model.encoder(x), decoder, k=k, likelihood=Gaussian(scale=1.0))
    assert bound < exact - 0.1 and value > exact + 0.5


@pytest.mark.parametrize(
    ("groups", "axes", "same"), [("samples", (2, 1, 0, 3), True), ("estimates", (2, 0, 1, 3), False)]
)
@losses
def test_miwae_normalises_over_the_estimates(loss, groups, axes, same, fastvae_noise):
    """Its gradient is that of K bounds of M draws each; MIWAE has M bounds of K draws each."""
    m, k = 3, 4
    model, x = build("MIWAE", reconstruction_loss=loss, number_samples=k, number_gradient_estimates=m)
    groups = {"samples": k, "estimates": m}[groups]

    def draws(shape):  # consecutive draws are a group: to pythae's [B, M, K, D]
        return noise(m * k, B, D, dtype=torch.float64).view(groups, -1, B, D).permute(axes)

    fastvae_noise(draws)
    expected = theirs(model, x)
    torch.manual_seed(SEED)
    bound = fastvae.bound(
        x,
        model.encoder(x),
        model.decoder,
        fastvae.bounds.IWAE(groups),
        k=m * k,
        likelihood=LIKELIHOODS[loss][0],
    )
    one, other = (gradient(loss, model.parameters()) for loss in (-bound, expected))
    apart = float((one - other).norm() / other.norm())
    assert apart < 1e-10 if same else apart > 1e-3


@losses
def test_miwae_of_one_estimate_is_the_elbo(loss, fastvae_noise):
    """A softmax over an axis of length one: the number of samples changes nothing."""
    k = 4
    model, x = build("MIWAE", reconstruction_loss=loss, number_samples=k, number_gradient_estimates=1)
    likelihood, constant = LIKELIHOODS[loss]
    fastvae_noise(lambda shape: noise(k, B, D, dtype=torch.float64).transpose(0, 1)[:, None])
    expected = theirs(model, x)
    torch.manual_seed(SEED)
    bound = fastvae.elbo(x, model.encoder(x), model.decoder, k=k, kl="mc", likelihood=likelihood)
    assert_same(-bound - constant, expected, model.parameters())
