"""
Missing data
============

A mask says which elements of x were observed; the bound leaves out the others, and ``impute`` returns what
they may have been (MIWAE, Mattei & Frellsen 2019). If a value's own size decides whether it is missing, the
mask is data, too (not-MIWAE, Ipsen, Mattei & Frellsen 2021).
"""

import warnings

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer
from torch import nn

import fastvae
from fastvae import likelihoods

warnings.filterwarnings("ignore", ".*Early stopping criterion")
torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data / 16, dtype=torch.float32)
at_random = torch.rand_like(x) > 0.5
LATENTS, PIXELS = 10, 64


def network(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 128), nn.Tanh(), nn.Linear(128, outputs))


def train(step, parameters, epochs=35):
    """Maximise ``step(rows)`` over shuffled batches of rows."""
    optimizer = torch.optim.Adam(parameters, lr=4e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            (-step(rows)).backward()
            optimizer.step()


# %%
# **Half of the pixels are missing at random.** The encoder gets zeros in their place. The bound is that of
# log p(x observed), with one σ for all pixels.


def miwae(mask):
    """Return x imputed by a model of the observed pixels alone."""
    torch.manual_seed(1)
    likelihood = likelihoods.Gaussian(scale=0.2, learned=True)
    vae = fastvae.VAE(network(PIXELS, 2 * LATENTS), network(LATENTS, PIXELS), likelihood=likelihood)
    seen = torch.where(mask, x, 0)
    train(lambda rows: vae.iwae(seen[rows], k=5, mask=mask[rows]), vae.parameters())
    return vae.impute(seen, mask, k=200).mean


def simple(mask):
    """Return x imputed by scikit-learn, by the mean of each pixel and by two models."""
    hidden = torch.where(mask, x, torch.nan)
    imputers = {
        "ten neighbours": KNNImputer(n_neighbors=10),
        "iterative": IterativeImputer(max_iter=2, n_nearest_features=20, random_state=0),
    }
    found = {"mean of the pixel": torch.where(mask, x, hidden.nanmean(0).nan_to_num())}
    for name, imputer in imputers.items():
        filled = imputer.set_params(keep_empty_features=True).fit_transform(hidden.numpy())
        found[name] = torch.tensor(filled, dtype=torch.float32)
    return found


def errors(imputed, mask):
    """Return the root mean square error of the missing pixels by method."""
    return {name: float((value - x)[~mask].square().mean().sqrt()) for name, value in imputed.items()}


random_imputed = simple(at_random) | {"MIWAE": miwae(at_random)}
random_errors = errors(random_imputed, at_random)
print("missing at random: " + ", ".join(f"{name} {v:.3f}" for name, v in random_errors.items()))

# %%
# **Dark pixels are missing more often.** The model of the values is as above; a second part, a ``Joint``, is
# a model of the mask. The decoder draws the missing values, and returns the logits of being observed, given
# all values. That a larger value is observed less often is known; how much is learned.

by_size = torch.rand_like(x) > torch.sigmoid(10 * (x - 0.5))


class NotMIWAE(nn.Module):
    """Decoder of the pixels and of the mask."""

    def __init__(self):
        super().__init__()
        self.body = network(LATENTS, PIXELS)
        self.log_scale = nn.Parameter(torch.tensor(-1.6))
        self.slope, self.offset = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, z, context):
        mean = self.body(z)
        scale = self.log_scale.exp()
        drawn = mean + scale * torch.randn_like(mean)
        value = torch.where(context["mask"], context["x"], drawn)
        logits = self.offset - self.slope.exp() * value
        return {"x": (mean, 2 * self.log_scale.expand_as(mean)), "mask": logits}


class Encoder(nn.Module):
    """Encoder of the observed pixels and of the mask."""

    def __init__(self):
        super().__init__()
        self.body = network(2 * PIXELS, 2 * LATENTS)

    def forward(self, data, context):
        return self.body(torch.cat([data["x"], data["mask"]], 1))


def not_miwae(mask):
    """Return x imputed by a joint model of the pixels and of the mask."""
    torch.manual_seed(1)
    likelihood = likelihoods.Joint(x="gaussian", mask="bernoulli")
    vae = fastvae.VAE(Encoder(), NotMIWAE(), likelihood=likelihood)
    data = {"x": torch.where(mask, x, 0), "mask": mask.float()}

    def step(rows):
        part = {name: value[rows] for name, value in data.items()}
        context = {"x": part["x"], "mask": mask[rows]}
        return vae.iwae(part, k=5, mask={"x": mask[rows]}, context=context)

    train(step, vae.parameters())
    return vae.impute(data, {"x": mask}, k=200, context={"x": data["x"], "mask": mask}).mean["x"]


size_imputed = simple(by_size) | {"MIWAE": miwae(by_size), "not-MIWAE": not_miwae(by_size)}
size_errors = errors(size_imputed, by_size)
print("missing by size: " + ", ".join(f"{name} {v:.3f}" for name, v in size_errors.items()))

# %%
# At random, MIWAE, neighbours and regressions are about as good. Where dark pixels are missing, methods that
# see the observed values alone take pixels to be too bright, and only the joint model corrects it. It does so
# by an assumption that data cannot check, and that is true here: one logistic law hides the values of all
# pixels.

figure, (images, left, right) = pyplot.subplots(
    1, 3, figsize=(11, 3.4), width_ratios=(1.5, 1, 1), layout="constrained"
)
rows = {"x": x, "observed": torch.where(by_size, x, torch.nan)}
rows |= {name: size_imputed[name] for name in ("MIWAE", "not-MIWAE")}
tiles = torch.stack([value[:8] for value in rows.values()]).reshape(4, 8, 8, 8).clamp(0, 1)
framed = nn.functional.pad(tiles, (1, 1, 1, 1), value=0.2)
images.set_facecolor("#8fc4e8")
images.imshow(framed.permute(0, 2, 1, 3).reshape(40, 80), cmap="gray_r", vmin=0, vmax=1)
images.set_yticks([10 * i + 4.5 for i in range(4)], rows)
images.set(xticks=[], title="Dark pixels missing (blue)")
for place, found, title in (
    (left, random_errors, "Half missing, at random"),
    (right, size_errors, "Dark pixels missing"),
):
    names = sorted(found, key=found.get, reverse=True)
    bars = place.barh(names, [found[name] for name in names])
    for bar, name in zip(bars, names, strict=True):
        bar.set_color("#0072b2" if "MIWAE" in name else "#bbbbbb")
    place.bar_label(bars, fmt="%.2f", padding=2)
    place.set(title=title, xlabel="rms error", xlim=(0, 0.75), xticks=[])
    place.spines[["top", "right", "bottom"]].set_visible(False)
