"""log p(x) of whole data sets: streamed over draws, sharded over ranks, resumable, with its error."""

from .audit import Audit
from .loop import evaluate
from .result import Evaluation

__all__ = ["Audit", "Evaluation", "evaluate"]
