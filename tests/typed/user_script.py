"""A user's program, which pyright checks in its strict mode; it is not run."""

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


vae = fastvae.VAE(Encoder(), nn.Linear(2, 8), likelihood=Gaussian(scale=0.1), latent_dim=2)
optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
beta = fastvae.schedules.linear(0.0, 1.0, 10)
for step in range(10):
    x = torch.rand(16, 8)
    bound = vae.iwae(x, k=5, estimator="dreg") if step % 2 else vae.elbo(x, beta=beta(step), kl="mc")
    optimizer.zero_grad()
    (-bound).backward()  # pyright: ignore[reportUnknownMemberType]  # torch's own
    optimizer.step()  # pyright: ignore[reportUnknownMemberType]  # torch's own

x = torch.rand(100, 8)
terms = vae.elbo(x, terms=True)
kl: Tensor = terms.kl
tighter: Tensor = vae.bound(x, fastvae.bounds.TVO(), k=10, noise="qmc", reduction="none")
result = vae.evaluate(x, k=500, proposal="adapted", audit=2, progress=False)
low, high = result.nll_interval
print(result, low, high, result.figures["nll_jackknife"], result.log_px[0].item(), result.audit)
value, stderr = result.delta(0)
marginal: Tensor = vae.log_marginal(x, k=100, noise="qmc").khat
annealed: Tensor = vae.ais(x, steps=10, start="prior").log_px
gap: float = vae.bdmc(n=4, steps=10).gap
score: Tensor = vae.reconstruction_log_prob(x, k=10, elementwise=True)
wake: Tensor = vae.sleep(8, reduction="sum")
log_px: Tensor = gaussian_log_prob(x, x, logvar=0.0)
log_w, log_q = fastvae.ops.rsample_log_ratio(x, x, k=3)
