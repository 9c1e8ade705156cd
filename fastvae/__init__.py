"""fastvae: the objectives of variational autoencoders on fused kernels. See README.md."""

from . import ops, random
from ._backend import use_backend

__version__ = "0.1.0"
__all__ = ["ops", "random", "use_backend"]
