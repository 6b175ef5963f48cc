"""Latents: the generator's hash, files that round-trip, plain arrays of other tools, hostile and wrong files."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from psp_lightning.checkpoints import safetensors_io
from psp_lightning.checkpoints.safetensors_io import KEY, save_described
from psp_lightning.checkpoints.weight_files import generator_hash, save_generator, save_psp
from psp_lightning.cli.latents import run
from psp_lightning.latents.codes import Latents, to_w_plus
from psp_lightning.latents.files import gather_latents, read_latents, read_plain, save_latents, save_plain
from psp_lightning.loading import load_decoder, load_generator, load_psp
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError

HASH = "b93f1e2d1ae5f96d"  # first digits of the hash of a generator whose parameters are all 0.5


def generator(seed: int = 0, **config) -> Generator:
    config = {"output_size": 32, "style_dim": 16, "n_mapping": 2, "max_channels": 12} | config
    return Generator.seeded(seed, **config).eval()


def network(seed: int = 0) -> PSP:
    torch.manual_seed(0)
    encoder = GradualStyleEncoder(8, style_dim=16, input_size=32, blocks=(1, 1, 1, 1), width=4)
    net = generator(seed)
    return PSP(encoder, net, net.latent_average(100), source={"kind": "rgb", "size": 32}).eval()


def codes(n: int = 3, space: str = "w_plus") -> torch.Tensor:
    torch.manual_seed(n)
    return torch.randn((n, 8, 16) if space == "w_plus" else (n, 16))


def latents(n: int = 3, space: str = "w_plus", **facts) -> Latents:
    facts = {"generator": "ab" * 32, "checkpoint": "some.ckpt"} | facts
    return Latents(codes(n, space), tuple(f"a/{i}" for i in range(n)), space, **facts)


# --- the hash


def test_hash_follows_its_documented_rule() -> None:
    """The expected hash is computed again from the docstring."""
    import hashlib

    net = generator()
    facts = {"class": "Generator", "output_size": 32, "style_dim": 16, "n_mapping": 2, "image_channels": 3, "z_dim": 16}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    state = net.state_dict()
    buffers = [name for name in state if name.startswith("noises.") or name.endswith(".kernel")]
    for name in sorted(set(state) - set(buffers)):
        digest.update(json.dumps([name, list(state[name].shape)]).encode())
        values = state[name].numpy().astype("<f2")
        digest.update(np.where(values == 0, np.float16(0), values).astype("<f2").tobytes())
    assert generator_hash(net) == digest.hexdigest()
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    changed = "the hash changed, so no existing latents file would match its generator any more"
    assert generator_hash(net)[:16] == HASH, changed


def test_hash_does_not_depend_on_file_format_precision_or_spelling(tmp_path: Path) -> None:
    net = generator()
    save_generator(tmp_path / "a.safetensors", net)
    save_generator(tmp_path / "half.safetensors", net, dtype=torch.float16)
    torch.save({"g_ema": net.state_dict(), "latent_avg": torch.zeros(16)}, tmp_path / "rosinality.pt")
    without_noise = {k: v for k, v in net.state_dict().items() if not k.startswith("noises.")}
    torch.save({"g_ema": without_noise}, tmp_path / "early.pt")
    save_psp(tmp_path / "psp.safetensors", network())
    for file in sorted(tmp_path.iterdir()):
        assert generator_hash(load_generator(file)[0]) == generator_hash(net), file.name
    same = generator(channel_base=8192, channel_multiplier=4)
    assert same.config != net.config and generator_hash(same) == generator_hash(net), "its channels in another notation"
    assert generator_hash(network().generator) == generator_hash(net)


def test_hash_distinguishes_generators() -> None:
    net = generator()
    first = generator_hash(net)
    assert generator_hash(generator(1)) != first
    with torch.no_grad():
        net.to_rgb1.bias[0, 0] += 0.01
    assert generator_hash(net) != first
    with torch.no_grad():
        net.to_rgb1.bias[0, 0] -= 0.01
        net.noises.noise_0.zero_()
    assert generator_hash(net) == first, "noise must not affect the hash"


# --- the library's files


def save_npz(path: Path, given: Latents) -> None:
    """Write codes as version 0.1.0 could write them."""
    facts = {
        "space": given.space,
        "generator": {"sha256": given.generator, "checkpoint": given.checkpoint},
        "latent_avg": given.latent_avg,
    }
    arrays = {given.space: given.codes.numpy(), "names": np.array(given.names), KEY: np.array(json.dumps(facts))}
    np.savez(path, allow_pickle=False, **arrays)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("space", ["z", "w", "w_plus"])
def test_round_trip(space: str, suffix: str, tmp_path: Path) -> None:
    names = ("ü/a b", "x\ny", "a.b")
    given = Latents(codes(3, space), names, space, "ab" * 32, "toyfaces/inversion", latent_avg=False)
    (save_npz if suffix == ".npz" else save_latents)(tmp_path / f"l{suffix}", given)
    found = read_latents(tmp_path / f"l{suffix}")
    assert torch.equal(found.codes, given.codes)
    assert (found.names, found.space, found.latent_avg) == (names, space, False)
    assert (found.generator, found.checkpoint) == ("ab" * 32, "toyfaces/inversion")
    assert [path.name for path in tmp_path.iterdir()] == [f"l{suffix}"], "no other file may be left"


def test_files_are_readable_without_this_package(tmp_path: Path) -> None:
    save_latents(tmp_path / "l.safetensors", latents())
    with safe_open(tmp_path / "l.safetensors", "np") as file:
        assert file.get_tensor("w_plus").shape == (3, 8, 16)
        assert json.loads(file.get_tensor("names").tobytes()) == ["a/0", "a/1", "a/2"]


def test_npz_is_no_longer_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"l\.npz: latents are written as \.safetensors"):
        save_latents(tmp_path / "l.npz", latents())
    assert not (tmp_path / "l.npz").exists()


def test_many_names_fit(tmp_path: Path) -> None:
    names = tuple(f"a_folder_with_a_long_name_so_that_the_header_would_overflow/{i:08d}" for i in range(70_000))
    save_latents(tmp_path / "l.safetensors", Latents(torch.zeros(70_000, 1), names, "w", "ab"))
    assert read_latents(tmp_path / "l.safetensors").names == names


def test_no_partial_files_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_latents(tmp_path / "l.safetensors", latents(2))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_io, "save_file", full)
    with pytest.raises(OSError, match="l.safetensors"):
        save_latents(tmp_path / "l.safetensors", latents(3))
    assert len(read_latents(tmp_path / "l.safetensors")) == 2 and len(list(tmp_path.iterdir())) == 1


def test_gathering_rejects_another_generator(tmp_path: Path) -> None:
    for i, digest in enumerate(("ab", "ab", "cd")):
        one = Latents(codes(1), (str(i),), "w_plus", digest * 32, f"{digest}.ckpt")
        save_latents(tmp_path / f"{i}.safetensors", one)
    assert gather_latents(tmp_path / "all.safetensors", [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]) == 2
    assert read_latents(tmp_path / "all.safetensors").names == ("0", "1")
    with pytest.raises(UserError, match="ab.ckpt.*generators differ.*overwrite=true"):
        gather_latents(tmp_path / "more.safetensors", [tmp_path / f"{i}.safetensors" for i in range(3)])
    assert not (tmp_path / "more.safetensors").exists()


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../../x", "a\\b", "a//b", "./a", "x\0", "a/", "y" * 2000])
def test_names_stay_in_the_folder_of_the_outputs(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name of an output"):
        Latents(codes(1), (name,))
    text = torch.from_numpy(np.frombuffer(json.dumps([name]).encode(), np.uint8).copy())
    facts = {"space": "w_plus", "generator": {"sha256": "ab", "checkpoint": None}, "latent_avg": True}
    save_described(tmp_path / "l.safetensors", "latents", {"w_plus": codes(1), "names": text}, facts)
    with pytest.raises(UserError, match="l.safetensors"):
        read_latents(tmp_path / "l.safetensors")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Latents(codes(2), ("a", "a")), "'a' occurs twice"),
        (lambda: Latents(codes(2), ("a",)), "1 names for 2"),
        (lambda: Latents(codes(2), ("a", "b"), "w"), "not \\(2, 8, 16\\)"),
        (lambda: Latents(codes(2), ("a", "b"), "wplus"), "Did you mean 'w_plus'"),
        (lambda: Latents(codes(1) / 0, ("a",)), "not finite"),
        (lambda: latents().only("a/9"), "no code is called 'a/9'"),
        (lambda: latents().into("z"), "cannot be converted to z"),
        (lambda: latents(space="w").into("w_plus"), "needs the network"),
        (lambda: latents().into("w"), "styles of a code differ"),
        (lambda: latents(latent_avg=False).into("w_plus", load_like(generator())), "has none to add"),
    ],
)
def test_invalid_latents_are_rejected(made, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made()


def load_like(net: Generator) -> PSP:
    return PSP(nn.Identity(), net)


def damaged(path: Path) -> dict[str, bytes]:
    save_latents(path / "l.safetensors", latents())
    save_npz(path / "l.npz", latents())
    whole = {name: (path / name).read_bytes() for name in ("l.safetensors", "l.npz")}
    files = {"empty.npz": b"", "text.npz": b"hello", "empty.safetensors": b"", "text.safetensors": b"x" * 50}
    for name, data in whole.items():
        stem, suffix = name.split(".")
        for k in range(1, 8):
            files[f"cut{k}.{suffix}"] = data[: len(data) * k // 8]
    return files


def test_damaged_files_are_one_message(tmp_path: Path) -> None:
    for name, data in damaged(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            read_latents(tmp_path / name)


def test_flipped_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    save_npz(tmp_path / "l.npz", latents())
    save_latents(tmp_path / "l.safetensors", latents())
    for suffix in ("npz", "safetensors"):
        data = (tmp_path / f"l.{suffix}").read_bytes()
        for place in range(0, len(data), max(1, len(data) // 60)):
            bad = bytearray(data)
            bad[place] ^= 0x5A
            (tmp_path / f"bad.{suffix}").write_bytes(bytes(bad))
            try:
                read_latents(tmp_path / f"bad.{suffix}")
            except UserError:
                pass


def test_hostile_arrays(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    np.save(tmp_path / "pickle.npy", np.array([Attack()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "pickle.npz", w=np.array([Attack()], dtype=object))
    torch.save({"w": Attack()}, tmp_path / "pickle.pt")
    huge = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999, 18, 512), }"
    huge = b"\x93NUMPY\x01\x00" + (len(huge) + 1).to_bytes(2, "little") + huge + b"\n"
    (tmp_path / "huge.npy").write_bytes(huge + b"\0" * 100)
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("w.npy", huge)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("w.npy", "w") as file:
            for _ in range(80):
                file.write(b"\0" * (1 << 20))
    torch.save({"a": torch.zeros(3)}, tmp_path / "dict.pt")
    np.save(tmp_path / "whole.npy", np.arange(8).reshape(2, 4))
    for name in ("pickle.npy", "pickle.npz", "pickle.pt", "huge.npy", "huge.npz", "bomb.npz", "dict.pt", "whole.npy"):
        with pytest.raises(UserError, match=name):
            read_plain(tmp_path / name)
    assert not (tmp_path / "ran").exists(), "code in the file was executed"


# --- the generator that codes belong to


def test_another_generator_is_rejected_with_both_names() -> None:
    mine = Latents(codes(), ("a", "b", "c"), generator=generator_hash(generator()), checkpoint="mine.ckpt")
    assert mine.of(generator(), "again.ckpt").checkpoint == "again.ckpt"
    with pytest.raises(UserError, match="mine.ckpt.*hash.*theirs.ckpt.*hash") as caught:
        mine.of(generator(1), "theirs.ckpt")
    for net in (generator(), generator(1)):
        assert generator_hash(net)[:16] in str(caught.value)
    taken = mine.of(generator(1), "theirs.ckpt", any_generator=True)
    assert taken.generator == generator_hash(generator(1))
    with pytest.raises(UserError, match="do not fit.*w_plus \\(N, 10, 16\\)"):
        mine.of(generator(output_size=64), any_generator=True)


@torch.no_grad()
def test_spaces() -> None:
    net = network()
    z = torch.randn(3, 16)
    w = net.generator.mapping(z)
    assert torch.equal(to_w_plus(z, "z", net.generator), w[:, None].expand(-1, 8, -1))
    names = ("a", "b", "c")
    from_z = Latents(z, names, "z").into("w_plus", net)
    assert torch.allclose(from_z.codes, w[:, None].expand(-1, 8, -1)) and from_z.space == "w_plus"
    assert torch.equal(from_z.into("w").codes, from_z.codes[:, 0])
    lacking = Latents(codes(), names, "w_plus", latent_avg=False)
    assert torch.equal(lacking.into("w_plus", net).codes, codes() + net.latent_avg)
    assert lacking.into("w_plus", net).latent_avg
    assert torch.equal(lacking.lacking(net), net.latent_avg) and latents().lacking(net) is None


def test_load_decoder_accepts_a_generator_without_an_encoder(tmp_path: Path) -> None:
    save_generator(tmp_path / "g.safetensors", generator())
    net = load_decoder(tmp_path / "g.safetensors")
    with torch.no_grad():
        assert torch.equal(net.decode(codes()), generator().synthesis(codes()))
    assert isinstance(net.encoder, nn.Identity) and bool(net.latent_avg.any())
    save_psp(tmp_path / "p.safetensors", network())
    assert type(load_decoder(tmp_path / "p.safetensors").encoder) is type(load_psp(tmp_path / "p.safetensors").encoder)
    (tmp_path / "x.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="x.pt"):
        load_decoder(tmp_path / "x.pt")


# --- arrays of other tools


def test_plain_arrays(tmp_path: Path) -> None:
    """Test the shapes of InterFaceGAN, e4e, StyleCLIP and NVIDIA's projector."""
    w_plus, w = codes(3).numpy(), codes(3, "w").numpy()
    np.save(tmp_path / "wp.npy", w_plus)
    np.save(tmp_path / "w.npy", w.astype(np.float64))
    torch.save(codes(3), tmp_path / "latents.pt")
    torch.save(codes(1).half(), tmp_path / "one.pt")
    torch.save([codes(3)[i] for i in range(3)], tmp_path / "list.pt")
    np.savez(tmp_path / "projected_w.npz", w=w_plus[:1])
    for name, shape, space in (
        ("wp.npy", (3, 8, 16), "w_plus"), ("w.npy", (3, 16), "w"), ("latents.pt", (3, 8, 16), "w_plus"),
        ("one.pt", (1, 8, 16), "w_plus"), ("list.pt", (3, 8, 16), "w_plus"), ("projected_w.npz", (1, 8, 16), "w_plus"),
    ):  # fmt: skip
        found = read_plain(tmp_path / name)
        assert (tuple(found.codes.shape), found.space, found.generator) == (shape, space, None), name
        assert found.codes.dtype == torch.float32 and found.names[0] == "00000"
    np.save(tmp_path / "single.npy", w_plus[0])
    assert read_plain(tmp_path / "single.npy").space == "w"
    assert read_plain(tmp_path / "single.npy", "w_plus").codes.shape == (1, 8, 16)
    with pytest.raises(UserError, match="psp-latents in="):
        read_latents(tmp_path / "wp.npy")
    with pytest.raises(UserError, match="psp-latents in="):
        read_latents(tmp_path / "projected_w.npz")


