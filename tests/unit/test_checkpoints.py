"""Checkpoints: every layout loads completely, every wrong file is one clear error, and no code in a file runs."""

from __future__ import annotations

import argparse
import builtins
import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from psp_lightning.checkpoints.read import read
from psp_lightning.checkpoints.strict import load_strict
from psp_lightning.checkpoints.torch_files import read_torch
from psp_lightning.importers import published as convert
from psp_lightning.inference.frozen import freeze_psp_generator
from psp_lightning.loading import load_decoder, load_generator, load_psp
from psp_lightning.models.encoders import EncoderIntoW, EncoderIntoWPlus, GradualStyleEncoder
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.atomic import save_torch
from psp_lightning.utils.errors import UserError
from psp_lightning.zoo import locate

SMALL = dict(style_dim=32, blocks=(1, 1, 1, 1), width=8)
FOREIGN = {ours: theirs for theirs, ours in convert.ENCODER_NAMES.items()}


def network(cls=GradualStyleEncoder, in_channels=3, size=32, input_size=32):
    generator = Generator.seeded(1, output_size=size, style_dim=32, n_mapping=3, max_channels=16)
    styles = {} if cls is EncoderIntoW else {"n_styles": generator.n_styles}
    torch.manual_seed(0)
    encoder = cls(in_channels=in_channels, input_size=input_size, **styles, **SMALL)
    return PSP(encoder, generator, torch.randn(32), source={"kind": "rgb", "size": input_size}).eval()


def lightning_checkpoint(net):
    state = {f"net.{k}": v for k, v in net.state_dict().items()}
    return {"state_dict": state | {"losses.id.weight": torch.zeros(2)}, "psp": net.describe(), "global_step": 3}


def released_checkpoint(net, **opts):
    """Return a checkpoint in the layout of the released files with the given options."""
    state = {f"encoder.{k}": v for k, v in net.encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in net.generator.state_dict().items()}
    opts = {"encoder_type": FOREIGN[type(net.encoder).__name__], "start_from_latent_avg": True, **opts}
    return {"state_dict": state, "latent_avg": net.latent_avg.clone(), "opts": opts}


def save(content, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@torch.no_grad()
def assert_same(a, b):
    x = torch.randn(2, a.encoder.in_channels, a.encoder.input_size, a.encoder.input_size)
    assert torch.equal(a(x), b(x)) and torch.equal(a.latent_avg, b.latent_avg)


# --- layouts -------------------------------------------------------------------------------------------------------


def test_own_checkpoint(tmp_path):
    net = network()
    before = torch.get_rng_state()
    loaded = PSP.from_checkpoint(save(lightning_checkpoint(net), tmp_path / "a.ckpt"))
    assert torch.equal(before, torch.get_rng_state()), "loading must not change the random state"
    assert not loaded.training and loaded.describe() == net.describe()
    assert_same(freeze_psp_generator(net), loaded)


@pytest.mark.parametrize("load", [load_psp, load_generator, load_decoder])
@pytest.mark.parametrize("layout", [lightning_checkpoint, released_checkpoint])
def test_a_file_is_read_once(tmp_path, monkeypatch, load, layout):
    """It is opened once to detect its kind and once to read it."""
    path = save(layout(network()), tmp_path / "a.pt")
    opened, real = [], builtins.open

    def spy(file, *args, **kwargs):
        opened.append(file)
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy)
    load(path)
    assert [os.fspath(file) for file in opened if not isinstance(file, int)].count(os.fspath(path)) == 2, opened


def test_run_folder_loads_best_then_last(tmp_path):
    best, last = network(), network()
    last.latent_avg += 1
    save(lightning_checkpoint(last), tmp_path / "checkpoints" / "last.ckpt")
    assert_same(last, load_psp(tmp_path))
    save(lightning_checkpoint(best), tmp_path / "checkpoints" / "best.ckpt")
    assert_same(best, load_psp(str(tmp_path)))


@pytest.mark.parametrize("cls", [GradualStyleEncoder, EncoderIntoW, EncoderIntoWPlus])
@pytest.mark.parametrize("options", ["dict", "namespace", "none"])
def test_released_checkpoint(tmp_path, cls, options):
    net = network(cls, input_size=256 if cls is not GradualStyleEncoder else 64)
    content = released_checkpoint(net, output_size=32, dataset_type="ffhq_encode", learn_in_w=cls is EncoderIntoW)
    if options == "namespace":
        content["opts"] = argparse.Namespace(**content["opts"])
    if options == "none":
        del content["opts"]
    loaded = load_psp(save(content, tmp_path / "p.pt"))
    assert type(loaded.encoder) is cls and loaded.source["kind"] == "rgb"
    assert_same(net, loaded)


