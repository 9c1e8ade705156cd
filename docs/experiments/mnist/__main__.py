"""``python -m docs.experiments.mnist COMMAND --data FOLDER``: published numbers of VAEs on MNIST.

For docs/published.md. ``train`` continues runs from their checkpoints up to ``--epochs``; ``evaluate`` writes
a line for each to docs/published.csv; ``noise`` measures the gradients of a trained model; ``compare`` trains
by plain PyTorch and by fastvae with the same noise; ``accuracy`` measures errors of estimates of log p(x).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastvae.cli.images import idx_folder

from . import accuracy, compare, evaluation, noise
from .runs import RUNS
from .training import trained


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.experiments.mnist", description=__doc__)
    parser.add_argument("command", choices=["train", "evaluate", "noise", "compare", "accuracy"])
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of checkpoints")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--epochs", type=int, default=40, help="in total; Burda et al. trained for 3280")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graph", action="store_true", help="train by CUDA graphs")
    parser.add_argument("--k", type=int, help="draws per image; default: 5000, and 5 to compare")
    parser.add_argument("--train", type=int, help="training images; default: all")
    parser.add_argument("--test", type=int, help="test images; default: all")
    parser.add_argument("--refined", type=int, default=1000, help="test images for the refined proposal")
    parser.add_argument("--annealed", type=int, default=100, help="test images for annealing")
    parser.add_argument("--evaluations", type=int, default=400, help="gradients for each K")
    parser.add_argument("--khat", type=float, help="noise: only images with a k̂ below this; default: all")
    parser.add_argument("--results", type=Path, help="file of the results; default: in docs/")
    options = parser.parse_args()
    options.models.mkdir(exist_ok=True, parents=True)
    if options.device == "cpu":
        torch.set_num_threads(1)
    images = idx_folder(options.data)
    train, test = images.train[: options.train], images.test[: options.test]
    train, test = train.to(options.device), test.to(options.device)
    if options.command == "compare":
        rows = compare.compared(train, options.k or 5, options.epochs)
        return compare.write(rows, options.results or compare.COMPARED)
    for name in options.runs:
        only = options.command != "train"
        run = trained(name, train, options.epochs, options.models, options.graph, train_on=not only)
        if options.command == "noise":
            chosen = test[:20]
            if options.khat is not None:
                chosen = noise.of_finite_variance(run.vae, test[:400], options.khat, 20)
            ratios = noise.ratios(run.vae, chosen, options.evaluations)
            noise.write(ratios, options.results or noise.NOISE)
        if options.command == "accuracy":
            found = accuracy.errors(run.vae, test[: options.annealed])
            accuracy.write(found, options.results or accuracy.ACCURACY)
        if options.command == "evaluate":
            sizes = options.k or 5000, options.refined, options.annealed
            line = evaluation.evaluated(name, run, test, *sizes)
            evaluation.write(line, options.results or evaluation.RESULTS)
            print(", ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    return None


if __name__ == "__main__":
    main()
