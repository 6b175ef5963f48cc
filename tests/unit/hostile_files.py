"""Malformed and hostile files by name. `python hostile_files.py FOLDER` reads each of them and reports as JSON."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import pickle
import re
import struct
import sys
import time
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save as save_safetensors

from psp_lightning.models.stylegan2 import Generator

HERE = Path(__file__).parent
GIB = 1 << 30
MEMORY = 500 << 20  # bytes that rejecting a file may take in addition to PyTorch
SECONDS = 8.0

# functions that a pickle may ask to call, with an argument that would leave a trace
CALLS = {
    "os.system": "touch {canary}",
    "posix.system": "touch {canary}",
    "nt.system": "touch {canary}",
    "os.popen": "touch {canary}",
    "subprocess.Popen": ["touch", "{canary}"],
    "subprocess.check_output": ["touch", "{canary}"],
    "builtins.eval": "open('{canary}', 'w')",
    "builtins.exec": "open('{canary}', 'w')",
    "__builtin__.eval": "open('{canary}', 'w')",
    "builtins.compile": "open('{canary}', 'w')",
    "builtins.__import__": "os",
    "builtins.getattr": "os",
    "builtins.open": "{canary}",
    "importlib.import_module": "os",
    "runpy.run_path": "{canary}",
    "pathlib.Path.touch": "{canary}",
    "shutil.rmtree": "{canary}",
    "pickle.loads": b"cos\nsystem\n(S'touch {canary}'\ntR.",
    "marshal.loads": b"{canary}",
    "torch.load": "{canary}",
    "torch.hub.load": "{canary}",
    "numpy.load": "{canary}",
    "ctypes.CDLL": "{canary}",
    "webbrowser.open": "{canary}",
    "functools.partial": "{canary}",
    "operator.methodcaller": "system",
}


def _nvidia():
    spec = importlib.util.spec_from_file_location("nvidia_pickles", HERE / "nvidia_pickles.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _constant(value) -> bytes:
    """Return protocol-2 instructions that push a str, bytes or list of str."""
    if isinstance(value, list):
        return b"](" + b"".join(_constant(item) for item in value) + b"e"
    data = value if isinstance(value, bytes) else value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _call(name: str, canary: Path) -> bytes:
    module, _, attribute = name.rpartition(".")
    argument = CALLS[name]
    if isinstance(argument, list):
        argument = [part.format(canary=canary) for part in argument]
    elif isinstance(argument, bytes):
        argument = argument.replace(b"{canary}", str(canary).encode())
    else:
        argument = argument.format(canary=canary)
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n" + _constant(argument) + b"\x85R"


def _archive(program: bytes, records: dict[str, bytes] | None = None, packed: bool = False) -> bytes:
    """Wrap a pickle in a zip archive like torch.save's."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for name, data in (records or {}).items():
            archive.writestr(f"archive/{name}", data)
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def _legacy(program: bytes, keys: bytes = b"\x80\x02].") -> bytes:
    """Wrap a pickle, and one for the keys of its storages, in the format that torch.save used before zip archives."""
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({"little_endian": True}, 2)]
    return b"".join([*parts, program, keys])


def _nested(nvidia, program: bytes) -> bytes:
    """Return an NVIDIA pickle with a call inside a network's attributes."""
    marker = "MARKER-OF-THE-CALL"
    network = nvidia.Persistent("Generator", extra=marker)
    with nvidia.stand_ins():
        data = pickle.dumps({"G_ema": network}, protocol=2)
    pushed = b"X" + struct.pack("<I", len(marker)) + marker.encode()
    assert pushed in data
    return data.replace(pushed, program)


