"""``python -m benchmarks.integrations``: a training step of scvi-tools' SCVI, and of the fast class.

Forward, backward and Adam on 128 cells, with one thread, in CPU time. Blocks of steps alternate, and the
ratio is that of adjacent blocks. Needs ``pip install scvi-tools``.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from typing import Any

import numpy as np
import torch

from fastvae.integrations.scvi import fast

from .single_cell import counts

CELLS = 128


class Step:
    """Training step of a model class on one batch."""

    def __init__(self, model_class: Any, x: np.ndarray, gene_likelihood: str):
        import anndata
        import scvi

        data = anndata.AnnData(x)
        scvi.settings.seed = 0
        model_class.setup_anndata(data)
        self._module = model_class(data, gene_likelihood=gene_likelihood).module.train()
        # As scvi-tools' training plan has it.
        self._optimizer = torch.optim.Adam(self._module.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6)
        zeros = torch.zeros(len(x), 1, dtype=torch.long)
        self._batch = {"X": torch.from_numpy(x), "batch": zeros, "labels": zeros}

    def block(self, steps: int) -> float:
        """Return the CPU seconds of a step, the mean of a block of them."""
        start = time.process_time()
        for _ in range(steps):
            self._optimizer.zero_grad()
            self._module(self._batch, loss_kwargs={"kl_weight": 1.0})[2].loss.backward()
            self._optimizer.step()
        return (time.process_time() - start) / steps


def main() -> None:
    import scvi

    parser = argparse.ArgumentParser(prog="python -m benchmarks.integrations", description=__doc__)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="steps of a block (default: 10)")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for gene_likelihood in ("zinb", "nb", "poisson"):
        for genes in (2000, 4000):
            x = counts(CELLS, genes)
            both = [Step(c, x, gene_likelihood) for c in (scvi.model.SCVI, fast(scvi.model.SCVI))]
            times = np.array([[s.block(args.steps) for s in both] for _ in range(args.blocks + 2)])[2:]
            low, middle, high = np.percentile(times[:, 0] / times[:, 1], (20, 50, 80))
            theirs, ours = 1e3 * np.median(times, 0)
            print(
                f"{gene_likelihood:8} {genes} genes: {theirs:.1f} ms, fast {ours:.1f} ms; ratio {middle:.2f} "
                f"({low:.2f} to {high:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