@pytest.mark.parametrize("shape", ["(style_dim,)", "(1, style_dim)", "(n_styles, style_dim)"])
def test_released_averages(tmp_path, shape):
    net = network()
    content = released_checkpoint(net)
    row = net.latent_avg[0].clone()
    content["latent_avg"] = {"(style_dim,)": row, "(1, style_dim)": row[None]}.get(shape, net.latent_avg)
    assert_same(net, load_psp(save(content, tmp_path / "p.pt")))


@pytest.mark.parametrize("kind", ["numbers", "rows", "tensors"])
def test_average_as_a_list(tmp_path, kind):
    net = network()
    average = net.latent_avg
    given = {"numbers": average[0].tolist(), "rows": average.tolist(), "tensors": list(average)}[kind]
    path = save({**released_checkpoint(net), "latent_avg": given}, tmp_path / "p.pt")
    assert_same(load_psp(path), net)
    _, found = load_generator(path)
    assert torch.equal(found.expand_as(average), average)
    _, found = load_generator(save({"g_ema": net.generator.state_dict(), "latent_avg": given}, tmp_path / "g.pt"))
    assert torch.equal(found.expand_as(average), average)


@pytest.mark.parametrize("place", ["g", "G_ema", "G.", "mapping"])
def test_generators_that_must_be_imported_are_recognised(tmp_path, place):
    state = network().generator.state_dict()
    content = {
        "g": {"g": state, "d": {"a": torch.zeros(1)}, "args": {}},
        "G_ema": {"G_ema": state},
        "G.": {"state_dict": {f"G.{key}": value for key, value in state.items()}},
        "mapping": {"mapping.fc0.weight": torch.zeros(1), "synthesis.b4.const": torch.zeros(1)},  # NVIDIA's names
    }[place]
    path = save(content, tmp_path / "g.pt")
    for load in (load_generator, load_psp, load_decoder):
        with pytest.raises(UserError, match="psp-weights import FILE out=generator.safetensors"):
            load(path)


def test_released_without_average(tmp_path):
    content = released_checkpoint(network())
    del content["latent_avg"]
    with pytest.raises(UserError, match="latent_avg"):
        load_psp(save(content, tmp_path / "p.pt"))
    content["opts"]["start_from_latent_avg"] = False
    assert not load_psp(save(content, tmp_path / "q.pt")).start_from_latent_avg


def test_keys_with_the_prefix_of_a_wrapper(tmp_path):
    net = network()
    content = released_checkpoint(net)
    content["state_dict"] = {f"module.{k}": v for k, v in content["state_dict"].items()}
    assert_same(net, load_psp(save(content, tmp_path / "p.pt")))


@pytest.mark.parametrize(
    "opts, channels, expected",
    [
        (dict(dataset_type="ffhq_encode"), 3, dict(kind="rgb", size=32)),
        (dict(dataset_type="ffhq_frontalize"), 3, dict(kind="rgb", size=32, task="frontalization")),
        (dict(dataset_type="celebs_sketch_to_face", input_nc=1), 1, dict(kind="sketch", size=32)),
        (
            dict(dataset_type="celebs_seg_to_face", input_nc=19, label_nc=19),
            19,
            dict(kind="labels", size=32, n_classes=19, interpolation="legacy_bilinear"),
        ),
        (
            dict(dataset_type="celebs_super_resolution", resize_factors="1,2,4"),
            3,
            dict(kind="lowres", size=32, factors=[1, 2, 4]),
        ),
        (
            dict(dataset_type="celebs_super_resolution", resize_factors=None),
            3,
            dict(kind="lowres", size=32, factors=[]),
        ),
        (dict(dataset_type="my_own"), 1, dict(kind="sketch", size=32)),
        (dict(), 3, dict(kind="rgb", size=32)),
    ],
)
def test_source_of_released_files(tmp_path, opts, channels, expected):
    content = released_checkpoint(network(in_channels=channels), **opts)
    assert load_psp(save(content, tmp_path / "p.pt")).source == expected


@pytest.mark.parametrize("depth, mode", [(50, "ir_se"), (100, "ir"), (152, "ir_se")])
def test_encoder_is_inferred_from_shapes(depth, mode):
    with torch.device("meta"):
        for cls in (GradualStyleEncoder, EncoderIntoWPlus):
            net = cls(14, in_channels=5, n_layers=depth, mode=mode)
            found = convert.infer_encoder(net.state_dict())
            assert found == {"class": cls.__name__, **net.config}


