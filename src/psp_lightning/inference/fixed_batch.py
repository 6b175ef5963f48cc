"""Batches of a fixed size, for functions that are compiled or captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class FixedBatch:
    """A function that is called only with batches of one size; smaller batches are padded.

    Args:
        function: a function of tensors whose samples are independent; it must not wait for the device.
        batch: the batch size.
        compile: compile the function at the first call.
        graph: on CUDA, capture the function at the first call and replay the graph from then on.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], batch: int, compile: bool, graph: bool) -> None:
        self.function = torch.compile(function, dynamic=False) if compile else function
        self.batch, self.wants_graph = batch, graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: Tensor | None = None
        self._result: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        n = len(x)
        if n < self.batch:
            x = torch.cat([x, x[-1:].expand(self.batch - n, *x.shape[1:])])
        return (self._replay(x) if self.wants_graph and x.is_cuda else self.function(x))[:n]

    def _replay(self, x: Tensor) -> Tensor:
        if self._graph is None:
            self._given = x.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # keeps one-time work of first calls out of the graph
                for _ in range(3):
                    self.function(self._given)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self.function(self._given)
        assert self._given is not None and self._result is not None
        self._given.copy_(x)
        self._graph.replay()
        return self._result.clone()  # the next replay overwrites it
