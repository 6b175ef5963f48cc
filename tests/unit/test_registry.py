"""Descriptions of networks: recorded arguments, interfaces, registries, names in older files; the public names."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, runtime_checkable

import pytest
import torch
from torch import nn
from torchmetrics import Metric

import psp_lightning
from psp_lightning.checkpoints.safetensors_io import read_described, save_described
from psp_lightning.checkpoints.weight_files import save_embedding
from psp_lightning.loading import load_embedding
from psp_lightning.metrics import METRICS, register_metric
from psp_lightning.models import encoders, registry
from psp_lightning.models.discriminator import Discriminator
from psp_lightning.models.embedding import ToyFaceEmbedding
from psp_lightning.models.protocols import Embedding, Encoder, Generator
from psp_lightning.models.psp import PSP
from psp_lightning.models.refiner import FeatureRefiner
from psp_lightning.models.registry import check_registered, record_config
from psp_lightning.models.stylegan2 import Generator as StyleGAN2
from psp_lightning.utils import compat
from psp_lightning.utils.errors import UserError
from psp_lightning.zoo.locate import find, shipped

DEFAULTS = {
    "style_dim": 512, "in_channels": 3, "input_size": 256, "n_layers": 50, "mode": "ir_se", "blocks": None, "width": 64,
}  # fmt: skip
CHANGED = {
    "style_dim": 16, "in_channels": 1, "input_size": 64, "n_layers": 100, "mode": "ir", "blocks": (1, 1, 2, 1),
    "width": 4,
}  # fmt: skip
OWN = {
    "GradualStyleEncoder": {"n_styles": 6},
    "Encoder4Editing": {"n_styles": 6},
    "EncoderIntoW": {},
    "EncoderIntoWPlus": {"n_styles": 6},
    "ReStyleEncoder": {"n_styles": 6, "iterations": 5},
    "ReStyleEncoder4Editing": {"n_styles": 6, "iterations": 5},
}


@pytest.mark.parametrize("name", OWN)
def test_configs_of_encoders_are_those_of_version_0_1_0(name):
    """Values and order are those that version 0.1.0 wrote into its checkpoints."""
    cls, own = getattr(encoders, name), OWN[name]
    given = {key: value for key, value in own.items() if key == "n_styles"}
    with torch.device("meta"):
        plain, changed = cls(**given), cls(**given, **CHANGED)
        again = cls(**changed.config)
    assert list(plain.config.items()) == list({**own, **DEFAULTS}.items())
    expected = {**own, **CHANGED, "blocks": [1, 1, 2, 1]}
    assert list(changed.config.items()) == list(expected.items()) and again.config == expected
    json.dumps(expected)


def test_configs_of_the_other_networks_are_those_of_version_0_1_0():
    generator = {
        "output_size": 16, "style_dim": 8, "n_mapping": 2, "channel_multiplier": 2, "max_channels": 6,
        "image_channels": 3, "z_dim": 8, "channel_base": 16384,
    }  # fmt: skip
    small = {"style_dim": 8, "n_mapping": 2, "max_channels": 6}
    assert list(StyleGAN2(16, **small).config.items()) == list(generator.items()), "z_dim is known, channels are not"
    found = StyleGAN2(16, **small, z_dim=5, channels=(6, 5, 4)).config
    assert list(found.items()) == list({**generator, "z_dim": 5, "channels": [6, 5, 4]}.items())
    discriminator = {"input_size": 16, "channel_base": 32, "max_channels": 512, "image_channels": 3, "group": 4}
    assert list(Discriminator(16, channel_base=32).config.items()) == list(discriminator.items())
    embedding = {"input_size": 64, "widths": [32, 64, 96, 128], "dim": 64}
    assert list(ToyFaceEmbedding().config.items()) == list(embedding.items())


def test_all_encoders_have_a_config_above():
    assert set(OWN) == {name for name, cls in registry.ENCODERS.items() if cls.__module__.startswith("psp_lightning.")}


def test_record_config():
    class Base(nn.Module):
        @record_config
        def __init__(self, width: int, sides: tuple[int, ...] = (1, 2), *, name: str = "x") -> None:
            super().__init__()

    class Derived(Base):
        @record_config
        def __init__(self, depth: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    class Narrow(Base):
        @record_config
        def __init__(self, depth: int = 7, size: int | None = None) -> None:
            super().__init__(2 * depth)
            if size is None:
                self.config["size"] = 3 * self.config["depth"]

    assert Base(3).config == {"width": 3, "sides": [1, 2], "name": "x"}
    expected = [("depth", 4), ("width", 3), ("sides", [1, 2]), ("name", "y")]
    assert list(Derived(4, 3, name="y").config.items()) == expected
    for net in (Narrow(), Narrow(**Narrow().config)):
        assert net.config == {"depth": 7, "size": 21}, "only its own arguments, as the constructor resolved them"
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        Derived(4, 3, widht=3)
    with pytest.raises(TypeError, match="missing a required argument: 'width'"):
        Derived(4)


@pytest.mark.parametrize("name", OWN)
def test_encoders_implement_their_interface(name):
    styles = {"n_styles": 6} if OWN[name] else {}
    with torch.device("meta"):
        net = getattr(encoders, name)(**styles, **CHANGED)
    assert isinstance(net, runtime_checkable(Encoder))
    assert (net.iterations > 0) == name.startswith("ReStyle")
    assert not isinstance(nn.Identity(), Encoder)


def test_other_networks_implement_their_interfaces():
    assert isinstance(StyleGAN2(8, style_dim=4, n_mapping=1, max_channels=4), runtime_checkable(Generator))
    assert isinstance(ToyFaceEmbedding(4, (2, 2), 2), runtime_checkable(Embedding))
    assert not isinstance(nn.Linear(2, 2), Generator) and not isinstance(nn.Linear(2, 2), Embedding)


def own_encoder(**more: int) -> nn.Module:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    net.config, net.in_channels, net.input_size = {}, 3, 8
    for name, value in more.items():
        setattr(net, name, value)
    return net


def test_passes_of_an_encoder():
    generator = StyleGAN2(8, style_dim=4, n_mapping=1, max_channels=4)
    own = own_encoder()
    given = set(vars(own))
    once = PSP(own, generator)
    assert once.passes == 0 and once.encode(torch.rand(2, 3, 8, 8)).shape == (2, 4, 4)
    assert set(vars(own)) == given, "the user's module is not changed"
    once.encoder = own_encoder()
    assert once.passes == 0, "an encoder may be replaced"
    assert once.for_inference().passes == 0
    net = PSP(encoders.ReStyleEncoder(4, 4, input_size=32, blocks=(1, 1, 1, 1), width=4, iterations=2), generator)
    assert net.passes == 2 and net.for_inference().passes == 2
    net.encoder.iterations = 3
    assert net.passes == 3


def test_a_name_belongs_to_one_class(monkeypatch):
    def define(module: str, qualname: str = "Mine") -> type[nn.Module]:
        return type("Mine", (nn.Module,), {"__module__": module, "__qualname__": qualname})

    for table in ("ENCODERS", "GENERATORS", "EMBEDDINGS"):
        kind = table[:-1].lower()
        known: dict[str, Any] = getattr(registry, table)
        monkeypatch.delitem(known, "Mine", raising=False)
        add = getattr(registry, f"register_{kind}")
        first, reloaded, imported = define("__main__"), define("__main__"), define("mine")
        for cls in (first, reloaded, imported):
            assert add(cls) is cls and known["Mine"] is cls, "a reloaded module, or a script that is also imported"
        for other in (define("yours"), define("mine", "Outer.Mine")):
            with pytest.raises(UserError, match="'Mine' is registered already, by mine.Mine"):
                add(other)
        assert known.pop("Mine") is imported


def test_metrics_have_a_registry(monkeypatch):
    monkeypatch.setattr("psp_lightning.metrics.registry.METRICS", METRICS)
    before = dict(METRICS)

    class Mine(Metric):
        pass

    class Other(Metric):
        pass

    try:
        assert register_metric("mine")(Mine) is Mine and METRICS["mine"] is Mine
        with pytest.raises(UserError, match="'mine' is registered already"):
            register_metric("mine")(Other)
    finally:
        METRICS.clear()
        METRICS.update(before)


def test_an_embedding_of_version_0_1_0_has_another_class_name(tmp_path):
    torch.manual_seed(0)
    net, old, new = ToyFaceEmbedding(8, (2, 3), 4).eval(), tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    node = {"class": "FaceEmbedding", "input_size": 8, "widths": [2, 3], "dim": 4}
    save_described(old, "embedding", net.state_dict(), {"embedding": node})
    again, x = load_embedding(old), torch.rand(2, 3, 8, 8)
    assert type(again) is ToyFaceEmbedding and torch.equal(again(x), net(x))
    save_embedding(new, again)
    assert read_described(new)[0]["embedding"] == {**node, "class": "ToyFaceEmbedding"}


def test_old_names_refer_to_classes_and_do_not_hide_new_ones(monkeypatch):
    known = {name for table in registry.TABLES.values() for name in table}
    assert set(compat.CLASSES.values()) <= known and not set(compat.CLASSES) & known
    mine = type("FaceEmbedding", (nn.Identity,), {"__module__": "mine"})
    monkeypatch.setitem(registry.EMBEDDINGS, "FaceEmbedding", mine)
    assert type(registry.build_described("embedding", {"class": "FaceEmbedding"})) is mine


@pytest.mark.parametrize("name", [entry.name for entry in shipped().values()])
def test_shipped_networks_give_their_stored_descriptions(name):
    """The files are of version 0.1.0, whose descriptions may leave out default values."""
    description, _ = read_described(find(name))
    kind = description["kind"]
    if kind == "psp":
        expected, found = description["psp"], PSP.from_pretrained(name).describe()
        expected.pop("generator"), found.pop("generator")  # the file refers to another file
    else:
        expected = description[kind]
        net = registry.build_described(kind, expected)
        found = {"class": type(net).__name__, **net.config}
        expected = {**expected, "class": compat.CLASSES.get(expected["class"], expected["class"])}
    assert found == expected


def test_public_names():
    code = (
        "import sys, psp_lightning\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'importing the package must be quick'\n"
        "assert set(psp_lightning.__all__) <= set(dir(psp_lightning))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in psp_lightning.__all__:
        assert getattr(psp_lightning, name) is not None
    expected = {"PSP", "InputSpec", "Latents", "ToyFaces", "__version__"}
    expected |= {f"register_{kind}" for kind in ("encoder", "generator", "loss", "metric")}
    assert expected <= set(psp_lightning.__all__)
    assert psp_lightning.PSP is PSP and psp_lightning.register_metric is register_metric
    with pytest.raises(AttributeError, match="no attribute 'PSPP'"):
        psp_lightning.PSPP  # noqa: B018


def test_a_derived_generator_has_its_own_arguments():
    class Own(StyleGAN2):
        @record_config
        def __init__(self, output_size: int, mode: str = "a", dropout: float = 0.0, **kwargs: Any) -> None:
            super().__init__(output_size, **kwargs)

    net = Own(8, max_channels=4, style_dim=4)
    assert net.config["mode"] == "a" and net.config["dropout"] == 0.0
    assert Own(**net.config).config == net.config
    with pytest.raises(UserError, match="max_channels=0"):
        Own(8, max_channels=0)


class Linear(nn.Module):
    def __init__(self, width: int = 4, activation: object = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Recorded(Linear):
    @record_config
    def __init__(self, width: int = 4, activation: object = None) -> None:
        super().__init__(width, activation)


def test_an_encoder_whose_checkpoints_could_not_be_loaded(monkeypatch):
    with pytest.raises(UserError, match="encoder Recorded is not registered: decorate the class with register_encoder"):
        check_registered("encoder", Recorded())
    for cls in (Linear, Recorded):
        monkeypatch.setitem(registry.ENCODERS, cls.__name__, cls)
    check_registered("encoder", Recorded())
    with pytest.raises(UserError, match="encoder Linear has no config.*decorate its __init__ with record_config"):
        check_registered("encoder", Linear())
    with pytest.raises(UserError, match="encoder Recorded has activation=<built-in .*relu.*checkpoint cannot contain"):
        check_registered("encoder", Recorded(activation=torch.relu))
    monkeypatch.setitem(registry.ENCODERS, "Recorded", Linear)
    with pytest.raises(UserError, match=r"not registered \(another class has this name: .*test_registry\.Recorded\)"):
        check_registered("encoder", Recorded())


def test_a_refiner_whose_checkpoints_could_not_be_loaded():
    class Mine(FeatureRefiner):
        pass

    with pytest.raises(UserError, match="refiner Mine is not registered: decorate the class with register_refiner"):
        check_registered("refiner", Mine(4, 4, 4))


def test_codes_of_a_wrong_shape():
    generator = StyleGAN2(8, style_dim=4, n_mapping=1, max_channels=4)  # 4 styles
    source = torch.rand(2, 3, 8, 8)
    assert PSP(Linear(4), generator).encode_delta(source).shape == (2, 4, 4)
    with pytest.raises(UserError, match=r"Linear returned codes of shape \(2, 16\): expected \(B, 4, 4\), or \(B, 4\)"):
        PSP(Linear(16), generator).encode_delta(source)


def test_a_missing_argument_names_the_class():
    class TinyOwn(nn.Module):
        @record_config
        def __init__(self, width: int) -> None:
            super().__init__()

    with pytest.raises(TypeError, match="^TinyOwn: missing a required argument: 'width'"):
        TinyOwn()
