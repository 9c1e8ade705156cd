"""A VAE and a semi-supervised VAE for Pyro, each with model, guide, and the same bound by fastvae."""

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import nn

import fastvae


class Encoder(nn.Module):
    """Network inputs -> (loc, scale), as encoders for Pyro return them."""

    def __init__(self, inputs, hidden, latent):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.Softplus())
        self.loc, self.log_scale = nn.Linear(hidden, latent), nn.Linear(hidden, latent)

    def forward(self, *inputs):
        h = self.body(joined(*inputs))
        return self.loc(h), self.log_scale(h).exp()


def joined(*inputs):
    """Concatenate along the last axis, after broadcasting: enumerated classes have an axis in front."""
    shape = torch.broadcast_shapes(*[t.shape[:-1] for t in inputs])
    return torch.cat([t.expand(*shape, t.shape[-1]) for t in inputs], -1)


def build_decoder(inputs, hidden, pixels):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Softplus(), nn.Linear(hidden, pixels))


class VAE(nn.Module):
    """VAE of one plate, whose rows may be masked and subsampled, with a weight of the KL."""

    def __init__(self, pixels=784, hidden=400, latent=50):
        super().__init__()
        self.encoder, self.decoder = Encoder(pixels, hidden, latent), build_decoder(latent, hidden, pixels)
        self.latent, self.beta = latent, 1.0

    def plate(self, x, size):
        # The rows are given, since drawing them would advance the random state.
        return pyro.plate("data", size or len(x), subsample=torch.arange(len(x)))

    def model(self, x, mask=True, size=None):
        pyro.module("vae", self)
        with self.plate(x, size):
            zeros = x.new_zeros(self.latent)
            with poutine.scale(scale=self.beta):
                z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).mask(mask).to_event(1), obs=x)

    def guide(self, x, mask=True, size=None):
        pyro.module("vae", self)
        with self.plate(x, size), poutine.scale(scale=self.beta):
            pyro.sample("z", dist.Normal(*self.encoder(x)).to_event(1))

    def elbo(self, x, **options):
        """Return fastvae's bound, a sum over the plate as Pyro's."""
        q = torch.distributions.Normal(*self.encoder(x))
        options = {"likelihood": "bernoulli", "reduction": "sum", "beta": self.beta, **options}
        return fastvae.elbo(x, q, self.decoder, **options)


class M2(nn.Module):
    """Semi-supervised VAE, as Pyro's ss_vae_M2: y ~ q(y|x), z ~ q(z|x, y)."""

    def __init__(self, pixels=784, hidden=400, latent=50, classes=10):
        super().__init__()
        self.classifier = build_decoder(pixels, hidden, classes)
        self.encoder = Encoder(pixels + classes, hidden, latent)
        self.decoder = build_decoder(latent + classes, hidden, pixels)
        self.prior, self.latent = nn.Parameter(torch.zeros(classes)), latent

    def model(self, x, y=None):
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(self.latent)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.prior), obs=y)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(joined(z, y))).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x)):
            if y is None:
                q = dist.OneHotCategorical(logits=self.classifier(x))
                y = pyro.sample("y", q, infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(*self.encoder(x, y)).to_event(1))

    def elbo_of_class(self, x, y):
        """Return fastvae's bound on log p(x|y), [N]."""
        q = torch.distributions.Normal(*self.encoder(x, y))
        options = {"likelihood": "bernoulli", "context": y, "kl": "mc", "reduction": "none"}
        return fastvae.elbo(x, q, lambda z, y: self.decoder(joined(z, y)), **options)

    def elbo(self, x, **options):
        """Return fastvae's bound, summed over the classes and the plate."""
        options = {"log_q": self.classifier(x), "log_prior": self.prior, "reduction": "sum", **options}
        return fastvae.marginalize(x, self.elbo_of_class, **options)
