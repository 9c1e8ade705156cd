"""
Labels: conditional and semi-supervised models
==============================================

A label may condition encoder and decoder, which then leave to z what the label does not say. Where most
labels are missing, the bound is summed over the classes, and a classifier learns from images without a label.
"""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

import fastvae

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.data))
x = torch.bernoulli(torch.tensor(digits.data / 16, dtype=torch.float32))[order]
y = torch.tensor(digits.target)[order]
train, test = slice(0, 1400), slice(1400, None)


class WithLabel(nn.Module):
    """Network of an input and a one-hot label."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs + 10, 128), nn.ReLU(), nn.Linear(128, outputs))

    def forward(self, value, label):
        return self.body(torch.cat([value, label], 1))


def conditional():
    return fastvae.VAE(WithLabel(64, 2 * 4), WithLabel(4, 64), likelihood="bernoulli", latent_dim=4)


# %%
# **Conditional.** ``context=`` is the second argument of encoder and decoder; the bound is of log p(x|y).
# ``evaluate`` takes it from a batch through ``prepare_batch``.

vae = conditional()
optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
labels = one_hot(y, 10).float()
for _ in range(40):
    for rows in torch.randperm(1400).split(100):
        optimizer.zero_grad()
        (-vae.elbo(x[rows], context=labels[rows])).backward()
        optimizer.step()
data = torch.utils.data.TensorDataset(x[test], labels[test])
given = vae.evaluate(
    data, k=500, prepare_batch=lambda batch: {"x": batch[0], "context": batch[1]}, progress=False
)
print(f"log p(x|y) {-given.nll:.2f} ± {given.stderr:.2f}")

# %%
# By Bayes' rule the model of images is a classifier, too: log p(x|y) for all y, which ``marginalize`` sums.

both = fastvae.marginalize(
    x[test], lambda x, y: vae.log_marginal(x, context=y, k=100).log_px, classes=10, terms=True
)
right = both.log_responsibilities.argmax(1) == y[test]
print(f"log p(x) {both.bound.mean():.2f}; p(y|x) is right for {100 * right.float().mean():.1f} %")
logistic = LogisticRegression(max_iter=1000).fit(x[train], y[train])
print(f"logistic regression: {100 * logistic.score(x[test], y[test]):.1f} %")

# %%
# **Semi-supervised** (M2, Kingma et al. 2014). A few images have a label. For the others the bound is the sum
# over the classes, weighted by a classifier q(y|x), which is trained by both.


def classifier():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10))


def supervised(n):
    """Train the classifier by its n labels alone."""
    torch.manual_seed(1)
    net = classifier()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy(net(x[:n]), y[:n]).backward()
        optimizer.step()
    return net.eval()


def m2(n, epochs=25):
    """Train the classifier and a conditional VAE by n labels and all images."""
    torch.manual_seed(1)
    vae, net = conditional(), classifier()
    optimizer = torch.optim.Adam([*vae.parameters(), *net.parameters()], lr=2e-3)

    def bound(x, y):
        return vae.elbo(x, context=y, reduction="none")

    for _ in range(epochs):
        for rows in torch.randperm(1400).split(100):
            some = torch.randint(n, (50,))
            with_label = bound(x[some], labels[some]).mean()
            without = fastvae.marginalize(x[rows], bound, log_q=net(x[rows]))
            optimizer.zero_grad()
            (cross_entropy(net(x[some]), y[some]) * 20 - with_label - without).backward()
            optimizer.step()
    return net.eval()


counts, accuracy = (20, 50, 200), {}
for name, train_net in (("labels alone", supervised), ("M2, all images", m2)):
    nets = [train_net(n) for n in counts]
    accuracy[name] = [100 * float((net(x[test]).argmax(1) == y[test]).float().mean()) for net in nets]
    print(
        f"{name:>14}: " + ", ".join(f"{v:.1f} % by {n}" for n, v in zip(counts, accuracy[name], strict=True))
    )

# %%
# Left: each row is one z, each column a label: z has learned the style. Right: with few labels the images
# without one help, with 200 they add nothing here.

figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
z = torch.randn(8, 4, generator=torch.Generator().manual_seed(3)).repeat_interleave(10, 0)
with torch.no_grad():
    images = vae.decoder(z, torch.eye(10).repeat(8, 1)).sigmoid().reshape(8, 10, 8, 8)
framed = nn.functional.pad(images, (1, 1, 1, 1), value=0.2)
left.imshow(framed.permute(0, 2, 1, 3).reshape(80, 100), cmap="gray_r", vmin=0, vmax=1)
left.set_xticks([10 * i + 4.5 for i in range(10)], range(10))
left.set(yticks=[], xlabel="label", ylabel="one z in each row", title="A label for what, z for how")
for name, color, side in (("M2, all images", "#0072b2", 16), ("labels alone", "#d55e00", -16)):
    right.plot(counts, accuracy[name], "o-", color=color, lw=2)
    at = (counts[0], accuracy[name][0])
    right.annotate(name, at, (4, side), textcoords="offset points", color=color, fontweight="bold")
right.set(xscale="log", xlabel="images with a label, of 1400", title="Test images that are recognised, %")
right.set_xticks(counts, counts)
right.minorticks_off()
right.margins(y=0.15)
right.spines[["top", "right"]].set_visible(False)
