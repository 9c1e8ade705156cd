"""The tutorial on recommenders: its losses are their authors' lines, and its models beat popularity."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from . import ROOT, assert_same, noise, run_tutorial

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 7


@pytest.fixture(scope="module")
def recommender():
    """Return the tutorial's names, after its run."""
    return SimpleNamespace(**run_tutorial("3_data/14_recommenders")[0])


def replaced_lines(encoder, decoder, x, *, beta):
    """Return Mult-VAE's loss as its authors write it."""
    mu, logvar = encoder(x).chunk(2, dim=1)
    z = mu + normals(mu) * torch.exp(0.5 * logvar)
    nll = -(functional.log_softmax(decoder(z), dim=1) * x.to_dense()).sum(1).mean()
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1).mean()
    return nll + beta * kl


@pytest.fixture
def batch(recommender, float64):
    """Return encoder and decoder in training mode, with dropout, and a sparse batch."""
    torch.manual_seed(1)
    items = torch.rand(6, recommender.ITEMS).topk(9).indices
    return recommender.Encoder(20), recommender.build_decoder(20), recommender.sparse(items)


def normals(like):
    return noise(1, *like.shape, dtype=torch.float64)[0]


def test_mult_vae(recommender, batch):
    encoder, decoder, x = batch
    torch.manual_seed(SEED)
    expected = replaced_lines(encoder, decoder, x, beta=0.3)
    torch.manual_seed(SEED)
    ours = recommender.mult_vae_loss(encoder, decoder, x, beta=0.3)
    assert_same(ours, expected, [*encoder.parameters(), *decoder.parameters()])


def test_rec_vae(recommender, batch):
    """RecVAE's prior is a mixture in each dimension; the KL's weight is γ times a user's clicks."""
    encoder, decoder, x = batch
    old = recommender.Encoder(20).eval()

    def log_normal(z, mu, logvar):
        return -0.5 * (logvar + math.log(2 * math.pi) + (z - mu).pow(2) / logvar.exp())

    torch.manual_seed(SEED)
    mu, logvar = encoder(x).chunk(2, dim=1)
    z = mu + normals(mu) * torch.exp(0.5 * logvar)
    zeros, (old_mu, old_logvar) = torch.zeros_like(mu), old(x).detach().chunk(2, dim=1)
    parts = [
        log_normal(z, zeros, zeros) + math.log(0.15),
        log_normal(z, old_mu, old_logvar) + math.log(0.75),
        log_normal(z, zeros, zeros + 10) + math.log(0.1),
    ]
    kl = log_normal(z, mu, logvar) - torch.logsumexp(torch.stack(parts), 0)
    nll = -(functional.log_softmax(decoder(z), 1) * x.to_dense()).sum(1)
    expected = (nll + 0.005 * 9 * kl.sum(1)).mean()

    torch.manual_seed(SEED)
    ours = recommender.rec_vae_loss(encoder, decoder, old, x, gamma=0.005)
    assert_same(ours, expected, [*encoder.parameters(), *decoder.parameters()])
    assert all(p.grad is None for p in old.parameters())


def test_ndcg(recommender):
    """Scores known by hand: the hidden items come first and third, a seen one does not count."""
    scores = torch.zeros(1, recommender.ITEMS)
    scores[0, :4] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    found = recommender.ndcg(scores, torch.tensor([[0]]), torch.tensor([[1, 3]]))
    assert found == pytest.approx((1 + 0.5) / (1 + 1 / math.log2(3)))


def test_both_models_are_far_above_popularity():
    """And below the rates that generated the clicks."""
    _, printed = run_tutorial("3_data/14_recommenders")
    found = dict(re.findall(r"^([^:\n]+): .*nDCG@100 (0\.\d+)$", printed, re.M))
    ndcg = {name: float(value) for name, value in found.items()}
    for name in ("Mult-VAE", "RecVAE"):
        assert 3 * ndcg["popularity"] < ndcg[name] < ndcg["the true rates"]
    page = (ROOT / "docs" / "integrations" / "recommenders.md").read_text("utf-8")
    stated = dict(re.findall(r"^    ([^:\n]+): .*nDCG@100 (0\.\d+)$", page, re.M))
    assert {name: pytest.approx(float(value), abs=0.02) for name, value in stated.items()} == ndcg
