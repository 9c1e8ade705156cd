"""Pyro's losses of a guide and a model with one plate: the same value and gradient for the same noise."""

import copy

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn

import fastvae
from docs.examples.pyro_models import M2, VAE

from . import assert_same, gradient, noise

pytestmark = pytest.mark.usefixtures("float64", "one_thread")

B, X, H, D, C, SEED = 5, 7, 6, 3, 4, 7


@pytest.fixture(autouse=True)
def fastvae_noise(monkeypatch):
    """Return ``replace(sample)``: a Normal's next standard normals are ``sample(shape)``."""
    pyro.clear_param_store()

    def replace(sample):
        monkeypatch.setattr(
            torch.distributions.normal, "_standard_normal", lambda shape, dtype, device: sample(tuple(shape))
        )

    # [B, D], or [K, B, D] of vectorised particles
    replace(lambda shape: noise(*(1, *shape)[-3:], dtype=torch.float64).view(shape))
    return replace


@pytest.fixture
def vae():
    torch.manual_seed(1)
    return VAE(X, H, D)


@pytest.fixture
def x():
    return torch.rand(B, X).round()


def ours(vae, x, **options):
    torch.manual_seed(SEED)
    return -vae.elbo(x, **options)


def theirs(objective, vae, *args, **options):
    torch.manual_seed(SEED)
    return objective.differentiable_loss(vae.model, vae.guide, *args, **options)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_trace_elbo_is_the_monte_carlo_kl(vae, x, k, beta):
    vae.beta = beta
    objective = Trace_ELBO(num_particles=k, vectorize_particles=True, max_plate_nesting=1)
    assert_same(ours(vae, x, kl="mc", k=k), theirs(objective, vae, x), vae.parameters())


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_trace_mean_field_elbo_is_the_analytic_kl(vae, x, beta):
    vae.beta = beta
    assert_same(ours(vae, x), theirs(TraceMeanField_ELBO(), vae, x), vae.parameters())
    apart = ours(vae, x) - theirs(Trace_ELBO(), vae, x)
    assert abs(float(apart.detach())) > 1e-3  # of the same noise, and yet another estimate


def test_a_subsampled_plate_is_a_factor(vae, x):
    expected = theirs(TraceMeanField_ELBO(), vae, x, size=100)
    assert_same(ours(vae, x, reduction="mean") * 100, expected, vae.parameters())


def test_a_mask(vae, x):
    mask = torch.rand(B, X) < 0.5
    assert_same(ours(vae, x, mask=mask), theirs(TraceMeanField_ELBO(), vae, x, mask), vae.parameters())


def test_renyi_elbo_is_iwae(vae, x):
    """RenyiELBO(alpha=0) has IWAE's gradients; it leaves them, without a differentiable loss."""
    k = 5
    objective = RenyiELBO(alpha=0, num_particles=k, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(SEED)
    expected = objective.loss_and_grads(vae.model, vae.guide, x)
    theirs = torch.cat([p.grad.flatten() for p in vae.parameters()])
    torch.manual_seed(SEED)
    q = torch.distributions.Normal(*vae.encoder(x))
    loss = -fastvae.iwae(x, q, vae.decoder, k=k, likelihood="bernoulli", reduction="sum")
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-11)
    assert float((gradient(loss, vae.parameters()) - theirs).norm()) <= 1e-11 * float(theirs.norm())


def test_a_pair_of_loc_and_scale_is_misread(vae, x):
    """A pair is (mu, logvar): nothing tells a scale from a log variance, and the loss is another one."""
    torch.manual_seed(SEED)
    wrong = -fastvae.elbo(x, vae.encoder(x), vae.decoder, likelihood="bernoulli", reduction="sum")
    assert abs(float((wrong - ours(vae, x)).detach())) > 0.1


def test_a_loss_of_svi(vae, x):
    """SVI takes fastvae's bound as its loss, and makes the step that it makes with TraceMeanField_ELBO."""
    initial = copy.deepcopy(vae.state_dict())

    def loss(model, guide, x):
        pyro.module("vae", vae)  # shows SVI the parameters
        return -vae.elbo(x)

    trained = []
    for objective in (TraceMeanField_ELBO(), loss):
        pyro.clear_param_store()
        vae.load_state_dict(initial)
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
        for _ in range(3):
            torch.manual_seed(SEED)
            svi.step(x)
        trained.append(copy.deepcopy(vae.state_dict()))
    for name in initial:
        torch.testing.assert_close(trained[0][name], trained[1][name])
        assert not torch.equal(trained[0][name], initial[name])


@pytest.fixture
def m2():
    torch.manual_seed(1)
    model = M2(X, H, D, C)
    nn.init.normal_(model.prior)
    return model


def test_enumerated_classes(m2, x, fastvae_noise):
    """TraceEnum_ELBO; its classes are the first axis, those of marginalize the second."""
    fastvae_noise(lambda shape: noise(1, B * C, D, dtype=torch.float64).view(B, C, D).transpose(0, 1))
    expected = theirs(TraceEnum_ELBO(max_plate_nesting=1), m2, x)
    assert_same(ours(m2, x), expected, m2.parameters())


def test_labels_and_the_classifier_loss(m2, x, fastvae_noise):
    """Batches with and without labels, and the classifier's loss on the labels, in one call."""
    labels, alpha = torch.tensor([2, -1, 0, -1, -1]), 10.0
    torch.manual_seed(SEED)
    drawn = noise(1, B * C, D, dtype=torch.float64).view(B, C, D)
    known = labels >= 0
    y = nn.functional.one_hot(labels[known], C).double()

    fastvae_noise(lambda shape: drawn[~known].transpose(0, 1))
    unlabelled = theirs(TraceEnum_ELBO(max_plate_nesting=1), m2, x[~known])
    fastvae_noise(lambda shape: drawn[known, labels[known]])
    labelled = theirs(Trace_ELBO(), m2, x[known], y)
    classified = dist.OneHotCategorical(logits=m2.classifier(x[known])).log_prob(y).sum()

    found = ours(m2, x, labels=labels, alpha=alpha)
    assert_same(found, unlabelled + labelled - alpha * classified, m2.parameters())