def _whole(n: int) -> bytes:
    data = n.to_bytes((n.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _storage(dtype: str, numel: int, key: str = "0") -> bytes:
    """Return instructions for a storage outside the pickle."""
    pid = _constant("storage") + f"ctorch\n{dtype}\n".encode() + _constant(key) + _constant("cpu") + _whole(numel)
    return b"(" + pid + b"tQ"


def _overlapping(parts: int = 64, size: int = 16 << 20) -> bytes:
    """Return an archive in which many storages are the same bytes of the file."""
    out = io.BytesIO()
    program = b"\x80\x02](" + b"".join(_storage("ByteStorage", size, str(i)) for i in range(parts)) + b"e."
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", bytes(size))
        for i in range(1, parts):
            entry = copy.copy(archive.getinfo("archive/data/0"))
            entry.filename = f"archive/data/{i}"
            archive.filelist.append(entry)
    return out.getvalue()


def _tensor(dtype: str, numel: int, size: tuple, stride: tuple) -> bytes:
    """Return instructions for a tensor that views storage "0"."""

    def numbers(values: tuple) -> bytes:
        return b"(" + b"".join(_whole(v) for v in values) + b"t"

    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + _storage(dtype, numel) + _whole(0) + numbers(size) + numbers(stride)
    )
    return tensor + b"\x89ccollections\nOrderedDict\n)RtR"


def _storage_program(dtype: str, numel: int, size: tuple, stride: tuple) -> bytes:
    """Return a pickle of {"g_ema": {"input.input": tensor}}."""
    tensor = _tensor(dtype, numel, size, stride)
    return b"\x80\x02}" + _constant("g_ema") + b"}" + _constant("input.input") + tensor + b"ss."


def _doubled(value: bytes, pair: bytes, times: int = 60) -> bytes:
    """Return a few instructions for a value that nests the previous one twice, and so on: traversing it never ends."""
    return value + b"".join(b"q%c" % i + pair.replace(b"?", b"h%c" % i) for i in range(times))


def endless(times: int = 60) -> list:
    """Return such a value as a list, for torch.save and pickle."""
    value: list = [1]
    for _ in range(times):
        value = [value, value]
    return value


def again(program: bytes, use: bytes, times: int = 100_000) -> bytes:
    """Return a pickle that creates its values 0 and 1 once and uses them very often."""
    return b"\x80\x02" + program + (use + b"0") * times + b"N."


def _inside(names: tuple[str, ...]) -> bytes:
    """Return an NVIDIA pickle with a module that contains itself, which no pickler writes."""
    items = {"type": _constant("class"), "class_name": _constant("Generator")}
    items["state"] = b"}" + _constant("_modules") + b"h\x00s"
    meta = b"}" + b"".join(_constant(name) + value + b"s" for name, value in items.items())
    network = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n" + meta + b"\x85Rq\x01"
    itself = b"h\x00" + b"".join(_constant(name) + b"h\x01s" for name in names)
    return b"\x80\x02}q\x00" + network + itself + b"h\x01."


def _streams(levels: int = 40, size: int = 16 << 20) -> bytes:
    """Return nested torch.save streams around many bytes, which each level would copy."""
    data = bytes(size)
    for _ in range(levels):
        held = b"B" + struct.pack("<I", len(data)) + data
        data = _legacy(b"\x80\x03ctorch.storage\n_load_from_bytes\n" + held + b"\x85R.")
    return b"\x80\x03ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(data)) + data + b"\x85R."


def altered() -> dict[str, bytes]:
    """Return valid checkpoints, each with a property that the reader does not support and would misread."""
    files = good()
    old = files["legacy.pt"]
    zipped = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(files["zip.pt"])) as source, zipfile.ZipFile(zipped, "w") as archive:
        for entry in source.infolist():
            data = b"big" if entry.filename.endswith("byteorder") else source.read(entry)
            archive.writestr(entry.filename, data)
    keys = old.rindex(b"\x80\x02]q\x00(")
    changed = {
        "big-endian, zip": zipped.getvalue(),
        "big-endian, legacy": old.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        "parts of storages": re.sub(rb"N(tq.)Q", b"\x88\\1Q", old, flags=re.DOTALL),
        "tensors without values": old[:keys] + pickle.dumps([], 2) + old[keys:],
    }
    assert not {old, files["zip.pt"]} & set(changed.values())
    return {f"{name}.pt": data for name, data in changed.items()}