@pytest.mark.parametrize(
    "config",
    [
        dict(output_size=1024),
        dict(output_size=256, channel_multiplier=1),
        dict(output_size=64, style_dim=128, n_mapping=4, max_channels=64, z_dim=100),
        dict(output_size=128, image_channels=1),
        dict(output_size=1024, channel_multiplier=4, style_dim=64),
        dict(output_size=64, max_channels=96, channel_base=1536),
        dict(output_size=128, max_channels=100, channel_base=1000, channel_multiplier=1),
        dict(output_size=64, max_channels=20, channel_base=24, channel_multiplier=1),
    ],
)
def test_generator_is_inferred_from_shapes(config):
    with torch.device("meta"):
        net = Generator(**config)
        again = Generator(**convert.infer_generator(net.state_dict()))
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    assert shapes == {k: v.shape for k, v in again.state_dict().items()}


@pytest.mark.parametrize("size, multiplier", [(256, 1), (256, 2), (512, 1), (1024, 1), (1024, 2)])
def test_published_channels_are_recognised(size, multiplier):
    with torch.device("meta"):
        net = Generator(size, channel_multiplier=multiplier)
    assert convert.infer_generator(net.state_dict()) == net.config


def test_channels_without_a_rule_are_listed():
    channels = [64, 48, 80, 12]
    with torch.device("meta"):
        net = Generator(32, max_channels=80, channels=channels)
        assert convert.infer_generator(net.state_dict()) == net.config
    assert net.config["channels"] == channels and net.convs[2].conv.weight.shape[:2] == (80, 48)
    for wrong in ([64, 48, 80], [64, 48, 80, 0]):
        with pytest.raises(UserError, match="give 4 counts, one per resolution"):
            Generator(32, channels=wrong)


@torch.no_grad()
def test_generator_files(tmp_path):
    net = network()
    w = torch.randn(2, 8, 32)
    state = net.generator.state_dict()
    layouts = {
        "g_ema": {"g_ema": state, "latent_avg": net.latent_avg[0].clone()},
        "state": dict(state),
        "own": lightning_checkpoint(net),
        "released": released_checkpoint(net),
    }
    for name, content in layouts.items():
        generator, average = load_generator(save(content, tmp_path / f"{name}.pt"))
        assert torch.equal(generator.synthesis(w), net.decode(w)), name
        assert (average is None) == (name == "state") and not generator.training
    early = {k: v for k, v in state.items() if not k.startswith("noises.")}
    load_generator(save({"g_ema": early}, tmp_path / "early.pt"))
    with pytest.raises(UserError, match="no StyleGAN2 generator"):
        load_generator(save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "b.pt"))
    with pytest.raises(UserError, match="without an encoder"):
        load_psp(tmp_path / "g_ema.pt")


# --- wrong files ---------------------------------------------------------------------------------------------------


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("layout", ["bare", "torch", "legacy", "nested"])
def test_hostile_pickle_does_not_run(tmp_path, protocol, layout):
    witness = tmp_path / "ran"
    bomb, path = Hostile(f"touch {witness}"), tmp_path / "p.pt"
    if layout == "bare":
        path.write_bytes(pickle.dumps(bomb, protocol=protocol))
    else:
        content = bomb if layout == "torch" else {**released_checkpoint(network()), "opts": {"x": bomb}}
        zipped = layout != "legacy"
        torch.save(content, path, pickle_protocol=max(protocol, 2), _use_new_zipfile_serialization=zipped)
    for load in (load_psp, load_generator, read):
        with pytest.raises(UserError, match="p.pt") as error:
            load(path)
        assert not witness.exists(), "code from the file ran"
    if layout != "bare":
        assert "nothing in it was run" in str(error.value)
        if protocol < 4:  # torch's safe reader does not know protocol 4 and stops before the name
            assert "system" in str(error.value)


def test_nvidia_style_pickle_is_refused(tmp_path):
    class Persistent:
        def __reduce__(self):
            return exec, ("raise SystemExit(3)",)

    (tmp_path / "n.pkl").write_bytes(pickle.dumps({"G_ema": Persistent()}))
    with pytest.raises(UserError, match="n.pkl"):
        load_generator(tmp_path / "n.pkl")


