"""A user's program, for type checkers and editors: it is checked, never run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastvae
from fastvae.likelihoods import Gaussian
from fastvae.ops import gaussian_log_prob


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


vae = fastvae.VAE(Encoder(), nn.Linear(2, 8), likelihood=Gaussian(scale=0.1))
optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
for step in range(10):
    x = torch.rand(16, 8)
    beta = fastvae.schedules.linear(0.0, 1.0, 10)(step)
    loss: Tensor = -vae.iwae(x, k=5, estimator="dreg") if step % 2 else -vae.elbo(x, beta=beta)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

x = torch.rand(100, 8)
terms = vae.elbo(x, terms=True)
kl: Tensor = terms.kl
result = vae.evaluate(x, k=500, proposal="adapted", progress=False)
low, high = result.nll_interval
print(result, low, high, result.figures["nll_jackknife"], result.log_px[0].item())
marginal = vae.log_marginal(x, k=100, noise="qmc")
annealed = vae.ais(x, steps=10)
bounds = vae.bdmc(n=4, steps=10)
score: Tensor = vae.reconstruction_log_prob(x, k=10, elementwise=True)
log_px: Tensor = gaussian_log_prob(x, x, logvar=0.0)
log_w, kl2 = fastvae.ops.rsample_kl(x, x, k=3)