def shared() -> dict[str, bytes]:
    """Return small files that expand to huge content, because they use one part very many times."""
    nvidia = _nvidia()
    net = Generator.seeded(0, output_size=8, style_dim=8, n_mapping=1, max_channels=4)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    one, large = torch.ones(1), torch.ones(1000, 1000)
    wide = Generator.seeded(0, output_size=8, style_dim=512, n_mapping=1, max_channels=4).state_dict()
    weights, biases = [f"style.{i}.weight" for i in range(1, 2000)], [f"style.{i}.bias" for i in range(1, 2000)]
    wide |= dict.fromkeys(weights, torch.ones(512, 512)) | dict.fromkeys(biases, torch.ones(512))
    released = {f"decoder.{k}": v for k, v in state.items()} | {"encoder.input_layer.0.weight": torch.ones(1, 3, 3, 3)}
    checkpoints = {
        "endless option": {"state_dict": released, "latent_avg": one, "opts": {"dataset_type": endless()}},
        "endless description": {"state_dict": {"net.a": one}, "psp": {"format": endless()}},
        "endless average": {"g_ema": state, "latent_avg": endless()},
        "a name of dots": {"synthesis.b4" + "." * (1 << 20): one},
        "a tensor under many names": {"g_ema": wide},
        "stretched weights": {"g_ema": wide | {name: torch.ones(1).expand(512, 512) for name in weights}},
        "very many generators": {f"{i}.input.input": one for i in range(100_000)},
        "very many widths": {
            "state_dict": released
            | {f"encoder.body.{i}.res_layer.3.weight": torch.ones(i, 0) for i in range(20_000)}
            | {"encoder.styles.0.linear.weight": one, "encoder.latlayer1.weight": one},
        },
    }
    files = {}
    for name, content in checkpoints.items():
        out = io.BytesIO()
        torch.save(content, out)
        files[f"{name}.pt"] = out.getvalue()

    def network(sides: int, **attributes):
        tensors = nvidia.from_published(state, None)
        for i in range(2, sides):  # more blocks, with single numbers and without noise
            block = {k.replace("b8", f"b{4 << i}"): v for k, v in tensors.items() if ".b8." in k and "noise" not in k}
            tensors |= block
        root = nvidia.network(tensors)
        root.state["_modules"]["mapping"].state["_modules"]["fc0"].state |= attributes
        return root

    modules = network(2)
    leaf, middle = nvidia.Persistent("Leaf"), nvidia.Persistent("Middle")
    leaf.state["_parameters"] = {f"p{i}": one for i in range(100_000)}
    middle.state["_modules"] = {str(i): leaf for i in range(90)}
    modules.state["_modules"]["more"] = nvidia.Persistent("More")
    modules.state["_modules"]["more"].state["_modules"] = {str(i): middle for i in range(90)}
    named = network(2)
    leaf, middle = nvidia.Persistent("Leaf"), nvidia.Persistent("Middle")
    leaf.state["_parameters"] = {"p" * (1 << 20): one}
    middle.state["_modules"] = {str(i): leaf for i in range(90)}
    named.state["_modules"] |= {f"more{i}": middle for i in range(90)}
    clamped = network(2)
    layer = clamped.state["_modules"]["synthesis"].state["_modules"]["b8"].state["_modules"]["conv0"]
    clamp: tuple = (1,)
    for _ in range(60):
        clamp = (clamp, clamp)
    layer.state["conv_clamp"] = clamp
    same = network(2)
    layer = nvidia.Persistent("Layer")
    layer.state["_parameters"] = {"weight": large, "bias": torch.ones(1000)}
    same.state["_modules"]["mapping"].state["_modules"] = {f"fc{i}": layer for i in range(2000)}
    networks = {
        "endless activation": network(2, activation=endless()),
        "endless gain": network(2, weight_gain=endless()),
        "very large blocks": network(16),
        "endless clamp": clamped,
        "shared parameters": modules,
        "a long name again and again": named,
        "a layer again and again": same,
    }
    with nvidia.stand_ins():
        files |= {f"{name}.pkl": pickle.dumps({"G_ema": root}, 4) for name, root in networks.items()}
    return files | {"a module in itself.pkl": _inside(("a",)), "a module under two names.pkl": _inside(("", "."))}


def good() -> dict[str, bytes]:
    """Return small valid files of every kind."""
    nvidia = _nvidia()
    net = Generator.seeded(0, output_size=8, style_dim=8, n_mapping=1, max_channels=4)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with nvidia.stand_ins():
        pkl = pickle.dumps(nvidia.snapshot(nvidia.network(nvidia.from_published(state, torch.zeros(8)))), 4)
    content = {"g_ema": state, "latent_avg": torch.zeros(8)}
    new, old = io.BytesIO(), io.BytesIO()
    torch.save(content, new)
    torch.save(content, old, _use_new_zipfile_serialization=False)
    description = {"kind": "generator", "format": 1, "generator": {"class": "Generator", **net.config}}
    ours = save_safetensors(state, metadata={"psp_lightning": json.dumps(description)})
    return {"nvidia.pkl": pkl, "zip.pt": new.getvalue(), "legacy.pt": old.getvalue(), "ours.safetensors": ours}


