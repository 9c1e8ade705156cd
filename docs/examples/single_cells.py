"""``python docs/examples/single_cells.py``: SCVI with fused likelihoods, and log p(x) of held-out cells.

Needs ``pip install scvi-tools``. The cells are simulated; for your own, replace ``simulate()`` by
``anndata.read_h5ad(path)``.
"""

import logging
import warnings

import anndata
import numpy as np
import scvi

from fastvae.integrations.scvi import evaluate, fast


def simulate(cells: int = 1000, genes: int = 200) -> anndata.AnnData:
    """Draw negative binomial counts of four kinds of cells in two batches."""
    draw = np.random.default_rng(0)
    kind, batch = draw.integers(4, size=cells), draw.integers(2, size=cells)
    profile = np.exp(draw.standard_normal((4, genes)) + 0.3 * draw.standard_normal((2, 1, genes)))
    mean = 2 * profile[batch, kind] * np.exp(0.3 * draw.standard_normal((cells, 1)))
    data = anndata.AnnData(draw.poisson(draw.gamma(2.0, mean / 2.0)).astype(np.float32))
    data.obs["batch"] = batch.astype(str)
    return data


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    scvi.settings.seed = 0
    data = simulate()
    SCVI = fast(scvi.model.SCVI)  # the only change to the training
    SCVI.setup_anndata(data, batch_key="batch")
    model = SCVI(data, n_latent=5, gene_likelihood="nb")
    model.train(max_epochs=60, train_size=0.9, accelerator="cpu", enable_progress_bar=False)
    held_out = model.validation_indices
    result = evaluate(model, indices=held_out, k=2000, progress=False)
    print(f"log p(x) of {len(held_out)} held-out cells: {-result.nll:.2f} ± {result.stderr:.2f} nats")
    print(f"k-hat above 0.7, not to be trusted: {result.untrusted:.1%} of the cells")
    theirs = model.get_marginal_ll(indices=held_out, n_mc_samples=2000, n_mc_samples_per_pass=100)
    print(f"get_marginal_ll with as many draws: {theirs:.2f} nats")


if __name__ == "__main__":
    main()
