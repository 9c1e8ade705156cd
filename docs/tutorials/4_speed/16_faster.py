"""
Train faster
============

What makes a training step faster, measured here on one thread of a CPU where that is possible: the fused last
layer, chunks of samples, the compiler, CUDA graphs, and several processes.
"""

import math
import time

import torch
from matplotlib import pyplot
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import fastvae

torch.manual_seed(0)
torch.set_num_threads(1)
BATCH, PIXELS, LATENTS = 50, 784, 20
x = torch.rand(BATCH, PIXELS).round()
encoder = nn.Sequential(nn.Linear(PIXELS, 200), nn.ReLU(), nn.Linear(200, 2 * LATENTS))
decoder = nn.Sequential(nn.Linear(LATENTS, 200), nn.ReLU(), nn.Linear(200, PIXELS))

# %%
# **The fused last layer.** With K samples the largest tensor of a step is the decoder's output, K·B·784
# numbers. A ``VAE`` whose decoder ends in an ``nn.Linear`` computes it block by block together with the
# likelihood, and never stores it, for outputs of some hundred thousand numbers or more; ``fuse=False`` turns
# that off. (Other decoders: :doc:`/guide/last_layer`.)


def eager(k):
    """Return IWAE's bound as it is usually written."""
    mu, logvar = encoder(x).chunk(2, dim=1)
    eps = torch.randn(k, *mu.shape)
    z = mu + (0.5 * logvar).exp() * eps
    logits = decoder(z.flatten(0, 1)).unflatten(0, (k, -1))
    log_w = -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
    log_w = log_w + 0.5 * (eps.square() + logvar - z.square()).sum(-1)
    return (torch.logsumexp(log_w, 0) - math.log(k)).mean()


fused = fastvae.VAE(encoder, decoder, likelihood="bernoulli")
stored = fastvae.VAE(encoder, decoder, likelihood="bernoulli", fuse=False)
steps = {
    "eager PyTorch": eager,
    "fastvae, output stored": lambda k: stored.iwae(x, k=k),
    "fastvae, fused": lambda k: fused.iwae(x, k=k),
}


def milliseconds(functions, rounds):
    """Return the least CPU time of each step, forward and backward, taken in turns."""
    least = dict.fromkeys(functions, math.inf)
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.process_time()
            (-function()).backward()
            least[name] = min(least[name], 1e3 * (time.process_time() - begin))
    return least


def kept_mib(step, k):
    """Return MiB that a step keeps between its forward and its backward pass, without the model and x."""
    sizes = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        step(k)
    known = {t.untyped_storage().data_ptr() for t in (x, *fused.parameters())}
    return sum(size for address, size in sizes.items() if address not in known) / 2**20


samples = (1, 5, 20, 50, 100)
found = {name: [] for name in steps}
kept = {name: [kept_mib(step, k) for k in samples] for name, step in steps.items()}
for k in samples:
    measured = milliseconds({name: lambda k=k, step=step: step(k) for name, step in steps.items()}, 15)
    for name, value in measured.items():
        found[name].append(value)
    ratio = measured["eager PyTorch"] / measured["fastvae, fused"]
    print(f"K = {k:3}: eager / fused {ratio:.2f}")
for name, values in kept.items():
    print(f"{name}: {values[-1]:.1f} MiB kept for the backward pass at K = {samples[-1]}")

# %%
# **Chunks of samples.** ``k_chunk`` computes the exact gradient of a large K in the memory of a small one. It
# decodes twice, so that it is for K that does not fit, not for speed.

chunked = milliseconds(
    {"whole": lambda: stored.iwae(x, k=100), "chunks": lambda: stored.iwae(x, k=100, k_chunk=10)}, 5
)
print(f"K = 100 in chunks of 10: {chunked['chunks'] / chunked['whole']:.2f} times as long")

# %%
# **The estimator** may save more than any kernel: ``estimator="dreg"`` gives the encoder a better gradient
# for the same samples (:doc:`/auto_tutorials/1_start/03_gradients`).
#
# **The compiler.** ``torch.compile(vae, fullgraph=True)`` compiles one graph, in which the fused ops are
# called without Python. Compiling takes longer than this page, so it is not measured here; :doc:`/benchmarks`
# has whole steps. For small models with K = 1 the compiler alone is as good or better.
#
# .. code-block:: python
#
#     compiled = torch.compile(vae, fullgraph=True)
#     loss = -compiled(x, objective="iwae", k=50)  # a β that changes must be a tensor, as schedules return it
#
# **CUDA graphs.** On a GPU a small model waits for launches. ``fastvae.graphed`` captures a step, and replays
# all of its kernels by one launch; on a CPU it calls the step as it is. Not measured here: :doc:`/gpu`.
#
# .. code-block:: python
#
#     optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, capturable=True)
#
#     @fastvae.graphed
#     def step(x):
#         optimizer.zero_grad()
#         loss = -vae.iwae(x, k=50)
#         loss.backward()
#         optimizer.step()
#         return loss.detach()
#
# **Several processes.** Call the wrapper, not the method of the wrapped model, and give each rank the index
# of its first row, so that the ranks draw different noise:
#
# .. code-block:: python
#
#     ddp = torch.nn.parallel.DistributedDataParallel(vae)
#     loss = -ddp(x, objective="iwae", k=5, row_offset=rank * batch_size)
#
#     # Accelerate
#     vae, optimizer, loader = accelerator.prepare(vae, optimizer, loader)
#     loss = -vae(x, objective="iwae", k=5, row_offset=accelerator.process_index * batch_size)
#
#     # Lightning, in a LightningModule that has encoder and decoder
#     @functools.cached_property
#     def vae(self):
#         return fastvae.VAE(self.encoder, self.decoder, likelihood="bernoulli", latent_dim=20)
#
#     def training_step(self, batch, index):
#         return -self.vae.iwae(batch[0], k=5, row_offset=self.global_rank * batch_size)
#
# :doc:`/integrations/training` has whole scripts for each, with bfloat16, accumulated gradients, checkpoints
# and resumption.

# %%
# Left, what a step keeps for its backward pass; right, its CPU time. The fused layer saves memory first of
# all. The gain in time depends on the machine, and on what else runs on it.

figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
colors = {"eager PyTorch": "#888888", "fastvae, output stored": "#009e73", "fastvae, fused": "#0072b2"}
offsets = {"eager PyTorch": (6, -4), "fastvae, output stored": (-10, -12), "fastvae, fused": (-4, 8)}
for name, color in colors.items():
    gain = [e / f for e, f in zip(found["eager PyTorch"], found[name], strict=True)]
    for i, (axes, values) in enumerate(((left, kept[name]), (right, gain))):
        axes.plot(samples, values, "o--" if "stored" in name else "o-", color=color, lw=2)
        at, offset = (samples[-1], values[-1]), (8, offsets[name][i])
        axes.annotate(name, at, offset, textcoords="offset points", color=color, fontweight="bold")
for axes in (left, right):
    axes.set(xscale="log", xlim=(0.9, 2500), xlabel="K, samples of each image")
    axes.set_xticks(samples, samples)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
left.set_title("MiB kept for the backward pass")
right.set_title("An IWAE step: times as fast as eager PyTorch")