def not_finite(value: float) -> dict[str, bytes]:
    """Return files that are valid except for one number, which is not finite."""
    nvidia = _nvidia()
    net = Generator.seeded(0, output_size=8, style_dim=8, n_mapping=1, max_channels=4)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    state["convs.0.conv.weight"][0, 0, 0, 0, 0] = value
    with nvidia.stand_ins():
        pkl = pickle.dumps(nvidia.network(nvidia.from_published(state, None)), 4)
    files = {"nvidia.pkl": pkl}
    for name, zipped in (("zip.pt", True), ("legacy.pt", False)):
        out = io.BytesIO()
        torch.save({"g_ema": state}, out, _use_new_zipfile_serialization=zipped)
        files[name] = out.getvalue()
    description = {"kind": "generator", "format": 1, "generator": {"class": "Generator", **net.config}}
    files["ours.safetensors"] = save_safetensors(state, metadata={"psp_lightning": json.dumps(description)})
    files["foreign.safetensors"] = save_safetensors(state)
    return files


def bombs() -> dict[str, bytes]:
    """Return files that demand very much memory or time."""
    big = struct.pack("<Q", 1 << 40)
    deep = b"\x80\x02})" + b"\x85" * 400_000 + b"K\x01s."
    bytearray_call = b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R."  # of 8 GiB
    zeros = bytes(64 << 20)
    programs = {
        "bytearray": bytearray_call,
        "deep tuple as a key": deep,
        "deep lists": b"\x80\x02" + b"](" * 200_000 + b"e" * 200_000 + b".",
        "many instructions": b"\x80\x02" + b"N0" * 8_000_000 + b"N.",
        "huge memo index": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "huge bytes": b"\x80\x04\x8e" + big + b"abc.",
        "huge text": b"\x80\x04\x8d" + big + b"abc.",
        "huge frame": b"\x80\x04\x95" + big + b"N.",
        "huge bytearray": b"\x80\x05\x96" + big + b"abc.",
        "huge integer": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"abc.",
        "long decimal": b"\x80\x02I" + b"9" * 2_000_000 + b"\n.",
        "stretched tensor": _storage_program("FloatStorage", 1, (1, 1 << 20, 1 << 20), (0, 0, 0)),
        "huge storage": _storage_program("FloatStorage", 1 << 38, (1 << 38,), (1,)),
        "huge shape": _storage_program("FloatStorage", 1, (1 << 31, 1 << 31), (1 << 31, 1)),
        "negative shape": _storage_program("FloatStorage", 1, (-1, 4), (1, 1)),
        "tensor of a size": b"\x80\x02}" + _constant("g_ema") + b"ctorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x02\x85Rs.",
        "endless tuple as a key": b"\x80\x02}" + _doubled(b"K\x01\x85", b"?\x86") + b"K\x01s.",
        "endless tuple in a set": b"\x80\x02c__builtin__\nset\n](" + _doubled(b"K\x01\x85", b"?\x86") + b"e\x85R.",
        "numbers of one hash": b"\x80\x02}("
        + b"".join(_whole((2**61 - 1) * (i + 2**20)) + b"N" for i in range(200_000))
        + b"u.",
        "attributes in the place of methods": b"\x80\x02ccollections\nOrderedDict\n)R"
        + _constant("g_ema")
        + _tensor("FloatStorage", 1, (1 << 15, 1 << 15), (0, 0))
        + b"s}"
        + _constant("values")
        + b"ccollections\nOrderedDict\nsb.",
        "slow codec": b"\x80\x02c_codecs\nencode\n"
        + _constant("\u00e9\u4e00" * 50_000)
        + _constant("punycode")
        + b"\x86R.",
        "shape of huge numbers": _storage_program("FloatStorage", 1, (1 << 2000,) * 8, (1,) * 8),
        "large bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2 << 30) + b"abc.",
        "endless tuple as an item of a set": b"\x80\x02c__builtin__\nset\n](e\x85R(K\x01"
        + _doubled(b"K\x01\x85", b"?\x86")
        + b"u.",
        "long text again and again": again(
            b"c_codecs\nencode\nq\x00" + _constant(b"a" * (4 << 20)) + b"q\x01", b"h\x00h\x01\x85R"
        ),
        "attributes again and again": again(
            b"cargparse\nNamespace\n)Rq\x00}q\x01(" + b"".join(_whole(i) + b"N" for i in range(10_000)) + b"u",
            b"h\x00h\x01b",
        ),
        "long storage id": again(
            b"("
            + _constant("storage")
            + b"ctorch\nFloatStorage\n"
            + _constant("0")
            + _constant("cpu")
            + b"K\x01"
            + b"N" * 100_000
            + b"tq\x00",
            b"h\x00Q",
        ),
        "recursive dict": b"\x80\x02}q\x00" + _constant("g_ema") + b"h\x00s.",
    }
    files = {}
    for name, program in programs.items():
        if program.startswith(b"\x80\x02"):  # a pickle need not declare its protocol
            files[f"{name}, without a protocol.pt"] = program[2:]
        files[f"{name}, bare.pkl"] = program
        files[f"{name}, zip.pt"] = _archive(program, {"data/0": bytes(4)})
        files[f"{name}, legacy.pt"] = _legacy(program)
    files["endless tuple as the key of a storage.pt"] = _legacy(
        _storage_program("FloatStorage", 1, (1,), (1,)), b"\x80\x02](" + _doubled(b"K\x01\x85", b"?\x86") + b"e."
    )
    files["streams in streams.pkl"] = _streams()
    files["overlapping parts.pt"] = _overlapping()
    plain = pickle.dumps({}, 2)
    files["zip bomb of a record.pt"] = _archive(plain, {"data/0": zeros}, packed=True)
    files["zip bomb of the pickle.pt"] = _archive(b"\x80\x02" + b"N0" * (16 << 20), packed=True)
    lying = bytearray(_archive(plain, {"data/0": bytes(64)}))
    at = lying.rfind(b"archive/data/0") - 46 + 20  # sizes in the central directory
    lying[at : at + 8] = struct.pack("<II", 0x7FFFFFF0, 0x7FFFFFF0)
    files["zip with lying sizes.pt"] = bytes(lying)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the duplicate name
        for program in (plain, bytearray_call):
            archive.writestr("archive/data.pkl", program)
    files["zip with two programs.pt"] = out.getvalue()
    files["zip with names outside.pt"] = _archive(plain, {"../../../outside": b"x"})
    for name, size in (("huge", 1 << 62), ("large", 100 << 20), ("beyond the file", 5000)):
        files[f"header {name}.safetensors"] = struct.pack("<Q", size) + b'{"a": 1}'
    shape = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    files["header of a huge tensor.safetensors"] = struct.pack("<Q", len(shape)) + shape + bytes(16)
    return files


