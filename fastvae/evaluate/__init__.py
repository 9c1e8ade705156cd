"""log p(x) of whole data sets: streamed over draws, sharded over ranks, resumable, with its error."""

from .loop import evaluate
from .result import Evaluation

__all__ = ["Evaluation", "evaluate"]
