"""``python -m tools.fakecard -- COMMAND``: torch's CUDA build on a machine without a card.

The package index serves torch's CUDA build, and all that it asks of NVIDIA's libraries can be answered by
stand-ins. ``torch.cuda.is_available()`` is then True: autograd's device threads, the caching allocator,
streams, Triton's compiler and launcher, ``torch.compile``, CUDA graphs and several devices run, on the CPU.

A kernel is counted and does nothing, so that what is left is the host's work: its microseconds and launches
can be measured (:mod:`tools.fakecard.control`). Within ``device.computing()`` (:mod:`tools.fakecard.device`)
kernels do compute: the PTX of Triton's is emulated, and torch's own ops run on the CPU.

Outside the environment ``build`` makes it; inside, ``control`` and ``device`` are used.
"""

from __future__ import annotations

import os

# Set in the environment of the command, to the folder of the stand-in libraries.
LIBRARIES = "FASTVAE_FAKECARD"
DEVICES = "FASTVAE_FAKECARD_DEVICES"


def is_active() -> bool:
    """Return True if this process runs with the fake card."""
    return bool(os.environ.get(LIBRARIES))
