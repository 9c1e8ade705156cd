"""Impute missing values of a table by MIWAE, and by not-MIWAE where large values are the missing ones.

Half of the measurements of scikit-learn's breast cancer data are hidden, at random; then, in half of the
columns, all above the column's mean. The models are those of Mattei & Frellsen (2019) and Ipsen, Mattei &
Frellsen (2021).
"""

import warnings

import sklearn.datasets
import torch
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from torch import nn

import fastvae
from fastvae import likelihoods

LATENTS, HIDDEN, EPOCHS, BATCH, K = 10, 128, 120, 64, 20


class NotMIWAE(nn.Module):
    """Decoder that also returns logits of the mask, given x with its missing elements drawn from p(x|z)."""

    def __init__(self, body: nn.Module, columns: int):
        super().__init__()
        self.body, self.slope, self.offset = (
            body,
            nn.Parameter(torch.ones(columns)),
            nn.Parameter(torch.zeros(columns)),
        )

    def forward(self, z, context):
        mean, logvar = self.body(z).chunk(2, 1)
        logvar = logvar.clamp(-4, 4)
        drawn = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        x = torch.where(context["mask"], context["x"], drawn)
        # The larger a value, the less often it is observed: the sign of the slope is known.
        logits = -nn.functional.softplus(self.slope) * (x - self.offset)
        return {"x": (mean, logvar), "mask": logits}


class Wide(nn.Module):
    """Decoder p(x|z): means and log variances."""

    def __init__(self, columns: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * columns))

    def forward(self, z):
        mean, logvar = self.body(z).chunk(2, 1)
        return mean, logvar.clamp(-4, 4)


def train(step, parameters, n):
    """Maximise ``step(rows)`` over shuffled batches of rows."""
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(n).split(BATCH):
            optimizer.zero_grad()
            (-step(rows)).backward()
            optimizer.step()


def miwae(x, mask):
    """Return x imputed by a model of the observed values alone."""
    encoder = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENTS))
    vae = fastvae.VAE(encoder, Wide(x.shape[1]), likelihood="gaussian")
    seen = torch.where(mask, x, 0)
    train(lambda rows: vae.iwae(seen[rows], k=K, mask=mask[rows]), vae.parameters(), len(x))
    return vae.impute(x, mask, k=2000).mean


def not_miwae(x, mask):
    """Return x imputed by a joint model of the values and of the mask."""
    encoder = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENTS))
    body = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * x.shape[1]))
    vae = fastvae.VAE(
        lambda data, context: encoder(torch.where(context["mask"], data["x"], 0)),
        NotMIWAE(body, x.shape[1]),
        likelihood=likelihoods.Joint(x="gaussian", mask="bernoulli"),
        modules=[encoder],
    )
    data = {"x": torch.where(mask, x, 0), "mask": mask.float()}

    def step(rows):
        part = {name: value[rows] for name, value in data.items()}
        context = {"x": part["x"], "mask": mask[rows]}
        return vae.iwae(part, k=K, mask={"x": mask[rows]}, context=context)

    train(step, vae.parameters(), len(x))
    return vae.impute(data, {"x": mask}, k=2000, context={"x": data["x"], "mask": mask}).mean["x"]


def main():
    warnings.filterwarnings("ignore", ".*Early stopping criterion")
    torch.manual_seed(0)
    x = torch.tensor(sklearn.datasets.load_breast_cancer().data, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    at_random = torch.rand_like(x) > 0.5
    by_size = torch.ones_like(at_random)
    by_size[:, ::2] = x[:, ::2] <= 0
    print("rms error of the missing values, in standard deviations")
    for name, mask in (("half, at random", at_random), ("above the mean, in half of the columns", by_size)):
        hidden = torch.where(mask, x, torch.nan)

        def error(imputed, mask=mask):
            return float((imputed - x)[~mask].square().mean().sqrt())

        columns = hidden.nanmean(0).expand_as(x)
        iterative = torch.tensor(IterativeImputer(max_iter=10, random_state=0).fit_transform(hidden.numpy()))
        print(f"  missing: {name}")
        print(f"    mean of the column  {error(columns):.2f}")
        print(f"    iterative imputer   {error(iterative):.2f}")
        print(f"    MIWAE               {error(miwae(hidden, mask)):.2f}")
        if mask is by_size:
            print(f"    not-MIWAE           {error(not_miwae(hidden, mask)):.2f}")


if __name__ == "__main__":
    main()