def hostile(canary: Path) -> dict[str, bytes]:
    """Return all files, name to content. Each must be rejected."""
    nvidia, files = _nvidia(), bombs() | shared() | altered()
    for name in CALLS:
        call = _call(name, canary)
        files[f"{name}, bare.pkl"] = b"\x80\x02" + call + b"."
        files[f"{name}, nested.pkl"] = _nested(nvidia, call)
        files[f"{name}, zip.pt"] = _archive(b"\x80\x02}" + _constant("g_ema") + call + b"s.")
        files[f"{name}, legacy.pt"] = _legacy(b"\x80\x02}" + _constant("g_ema") + call + b"s.")
    for name, data in good().items():
        stem, _, suffix = name.partition(".")
        for part in (0, 1, 7, 30, len(data) // 4, len(data) // 2, 3 * len(data) // 4, len(data) - 2):
            files[f"{stem} cut at {part}.{suffix}"] = data[:part]
        # invert 64 bytes of the file's structure; changed numbers could not be detected
        structure = {"zip.pt": len(data) - 2000, "ours.safetensors": 0}.get(name, 0)
        for i in range(8):
            at = structure + 16 + i * 90
            flipped = bytes(255 - byte for byte in data[at : at + 64])
            files[f"{stem} flipped at {at}.{suffix}"] = data[:at] + flipped + data[at + 64 :]
    for value in ("nan", "inf", "-inf"):
        for name, data in not_finite(float(value)).items():
            stem, _, suffix = name.partition(".")
            files[f"{stem} with {value}.{suffix}"] = data
    return files


def _memory(kind: str) -> int:
    """Return the bytes that this process uses now (VmRSS) or used at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def main(folder: Path) -> None:
    """Read every file as `psp-weights import` does, and print what happened."""
    import resource

    from psp_lightning.importers.imports import import_file
    from psp_lightning.utils.errors import UserError

    canary = folder / "canary"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 6 * GIB, used + 6 * GIB))  # a bomb must not exhaust the machine
    results = {}
    for number, (name, data) in enumerate(hostile(canary).items()):
        file = folder / f"{number}.{name.rpartition('.')[2]}"
        file.write_bytes(data)
        print(name, file=sys.stderr, flush=True)  # identifies the file if the process dies
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak memory
        before, start = _memory("VmRSS"), time.monotonic()
        try:
            import_file(file)
            outcome = "accepted"
        except UserError as error:
            outcome = f"refused: {error}"
        except BaseException as error:
            outcome = f"failed: {type(error).__name__}: {error}"
        results[name] = (outcome, time.monotonic() - start, _memory("VmHWM") - before, canary.exists())
        file.unlink()
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
