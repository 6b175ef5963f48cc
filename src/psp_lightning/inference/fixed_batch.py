"""Batches of a fixed size, for functions that are compiled or captured as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Result = Tensor | tuple[Tensor | None, ...]


def _each(change: Callable[[Tensor], Tensor], result: Result) -> Result:
    """Return the result with each of its tensors changed."""
    if isinstance(result, Tensor):
        return change(result)
    return tuple(None if part is None else change(part) for part in result)


class FixedBatch:
    """A function that is called only with batches of one size; smaller batches are padded.

    It takes tensors and returns a tensor, or a tuple of tensors and None.

    Args:
        function: a module or its method. It treats the samples of a batch independently and does not wait for the
            device.
        batch: the batch size.
        compile: compile the function at the first call.
        graph: on CUDA, capture the function at the first call with inputs of certain shapes, and replay the graph from
            then on. If the capture fails, warn and call the function instead. The weights must not be replaced after
            the first call.
    """

    def __init__(self, function: Callable[..., Result], batch: int, compile: bool, graph: bool) -> None:
        self.function = torch.compile(function, dynamic=False) if compile else function
        self.batch, self.wants_graph = batch, graph
        self._owner = getattr(function, "__self__", function)
        self._replays: dict[tuple[torch.Size, ...], Callable[..., Result]] = {}  # by the shapes of the inputs

    def __call__(self, *inputs: Tensor) -> Any:
        n = len(inputs[0])
        if n < self.batch:
            inputs = tuple(torch.cat([x, x[-1:].expand(self.batch - n, *x.shape[1:])]) for x in inputs)
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._replays and self.wants_graph and inputs[0].is_cuda:
            self._replays[shapes] = self._capture(inputs)
        return _each(lambda y: y[:n], self._replays.get(shapes, self.function)(*inputs))

    def _capture(self, inputs: tuple[Tensor, ...]) -> Callable[..., Result]:
        """Return a replay of the function's graph, or the function if it cannot be captured."""
        given = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # also restores the current stream if ending a failed capture raises
            for _ in range(3):  # keeps the one-time work of first calls out of the graph
                self.function(*given)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: other threads, such as the one that pins memory for a DataLoader, may use CUDA meanwhile
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    result = self.function(*given)
            except RuntimeError as error:
                warnings.warn(f"No CUDA graph is used, because it could not be captured: {error}", stacklevel=4)
                return self.function
        torch.cuda.current_stream().wait_stream(stream)
        owner, read = self._owner, []  # the graph contains only addresses: what it reads must not be freed
        if isinstance(owner, nn.Module):
            read = [*owner.parameters(), *owner.buffers()]

        def replay(*inputs: Tensor, _kept: list[Tensor] = read) -> Result:
            for own, x in zip(given, inputs, strict=True):
                own.copy_(x)
            graph.replay()
            return _each(torch.clone, result)  # the next replay overwrites it

        return replay
