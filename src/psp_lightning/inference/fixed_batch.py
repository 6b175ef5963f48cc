"""Batches of a fixed size, for functions that are compiled or captured as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn


class FixedBatch:
    """A function that is called only with batches of one size; smaller batches are padded.

    Args:
        function: a module or its method. It treats the samples of a batch independently and does not wait for the
            device.
        batch: the batch size.
        compile: compile the function at the first call.
        graph: on CUDA, capture the function at the first call and replay the graph from then on. If the capture fails,
            warn once and call the function instead. The weights must not be replaced after the first call.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], batch: int, compile: bool, graph: bool) -> None:
        self.function = torch.compile(function, dynamic=False) if compile else function
        self.batch, self.wants_graph = batch, graph
        self._owner = getattr(function, "__self__", function)
        self._replay: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        n = len(x)
        if n < self.batch:
            x = torch.cat([x, x[-1:].expand(self.batch - n, *x.shape[1:])])
        if self._replay is None and self.wants_graph and x.is_cuda:
            self._replay = self._capture(x)
        return (self._replay or self.function)(x)[:n]

    def _capture(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a replay of the function's graph, or the function if it cannot be captured."""
        given = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # also restores the current stream if ending a failed capture raises
            for _ in range(3):  # keeps the one-time work of first calls out of the graph
                self.function(given)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: other threads, such as the one that pins memory for a DataLoader, may use CUDA meanwhile
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    result = self.function(given)
            except RuntimeError as error:
                warnings.warn(f"No CUDA graph is used, because it could not be captured: {error}", stacklevel=4)
                return self.function
        torch.cuda.current_stream().wait_stream(stream)
        owner, read = self._owner, []  # the graph contains only addresses: what it reads must not be freed
        if isinstance(owner, nn.Module):
            read = [*owner.parameters(), *owner.buffers()]

        def replay(x: Tensor, _kept: list[Tensor] = read) -> Tensor:
            given.copy_(x)
            graph.replay()
            return result.clone()  # the next replay overwrites it

        return replay
