"""Estimates of log p(x) for data sets: streamed over draws, sharded over ranks, resumable, with errors."""

from .audit import Audit
from .loop import evaluate
from .result import Evaluation

__all__ = ["Audit", "Evaluation", "evaluate"]
