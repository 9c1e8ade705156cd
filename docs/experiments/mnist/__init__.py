"""Published numbers of VAEs on MNIST, trained and evaluated again: docs/published.md."""
