"""Metrics: values against formulas, independence of batching and ranks, clamping."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from psp_lightning.metrics import MSE, PSNR, IdSimilarity
from psp_lightning.utils.errors import UserError


def pairs(n: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y_hat = torch.randn(n, 3, 8, 8, generator=generator)  # not limited to [-1, 1]
    return y_hat, torch.rand(n, 3, 8, 8, generator=generator) * 2 - 1


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1))


def build(name: str):
    return {"mse": MSE, "psnr": PSNR, "id": lambda: IdSimilarity(cosine)}[name]()


def expected(name: str, y_hat: torch.Tensor, y: torch.Tensor) -> float:
    total = 0.0
    for a, b in zip(y_hat.double().clamp(-1, 1), y.double(), strict=True):
        mse = float((a - b).square().mean())
        value = {"mse": mse, "psnr": 20 * math.log10(2) - 10 * math.log10(mse), "id": float(cosine(a[None], b[None]))}
        total += value[name]
    return total / len(y)


@pytest.mark.parametrize("name", ["mse", "psnr", "id"])
@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_mean_over_images_for_any_batch_size(name, batch):
    y_hat, y = pairs()
    metric = build(name)
    for a, b in zip(y_hat.split(batch), y.split(batch), strict=True):
        metric.update(a, b)
    assert float(metric.compute()) == pytest.approx(expected(name, y_hat, y), rel=1e-6)


def test_psnr_agrees_with_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    y_hat, y = pairs(1)
    metric = PSNR()
    metric.update(y_hat, y)
    other = peak_signal_noise_ratio(y_hat.clamp(-1, 1), y, data_range=2.0)
    assert float(metric.compute()) == pytest.approx(float(other), rel=1e-6)


def test_psnr_of_equal_images_is_finite():
    metric = PSNR()
    metric.update(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    assert float(metric.compute()) == pytest.approx(10 * math.log10(4e10))


def test_reset_and_low_precision():
    y_hat, y = pairs()
    metric = MSE()
    metric.update(y_hat * 0 + 5, y)
    metric.reset()
    metric.update(y_hat.bfloat16(), y)
    assert metric.compute().dtype == torch.float32
    assert float(metric.compute()) == pytest.approx(expected("mse", y_hat, y), rel=1e-2)


def test_id_from_similarities():
    metric = IdSimilarity()
    metric.update(torch.tensor([0.25, 0.5]))
    metric.update(torch.tensor([1.0]))
    assert float(metric.compute()) == pytest.approx(1.75 / 3)
    with pytest.raises(UserError, match="similarity"):
        metric.update(*pairs())


def test_no_graph_is_kept():
    y_hat, y = pairs()
    metric = MSE()
    metric.update(y_hat.requires_grad_(), y)
    assert not metric.total.requires_grad


def _rank(rank: int, port: int, results) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    y_hat, y = pairs()
    rows = slice(0, 5) if rank == 0 else slice(5, 7)  # ranks with different numbers of images
    values = {}
    for name in ("mse", "psnr", "id"):
        metric = build(name)
        for a, b in zip(y_hat[rows].split(2), y[rows].split(2), strict=True):
            metric.update(a, b)
        values[name] = float(metric.compute())
    results[rank] = values
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_uneven_ranks():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")
    with context.Manager() as manager:
        results = manager.dict()
        ranks = [context.Process(target=_rank, args=(rank, port, results)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
            assert process.exitcode == 0
        for rank in range(2):
            for name, value in results[rank].items():
                assert value == pytest.approx(expected(name, *pairs()), rel=1e-6), f"{name} on rank {rank}"