def wrong_files(folder):
    good = io.BytesIO()
    torch.save(released_checkpoint(network()), good)
    data = good.getvalue()
    legacy = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(100)}}, legacy, _use_new_zipfile_serialization=False)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("readme.txt", "hello")
    return {
        "empty": (b"", "is empty"),
        "half": (data[: len(data) // 2], "truncated or damaged"),
        "without_tail": (data[:-1], "damaged"),
        "ten_bytes": (data[:10], "truncated or damaged"),
        "half_legacy": (legacy.getvalue()[:-150], "damaged"),
        "html": (b"\n<!DOCTYPE html><html><body>Quota exceeded</body></html>", "HTML page"),
        "html_bare": (b"<html><head><title>Google Drive</title>", "HTML page"),
        "random": (bytes((i * 7919 + i // 3) % 256 for i in range(5000)), "not a PyTorch checkpoint"),
        "text": (b"hello, I am a text file\n" * 50, "not a PyTorch checkpoint"),
        "zip": (archive.getvalue(), "no data.pkl"),
        "png": (b"\x89PNG\r\n\x1a\n" + bytes(200), "not a PyTorch checkpoint"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        "safetensors": ((40).to_bytes(8, "little") + b'{"a":1}' + bytes(60), "safetensors"),
        "flipped": (data[:300] + bytes(300) + data[600:], "flipped"),
    }


@pytest.mark.parametrize("name", sorted(wrong_files(None)))
def test_files_that_are_not_checkpoints(tmp_path, name):
    content, message = wrong_files(tmp_path)[name]
    path = tmp_path / f"{name}.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_psp(path)
    assert str(path) in str(error.value)


def test_every_truncation_is_an_error(tmp_path):
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.arange(50.0)}, "opts": argparse.Namespace(a=1)}, buffer)
    data, path = buffer.getvalue(), tmp_path / "p.pt"
    for end in range(0, len(data), 61):
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match="p.pt"):
            read(path)


def test_a_shared_tensor_is_not_expanded(tmp_path):
    """A list that repeats one tensor is small in the file but would be huge as stacked latent codes."""
    codes = torch.zeros(512, 512)
    assert len(read_torch(save([codes, codes], tmp_path / "p.pt"))) == 2
    with pytest.raises(UserError, match=r"p.pt was refused.*saved with torch\.save after \.clone\(\)"):
        read_torch(save([codes] * 1000, tmp_path / "p.pt"))


def nested(depth=17):
    """A list of few objects that has more values than memory."""
    node = [0.5, 0.5]
    for _ in range(depth):
        node = [node, node]
    return node


def contents():
    good = released_checkpoint(network())
    state = good["state_dict"]
    broken = dict(state)
    del broken["encoder.body.1.res_layer.1.weight"]
    wide = {**state, "encoder.latlayer1.bias": torch.zeros(7)}
    own = lightning_checkpoint(network())
    return {
        "list": ([1, 2], "contains a list"),
        "tensor": (torch.zeros(3), "contains a Tensor"),
        "nothing": ({}, "not a pSp checkpoint"),
        "another": ({"state_dict": {"layer1.0.weight": torch.zeros(2)}}, r"not a pSp checkpoint.*layer1\.0\.weight"),
        "bare_state": ({"fc.weight": torch.zeros(2)}, r"fc\.weight"),
        "only_encoder": ({"state_dict": {k: v for k, v in state.items() if k[0] == "e"}}, "not a pSp checkpoint"),
        "state_is_list": ({"state_dict": [1]}, "'state_dict' is a list"),
        "missing_key": ({**good, "state_dict": broken}, r"body\.1\.res_layer\.1\.weight"),
        "extra_key": ({**good, "state_dict": {**state, "encoder.more": torch.zeros(1)}}, "1 unexpected: encoder.more"),
        "wrong_shape": ({**good, "state_dict": wide}, r"latlayer1\.bias \(\(7,\) instead of \(64,\)\)"),
        "other_encoder": ({**good, "opts": {"encoder_type": "HyperEncoder"}}, "HyperEncoder. is not supported"),
        "restyle": ({**good, "opts": {"encoder_type": "ResNetBackboneEncoder"}}, "ReStyle checkpoint.*psp-weights"),
        "wrong_encoder": ({**good, "opts": {"encoder_type": FOREIGN["EncoderIntoW"]}}, "p.pt"),
        "opts_is_list": ({**good, "opts": [1]}, "'opts' are a list"),
        "average_is_text": ({**good, "latent_avg": "zero"}, "'latent_avg' is a str, not a tensor"),
        "average_is_list_of_text": ({**good, "latent_avg": ["zero"]}, "'latent_avg' is a list, .* list of numbers"),
        "average_is_short": ({**good, "latent_avg": [1.0]}, "p.pt"),
        "average_is_nested": ({**good, "latent_avg": nested()}, "latent_avg contains more values than any network"),
        "average_shape": ({**good, "latent_avg": torch.zeros(3, 5)}, "p.pt"),
        "factors": (
            {**good, "opts": {**good["opts"], "dataset_type": "celebs_super_resolution", "resize_factors": "a"}},
            "p.pt",
        ),
        "own_without_weights": ({**own, "state_dict": {}}, "missing"),
        "own_unknown_class": ({**own, "psp": {**own["psp"], "encoder": {"class": "os.system"}}}, "Unknown encoder"),
        "own_psp_is_text": ({**own, "psp": "x"}, "description"),
    }


@pytest.mark.parametrize("name", sorted(contents()))
def test_checkpoints_of_other_models(tmp_path, name):
    content, message = contents()[name]
    path = save(content, tmp_path / "p.pt")
    with pytest.raises(UserError, match=message) as error:
        load_psp(path)
    assert str(path) in str(error.value)


def test_paths(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_psp(tmp_path / "none.pt")
    with pytest.raises(UserError, match="folder without a checkpoint"):
        load_psp(tmp_path)


@pytest.mark.parametrize("load", [load_psp, load_generator, load_decoder])
def test_missing_public_weights_name_their_download(tmp_path, monkeypatch, load):
    monkeypatch.setenv("PSP_WEIGHTS", str(tmp_path / "weights"))
    for path in ("psp_ffhq_encode.pt", tmp_path / "psp_ffhq_encode", "~/none/psp_ffhq_encode.pt"):
        with pytest.raises(UserError, match="psp_ffhq_encode(.pt)? does not exist.*psp-weights get psp_ffhq_encode`"):
            load(path)
    with pytest.raises(UserError, match="psp-weights get stylegan2_ffhq`"):
        load("stylegan2-ffhq-config-f.pt")
    with pytest.raises(UserError, match="other.pt does not exist.$"):
        load("other.pt")
    save({}, tmp_path / "weights" / "psp_ffhq_encode.pt")
    with pytest.raises(UserError, match=f"does not exist.*{tmp_path / 'weights' / 'psp_ffhq_encode.pt'}"):
        load("psp_ffhq_encode.pt")


# --- parts ---------------------------------------------------------------------------------------------------------


def test_load_strict_reports_and_changes_nothing_on_error():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = {k: torch.ones_like(v) for k, v in before.items()}
    with pytest.raises(UserError, match="1 missing: 0.bias; 1 unexpected: 9.x; 1 of another shape: 0.weight"):
        load_strict(net, {k: v for k, v in state.items() if k != "0.bias"} | {"9.x": state["0.bias"], "0.weight": 1})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    del state["1.num_batches_tracked"]
    report = load_strict(net, state | {"fc.a": state["0.bias"]}, ["*.num_batches_tracked"], ["fc.*"], what="test net")
    assert report.missing == ("1.num_batches_tracked",) and report.unexpected == ("fc.a",)
    assert "test net: 6 tensors loaded" in str(report) and net[0].weight.mean() == 1


def test_save_torch(tmp_path):
    path = tmp_path / "new" / "a.ckpt"
    save_torch({"a": torch.ones(2)}, path)
    assert read(path)["a"].sum() == 2
    with pytest.raises(Exception, match="(?i)pickle|local"):
        save_torch({"a": lambda: 0}, path)
    assert read(path)["a"].sum() == 2 and [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


def test_pretrained_find(tmp_path, monkeypatch):
    monkeypatch.setenv("PSP_WEIGHTS", str(tmp_path / "w"))
    for name, record in locate.RECORDS.items():
        with pytest.raises(UserError) as error:
            locate.find(name)
        message = str(error.value)
        for part in (record.filename, str(tmp_path / "w"), "curl -L -o" if "drive" not in record.url else "gdown"):
            assert part in message, name
    (tmp_path / "w").mkdir()
    file = tmp_path / "w" / "model_ir_se50.pth"
    file.write_bytes(b"x")
    assert locate.find("ir_se50") == file and locate.find("alexnet", file) == file
    with pytest.raises(UserError, match="Did you mean 'ir_se50'"):
        locate.find("irse50")
    with pytest.raises(UserError, match="missing.pth does not exist"):
        locate.find("ir_se50", tmp_path / "missing.pth")


def test_pretrained_verify(tmp_path, monkeypatch):
    file = tmp_path / "a.pth"
    file.write_bytes(b"weights")
    with pytest.raises(UserError, match="not the published file"):
        locate.verify("alexnet", file)
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    entry = locate.Record("a", "a.pth", "https://example.org/a.pth", "none", "tests", digest)
    monkeypatch.setitem(locate.RECORDS, "a", entry)
    locate.verify("a", file)


def test_default_weights_folder(monkeypatch):
    monkeypatch.delenv("PSP_WEIGHTS", raising=False)
    assert locate.weights_dir().name == "psp_lightning" and locate.weights_dir().parent != Path.home()