def test_arrays_of_another_kind_are_named(tmp_path: Path) -> None:
    """NumPy takes every file that it does not know for a pickle, and an array of objects for a damaged file."""
    np.save(tmp_path / "objects.npy", np.array([{"a.png": codes(1).numpy()}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", w=np.array([{}], dtype=object))
    (tmp_path / "dumped.npy").write_bytes(pickle.dumps(codes(1).numpy()))
    (tmp_path / "dumped.npz").write_bytes(pickle.dumps(codes(1).numpy()))
    (tmp_path / "text.npy").write_bytes(b"not an array")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "a.npy", codes(1).numpy())
    np.savez(tmp_path / "b.npz", codes(1).numpy())
    (tmp_path / "a.npy").rename(tmp_path / "array.npz")
    (tmp_path / "b.npz").rename(tmp_path / "archive.npy")
    for name, message in (
        ("objects.npy", "contains pickled Python objects"), ("objects.npz", "contains pickled Python objects"),
        ("dumped.npy", "contains pickled Python objects"), ("dumped.npz", "contains pickled Python objects"),
        ("text.npy", "is not a NumPy file"), ("empty.npy", "is not a NumPy file"),
        ("array.npz", "is a .npy file: rename it to array.npy"),
        ("archive.npy", "is a .npz file: rename it to archive.npz"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            read_plain(tmp_path / name)
        assert message in str(caught.value), name


def test_codes_of_rosinalitys_projector(tmp_path: Path) -> None:
    def entry(latent: torch.Tensor) -> dict[str, object]:
        return {"img": torch.zeros(1, 3, 4, 4), "latent": latent, "noise": [torch.zeros(1, 1, 4, 4)]}

    torch.save({"a.png": entry(codes(3)[0]), "b.png": entry(codes(3)[1])}, tmp_path / "w_plus.pt")
    torch.save({"noises": [torch.zeros(1)], "a.png": entry(codes(3, "w")[0])}, tmp_path / "w.pt")
    assert torch.equal(read_plain(tmp_path / "w_plus.pt").codes, codes(3)[:2])
    assert torch.equal(read_plain(tmp_path / "w.pt").codes, codes(3, "w")[:1])


@pytest.mark.parametrize("name", ["codes.pt", "codes.npy"])
def test_one_code_of_w_plus_is_not_taken_for_several_of_w(name: str, tmp_path: Path) -> None:
    save_generator(tmp_path / "g.safetensors", generator())
    one = codes(1)[0]  # (n_styles, style_dim)
    torch.save(one, tmp_path / name) if name.endswith(".pt") else np.save(tmp_path / name, one.numpy())
    settings = [f"in={tmp_path / name}", f"out={tmp_path / 'out.safetensors'}", f"ckpt={tmp_path / 'g.safetensors'}"]
    with pytest.raises(UserError, match="8x16 numbers: one code of w_plus .* or 8 codes of w"):
        run(settings)
    for space, shape in (("w_plus", (1, 8, 16)), ("w", (8, 16))):
        run([*settings, f"space={space}", "overwrite=true"])
        assert read_latents(tmp_path / "out.safetensors").codes.shape == shape


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_save_plain(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"l{suffix}"
    save_plain(path, latents())
    found = np.load(path) if suffix == ".npy" else torch.load(path, weights_only=True).numpy()
    assert found.dtype == np.float32 and np.array_equal(found, codes().numpy())
    with pytest.raises(UserError, match="average"):
        save_plain(path, latents(latent_avg=False))
    with pytest.raises(UserError, match="set ckpt"):
        save_latents(tmp_path / "l.safetensors", read_plain(path))
