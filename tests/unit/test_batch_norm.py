"""BatchNorm over several machines: whose statistics a layer sees, and which running statistics are averaged."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from omegaconf import OmegaConf
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from psp_lightning.build.trainer import build_trainer
from psp_lightning.build.training import _batch_norm
from psp_lightning.cli.resume import refuse_changes
from psp_lightning.lit.callbacks import AverageBatchNorm
from psp_lightning.lit.distributed import MachineBatchNorm
from psp_lightning.utils.errors import UserError
from tests.config.test_catalogue import composed


def _rank(rank: int, folder: Path) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), 4)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=4)
    result: dict[str, Any] = {}
    for name, plugin in (("sync", TorchSyncBatchNorm()), ("machine", MachineBatchNorm(2))):
        encoder = plugin.apply(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)))
        layer: Any = encoder[1]
        assert isinstance(layer, nn.SyncBatchNorm)
        ranks = torch.distributed.get_process_group_ranks(layer.process_group)
        layer.running_mean.fill_(rank // 2)
        module = SimpleNamespace(net=SimpleNamespace(encoder=encoder))
        AverageBatchNorm().on_train_batch_end(SimpleNamespace(), module)  # type: ignore[arg-type]
        result[name] = (ranks, layer.running_mean.tolist())
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_machines_of_two_devices(tmp_path: Path) -> None:
    mp.spawn(_rank, (tmp_path,), nprocs=4)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    assert [result["machine"][0] for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [result["sync"][0] for result in results] == [[0, 1, 2, 3]] * 4
    assert [result["machine"][1] for result in results] == [[0.5, 0.5]] * 4, "the machines are not averaged"
    assert [result["sync"][1][0] for result in results] == [0, 0, 1, 1], "equal statistics need no exchange"


@pytest.mark.parametrize(
    ("policy", "nodes", "plugins"),
    [
        ("sync", 2, [TorchSyncBatchNorm]), ("machine", 2, [MachineBatchNorm]), ("machine", 1, [TorchSyncBatchNorm]),
        ("frozen", 2, []), ("local", 2, []),
    ],
)  # fmt: skip
def test_the_setting_chooses_the_plugin(
    policy: str, nodes: int, plugins: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("psp_lightning.build.training.count_devices", lambda *_: 4)
    trainer = {"accelerator": "cuda", "devices": 4, "num_nodes": nodes}
    made = _batch_norm(OmegaConf.create({"trainer": trainer, "model": {"batch_norm": policy}}))
    assert [type(plugin) for plugin in made] == plugins
    assert not made or not isinstance(made[0], MachineBatchNorm) or made[0].devices == 4


def test_the_trainer_gets_the_plugin(tmp_path: Path) -> None:
    cfg = composed("trainer=ddp_cpu", "logger=none", f"paths.output_dir={tmp_path}", "callbacks.images=null")
    cfg.callbacks = {}
    plugin = MachineBatchNorm(2)
    trainer = build_trainer(cfg, [], DDPStrategy(), None, [plugin])
    assert trainer.strategy._layer_sync is plugin  # type: ignore[attr-defined]


@pytest.mark.parametrize(("policy", "changed"), [("machine", True), ("sync", False)])
def test_a_resume_with_other_devices(policy: str, changed: bool, tmp_path: Path) -> None:
    """With `machine`, a layer would see the statistics of another number of images."""
    before = {"model": {"batch_norm": policy}, "trainer": {"devices": 4}, "callbacks": {"last": {"_target_": "x"}}}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(before))
    now = OmegaConf.merge(before, {"trainer": {"devices": 8}, "resume": str(tmp_path)})
    refused = pytest.raises(UserError, match="resume= cannot change trainer.devices: 4 -> 8")
    with refused if changed else contextlib.nullcontext():
        assert refuse_changes(tmp_path, now) == ["trainer.devices: 4 -> 8"]  # type: ignore[arg-type]


def test_the_cpu_has_no_plugin() -> None:
    trainer = {"accelerator": "cpu", "devices": 2, "num_nodes": 2}
    assert _batch_norm(OmegaConf.create({"trainer": trainer, "model": {"batch_norm": "sync"}})) == []
