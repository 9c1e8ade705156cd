"""Training steps as CUDA graphs, with all kernels in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count, shape_of


def graphed(
    step: Callable[..., Any], *, generators: Sequence[torch.Generator] = (), warmup: int = 3
) -> Callable[..., Any]:
    """Run a training step as a CUDA graph, which launches all of its kernels at once.

    The first calls run eagerly and the next one is captured. From then on a call copies its inputs to the
    graph's input buffers, replays it, and returns copies of its results. Each call is one training step, with
    new noise. Inputs of other shapes than those captured, such as a smaller last batch, run eagerly, and so
    does every call on a CPU.

    A captured graph is fixed: Python does not run again. A learning rate or β that changes must be a
    tensor, changed in place; a number of samples that changes needs a graph for each value.
    ``optimizer.step`` must be inside the step, with an optimizer created with ``capturable=True``; the step
    must not read a number from the device (``.item()``, ``print``).

    Args:
        step: function of tensors that trains: zero_grad, the bound, backward, the optimizer's step. Returns
            a tensor, a tuple or a dataclass of tensors, or None.
        generators: generators of the device that the step draws from, in addition to torch's global one.
            Default: none.
        warmup: calls before the capture, in which kernels are compiled and tuned. Default 3.

    Returns:
        A function with the same arguments and results.

    Raises:
        TypeError: if the result is called with an argument that is not a tensor.
        RuntimeError: if the step cannot be captured.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
        >>> def step(x):
        ...     optimizer.zero_grad()
        ...     loss = -fastvae.iwae(x, encoder(x), decoder, k=5, likelihood="bernoulli")
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss.detach()
        >>> step = fastvae.graphed(step)
        >>> step(torch.rand(16, 8)).shape
        torch.Size([])
    """
    if not callable(step):
        raise TypeError(f"step must be a function of tensors, got {type(step).__name__}")
    warmup = check_count("warmup", warmup, "calls before the capture")
    for generator in generators:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generators must be torch.Generators, got {type(generator).__name__}")
    return _Graphed(step, tuple(generators), warmup)


class _Graphed:
    def __init__(self, step: Callable[..., Any], generators: tuple[torch.Generator, ...], warmup: int):
        self.step, self.generators, self.before_capture = step, generators, warmup
        self.graph: Any = None
        self.stream: Any = None
        self.inputs: tuple[Tensor, ...] = ()
        self.results: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        for i, given in enumerate(inputs):
            if not isinstance(given, Tensor):
                raise TypeError(
                    f"argument {i} of a graphed step is {type(given).__name__}; expected a tensor. Bind "
                    "what stays the same with functools.partial or in a closure"
                )
        if not self._on_a_card(inputs):
            return self.step(*inputs)
        if self.graph is None and self.before_capture:
            self.before_capture -= 1
            return self._on_the_side(inputs)
        if self.graph is None:
            self._capture(inputs)
        elif not self._fits(inputs):
            return self._on_the_side(inputs)
        for place, given in zip(self.inputs, inputs, strict=True):
            place.copy_(given)
        self.graph.replay()
        return _each(self.results, torch.clone)

    @staticmethod
    def _on_a_card(inputs: tuple[Tensor, ...]) -> bool:
        return any(t.is_cuda for t in inputs) if inputs else torch.cuda.is_available()

    def _fits(self, inputs: tuple[Tensor, ...]) -> bool:
        return len(inputs) == len(self.inputs) and all(
            t.shape == p.shape and t.dtype == p.dtype for t, p in zip(inputs, self.inputs, strict=True)
        )

    def _on_the_side(self, inputs: tuple[Tensor, ...]) -> Any:
        """Run the step eagerly on the capture stream, as autograd remembers the stream of each gradient."""
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self.step(*inputs)
        current.wait_stream(self.stream)

        def used_here(result: Tensor) -> Tensor:
            result.record_stream(current)
            return result

        return _each(results, used_here)

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(t.detach().clone() for t in inputs)
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.results = self.step(*self.inputs)
        except RuntimeError as error:
            shapes = ", ".join(map(shape_of, inputs))
            raise RuntimeError(
                f"fastvae.graphed: the step could not be captured with inputs {shapes}: {error}. A step must "
                "not read numbers from the device (.item(), print), must use an optimizer with "
                "capturable=True, and must draw from torch's own generator or from those given as generators"
            ) from error
        self.graph = graph


def _each(results: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if results is None:
        return None
    if isinstance(results, Tensor):
        return function(results)
    if isinstance(results, (tuple, list)) and all(isinstance(r, Tensor) for r in results):
        return tuple(function(r) for r in results)
    if is_dataclass(results) and not isinstance(results, type):
        values = vars(results)
        if all(isinstance(r, Tensor) for r in values.values()):
            return replace(results, **{name: function(r) for name, r in values.items()})
    raise TypeError(
        f"a graphed step must return a tensor, a tuple of tensors, or None; got {type(results).__name__}"
    )
