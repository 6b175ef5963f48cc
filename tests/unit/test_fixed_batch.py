"""Batches of a fixed size: filled up, and replayed as a CUDA graph, which fakes stand in for here."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from psp_lightning.inference.fixed_batch import FixedBatch


def test_a_smaller_batch_is_filled_up() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return 2 * x

    call = FixedBatch(function, 4, compile=False, graph=True)  # a graph is for CUDA tensors alone
    for n in (4, 1, 3):
        x = torch.randn(n, 3, 5)
        assert torch.equal(call(x), 2 * x)
    assert seen == [(4, 3, 5)] * 3


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


class FakeGraphs:
    """Stands in for CUDA graphs: capturing calls the function, replaying calls it again and writes into its result."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: str = "") -> None:
        self.error, self.entered, self.modes = error, 0, []
        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": lambda: self}
        for name, fake in (*fakes.items(), ("stream", self.current), ("graph", self.capture)):
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def current(self, stream: object) -> Iterator[None]:
        self.entered += 1
        yield
        self.entered -= 1

    @contextmanager
    def capture(self, graph: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        self.modes.append(capture_error_mode)
        yield
        if self.error:
            raise RuntimeError(self.error)

    def replay(self) -> None:
        self.replays = getattr(self, "replays", 0) + 1


def test_a_graph_is_captured_once_beside_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the mode in which a thread that pins memory may go on, and only the first call captures."""
    graphs = FakeGraphs(monkeypatch)
    layer = torch.nn.Linear(5, 2).requires_grad_(False)
    call = FixedBatch(layer, 4, compile=False, graph=True)
    for n in (4, 1, 3):
        assert call(torch.randn(n, 5).as_subclass(OnGPU)).shape == (n, 2)
    assert graphs.modes == ["thread_local"] and graphs.replays == 3


def test_inputs_of_other_shapes_get_their_own_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes, and codes with features, are decoded in one prediction."""
    graphs = FakeGraphs(monkeypatch)
    call = FixedBatch(lambda *inputs: sum(x.sum(1) for x in inputs), 2, compile=False, graph=True)
    one, two = torch.ones(2, 3).as_subclass(OnGPU), torch.ones(2, 4).as_subclass(OnGPU)
    for inputs, expected in (((one,), 3.0), ((one, two), 7.0), ((two,), 4.0), ((one,), 3.0)):
        assert call(*inputs).tolist() == [expected] * 2
    assert len(graphs.modes) == 3 and graphs.replays == 4


@pytest.mark.parametrize("method", [False, True], ids=["module", "method"])
def test_a_graph_holds_the_weights_that_it_reads(method: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the network gets others: the graph knows only their addresses."""
    FakeGraphs(monkeypatch)
    layer = torch.nn.BatchNorm1d(5).eval().requires_grad_(False)
    kept = [weakref.ref(tensor) for tensor in (layer.weight, layer.running_mean)]
    call = FixedBatch(layer.forward if method else layer, 2, compile=False, graph=True)
    call(torch.randn(2, 5).as_subclass(OnGPU))
    layer.weight = torch.nn.Parameter(torch.ones(5), requires_grad=False)
    layer.running_mean = torch.ones(5)
    gc.collect()
    assert all(ref() is not None for ref in kept)
    del call
    gc.collect()
    assert all(ref() is None for ref in kept)


@pytest.mark.parametrize("error", ["operation not permitted when stream is capturing", "out of memory"])
def test_without_a_graph_the_function_is_called(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = FakeGraphs(monkeypatch, error)
    call = FixedBatch(lambda x: 2 * x, 4, compile=False, graph=True)
    x = torch.randn(3, 5).as_subclass(OnGPU)
    with pytest.warns(UserWarning, match=f"No CUDA graph.*{error}"):
        assert torch.equal(call(x), 2 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(x + 1), 2 * (x + 1)) and len(graphs.modes) == 1
    assert graphs.entered == 0, "the current stream is another one now"


def test_an_error_of_the_function_itself_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for a failed capture, and the next call starts anew."""
    graphs = FakeGraphs(monkeypatch)
    call = FixedBatch(torch.nn.Linear(5, 2).requires_grad_(False), 4, compile=False, graph=True)
    with pytest.raises(RuntimeError, match="shapes"):
        call(torch.randn(4, 3).as_subclass(OnGPU))
    assert not graphs.modes
    assert call(torch.randn(4, 5).as_subclass(OnGPU)).shape == (4, 2) and graphs.replays == 1
