"""Likelihoods built from torch.distributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

from ..core.checks import as_int64, shape_of
from .base import Likelihood
from .outputs import describe


class TorchLikelihood(Likelihood):
    """Likelihood returned by :func:`from_distribution`."""

    takes_integers = True

    def __init__(self, constructor: Callable[..., td.Distribution], inside: float):
        super().__init__()
        self.constructor = constructor  # a module is registered, with its parameters
        self.inside = inside  # type: ignore[misc]

    def distribution(self, parameters: Any) -> td.Distribution:
        """Return p(x|z) for the decoder's output for N rows."""
        if isinstance(parameters, Mapping):
            made = self.constructor(**parameters)
        elif isinstance(parameters, (tuple, list)):
            made = self.constructor(*parameters)
        else:
            made = self.constructor(parameters)
        if not isinstance(made, td.Distribution):
            raise TypeError(
                f"the constructor given to from_distribution returned {describe(made)}; expected a "
                "torch.distributions object, such as torch.distributions.Bernoulli(logits=logits)"
            )
        return made

    def log_prob(self, x: Tensor, parameters: Any) -> Tensor:
        x = as_int64(x)
        made = self.distribution(parameters)
        try:
            return made.log_prob(x)
        except RuntimeError as error:
            if hasattr(error, "add_note"):  # Python 3.11
                axes = list(made.batch_shape), list(made.event_shape)
                error.add_note(
                    f"from_distribution gave {type(made).__name__} of batch shape {axes[0]} and event shape "
                    f"{axes[1]} an x {shape_of(x)}, whose first axis is that of the decoder's rows"
                )
            raise

    def mean(self, parameters: Any) -> Tensor:
        return self.distribution(parameters).mean

    def sample(self, parameters: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw x with torch's own random state, seeded by ``generator`` if given.

        torch.distributions accept no generator.
        """
        if generator is None:
            return self.distribution(parameters).sample()
        with torch.random.fork_rng([] if generator.device.type == "cpu" else [generator.device]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            return self.distribution(parameters).sample()

    def extra_repr(self) -> str:
        own = [] if isinstance(self.constructor, nn.Module) else [repr(self.constructor)]
        return ", ".join([*own, *[f"inside={self.inside}"] * (self.inside != 0)])


def from_distribution(constructor: Callable[..., td.Distribution], *, inside: float = 0.0) -> TorchLikelihood:
    r"""Build a likelihood from a ``torch.distributions`` constructor, for every objective, in plain PyTorch.

    .. math:: \log p(x|z_k) = \sum_i \log p_{θ_k}(x_i), \quad θ_k \text{ the decoder's output}

    Args:
        constructor: maps the decoder's output to a distribution whose batch and event shapes together are
            [N, \*event]. A tuple is passed as positional arguments, a dict as keyword arguments. Any
            callable; the parameters of a module become the likelihood's.
        inside: a valid value of x, which replaces the elements that a ``mask`` leaves out.

    Raises:
        TypeError: if constructor is not callable; when called, if it returns no distribution.

    Example:
        >>> import torch, fastvae
        >>> from torch import distributions as td
        >>> binomial = fastvae.likelihoods.from_distribution(lambda logits: td.Binomial(10, logits=logits))
        >>> counts, q = torch.randint(11, (4, 7)), torch.zeros(4, 2 * 3)
        >>> fastvae.iwae(counts, q, torch.nn.Linear(3, 7), k=5, likelihood=binomial).shape
        torch.Size([])
        >>> vae = fastvae.VAE(torch.nn.Linear(7, 6), torch.nn.Linear(3, 7), likelihood=binomial, latent_dim=3)
        >>> vae.sample(2).shape
        torch.Size([2, 7])
    """
    if not callable(constructor):
        raise TypeError(
            "constructor must be a function of the decoder's output that returns a torch.distributions "
            f"object, such as torch.distributions.Normal; got {describe(constructor)}"
        )
    return TorchLikelihood(constructor, inside)
