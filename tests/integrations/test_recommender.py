"""docs/examples/recommender.py: its losses are its authors' lines, and its models beat popularity."""

import math
import re

import pytest
import torch
from torch.nn import functional

from docs.examples import recommender

from . import assert_same, noise, run_example

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 7


@pytest.fixture
def batch(float64):
    """Return encoder and decoder in training mode, with dropout, and a sparse batch."""
    torch.manual_seed(1)
    items = torch.rand(6, recommender.ITEMS).topk(9).indices
    return recommender.Encoder(20), recommender.build_decoder(20), recommender.sparse(items)


def normals(like):
    return noise(1, *like.shape, dtype=torch.float64)[0]


def test_mult_vae(batch):
    encoder, decoder, x = batch
    torch.manual_seed(SEED)
    expected = recommender.replaced_lines(encoder, decoder, x, beta=0.3, noise=normals)
    torch.manual_seed(SEED)
    ours = recommender.mult_vae_loss(encoder, decoder, x, beta=0.3)
    assert_same(ours, expected, [*encoder.parameters(), *decoder.parameters()])


def test_rec_vae(batch):
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


def test_ndcg():
    """Scores known by hand: the hidden items come first and third, a seen one does not count."""
    scores = torch.zeros(1, recommender.ITEMS)
    scores[0, :4] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    found = recommender.ndcg(scores, torch.tensor([[0]]), torch.tensor([[1, 3]]))
    assert found == pytest.approx((1 + 0.5) / (1 + 1 / math.log2(3)))


@pytest.mark.slow
def test_both_models_are_far_above_popularity():
    """And below the rates that generated the clicks; of the time only that it is printed."""
    printed = run_example("recommender")
    found = dict(re.findall(r"^nDCG@100 of ([\w -]+): (0\.\d+)$", printed, re.M))
    ndcg = {name: float(value) for name, value in found.items()}
    for name in ("Mult-VAE", "RecVAE"):
        assert 3 * ndcg["popularity"] < ndcg[name] < ndcg["the true rates"]
    assert re.search(r"replaced lines / fastvae: \d\.\d\d \(", printed)
