"""scikit-learn's digits and a small VAE of them, for the examples of training loops."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastvae

BATCH = 32


def digits():
    """Return training and test images, [N, 64] in [0, 1]."""
    x = torch.from_numpy(load_digits().data).float() / 16
    return x[:1536], x[1536:]


def networks():
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
    decoder = nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 64))
    return encoder, decoder


def build_vae():
    torch.manual_seed(0)
    return fastvae.VAE(*networks(), likelihood="bernoulli", latent_dim=4)


def say(log_px, images, resumed_equals_whole):
    print(f"log p(x): {log_px:.2f} nats, of {images} images")
    print("resumed:", "equal" if resumed_equals_whole else "different")
