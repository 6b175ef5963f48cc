"""Reading pickles of weights without running anything that they ask for.

Files of `torch.save` and NVIDIA's networks are pickles, and a pickle is a program. Of all that it may import, a short
list of names is known, each of which stands for a function of this module; nothing is ever imported. In NVIDIA's files
each network is a call of `torch_utils.persistence._reconstruct_persistent_obj` with the Python source of its class and
the instance's attributes: the call becomes an inert record of the class's name and the attributes, and the source is
thrown away.

The program's time and memory are bounded as well, which `torch.load(weights_only=True)` does not do: the number of
instructions, the keys of dicts (hashing a tuple of tuples can take for ever, numbers can be chosen to collide), the
bytes of storages by those that are there, the bytes of tensors by the file's.

Python's unpickler in Python, not the one in C, is the base: its instruction table can be cut down, and it neither
trusts the sizes nor the memo indices that a file declares.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import mmap
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psp_lightning.utils.errors import UserError, clean

MAX_INSTRUCTIONS = 1_000_000  # a StyleGAN2 pickle of 1024 px has a tenth of that
STRETCHED = (
    "more memory for its tensors than it has numbers: one that expand() made, or that is there under many names, is "
    "saved with torch.save after .clone()"
)
COPIES, ROOM = 4, 1 << 20  # tensors may repeat a file's bytes (g and g_ema that are one), but not for ever
TREE_VALUES, TREE_LETTERS = 100_000, 1 << 20
TORCH_MAGIC, TORCH_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save's format before zip archives
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first bytes of such a file

STORAGES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
SCALARS = (str, bytes, int, float, bool, NoneType)


class Refused(Exception):
    """The pickle asks for something that is not on the list; the message says what."""


@dataclass(frozen=True)
class PickledNetwork:
    """A network as its pickle describes it: the name of its class and its attributes."""

    class_name: str
    state: dict[str, Any]

    def part(self, kind: str) -> dict[str, Any]:
        """`_parameters`, `_buffers` or `_modules`, without the entries that are None."""
        found = self.state.get(kind)
        return {str(k): v for k, v in found.items() if v is not None} if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Inert:
    """Something that a pickle holds and no importer needs."""

    name: str


class Attributes(dict[str, Any]):
    """What an `argparse.Namespace` holds."""


@dataclass(frozen=True)
class _Callable:
    """What an allowed name stands for."""

    name: str
    call: Callable[..., Any]


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    flat: Tensor


class _DType:
    """numpy's dtype; its byte order comes after its making."""

    def __init__(self, _: _Unpickler, code: Any, *rest: Any) -> None:
        if not isinstance(code, str) or len(code) > 4 or code[:1] not in "fiub":
            raise Refused(f"numpy.dtype({said(code)})")
        self.code = code


@dataclass
class _Budget:
    """What all streams of a file may still take."""

    instructions: int
    stored: int
    viewed: int

    @classmethod
    def of(cls, size: int) -> _Budget:
        return cls(MAX_INSTRUCTIONS, size + ROOM, COPIES * size + ROOM)

    def take(self, kind: str, amount: int, what: str) -> None:
        left = getattr(self, kind) - amount
        setattr(self, kind, left)
        if left < 0:
            raise Refused(what)


def said(value: Any) -> str:
    """A file's own value in a message, of bounded length: values in values are not gone through."""
    if type(value) is str:
        return repr(clean(value, 40))
    if type(value) in (float, bool, NoneType) or (type(value) is int and value.bit_length() < 64):
        return repr(value)
    return f"a {type(value).__name__}"


def check_tree(value: Any, what: str) -> None:
    """Raise a UserError unless `value` is a small tree: lists that hold one list twice, and so on, print for ever."""
    pending, values, letters = [(value, 0)], 0, 0
    while pending:
        node, depth = pending.pop()
        values += 1
        letters += len(node) if isinstance(node, (str, bytes)) else 0
        if values > TREE_VALUES or letters > TREE_LETTERS or depth > 50:
            raise UserError(f"there are more values in its {what} than any network has.")
        if isinstance(node, Mapping):
            pending.extend((child, depth + 1) for pair in node.items() for child in pair)
        elif isinstance(node, (list, tuple, set, frozenset)):
            pending.extend((child, depth + 1) for child in node)


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """What a pickle of NVIDIA's holds: plain containers and values, tensors, `PickledNetwork`s.

    Raises:
        UserError: the pickle asks for anything else, with its name; it is damaged. Nothing in it was run.
    """
    with _bytes_of(Path(path)) as data:
        return _Unpickler(data, _Budget.of(len(data))).load()


def read_torch(path: str | os.PathLike[str]) -> Any:
    """What a file of `torch.save` holds, in either of its formats: plain containers and values, tensors on the CPU.

    Parameters become tensors, namespaces `Attributes`; everything has memory of its own.

    Raises:
        UserError: as of `read_pickle`.
    """
    with _bytes_of(Path(path)) as data:
        budget = _Budget.of(len(data))
        return _archive(data, budget) if data[:2] == b"PK" else _stream(data, budget)


@contextlib.contextmanager
def _bytes_of(path: Path) -> Iterator[mmap.mmap]:
    """A file's bytes, not yet in memory; what goes wrong with them becomes one message."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except Refused as error:
        raise UserError(f"{path} was refused and nothing in it was run: {_explain(str(error))}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except Exception as error:  # a damaged file makes the unpickler fail in any way whatever
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = "an unknown instruction" if isinstance(error, KeyError) else clean(reason, 200)
        raise UserError(
            f"{path} is not a PyTorch checkpoint or a pickle of networks, or it is damaged ({reason}); nothing in it "
            "was run. Download or copy it again."
        ) from None


def _explain(name: str) -> str:
    """What a file is whose pickle asks for `name`, and what can be done."""
    if name.startswith(("dnnlib.tflib", "tfutil.", "network.")):
        return (
            f"it is a TensorFlow pickle, as of StyleGAN or StyleGAN2 ({name}). Convert it in its own environment, a "
            "StyleGAN2 with legacy.py of NVlabs/stylegan2-ada-pytorch (--source, --dest) or convert_weight.py of "
            "rosinality/stylegan2-pytorch, and import what that writes. StyleGAN1 has another generator and cannot be "
            "used."
        )
    if name.startswith(("torch.nn.", "torch.jit", "models.", "model.", "training.")):
        return (
            f"it holds whole Python objects ({name}), not weights. Load it where it was made and save its "
            "state_dict() with torch.save."
        )
    also = ", which is neither a plain value, a tensor nor a network of NVIDIA's StyleGAN2" if " " not in name else ""
    return f"it asks for {name}{also}."


# --- torch.save's formats --------------------------------------------------------------------------------------------


def _archive(data: mmap.mmap, budget: _Budget) -> Any:
    """The content of a zip archive: `FOLDER/data.pkl`, whose storages are the parts `FOLDER/data/KEY`."""
    file: Any = data
    with zipfile.ZipFile(file) as archive:
        parts = {entry.filename: entry for entry in archive.infolist()}
    (program,) = [name for name in parts if name.rpartition("/")[2] == "data.pkl"]
    folder = program.removesuffix("data.pkl")
    if f"{folder}byteorder" in parts and stored_part(data, parts[f"{folder}byteorder"]) != b"little":
        raise Refused("numbers of another byte order")
    storages: dict[str, _Storage] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> _Storage:
        if key not in storages:
            if f"{folder}data/{key}" not in parts:
                raise ValueError("a part is missing")
            storages[key] = _new_storage(budget, dtype, numel)
            _fill(storages[key].flat, stored_part(data, parts[f"{folder}data/{key}"]))
        return _same(storages[key], dtype, numel)

    return _Unpickler(io.BytesIO(stored_part(data, parts[program])), budget, storage).load()


def _stream(data: Any, budget: _Budget, nested: bool = False) -> Any:
    """The content of the format before zip archives: five pickles, then each storage as a count and its values."""
    storages: dict[str, _Storage] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> _Storage:
        if key not in storages:
            storages[key] = _new_storage(budget, dtype, numel)
        return _same(storages[key], dtype, numel)

    def following() -> Any:
        return _Unpickler(data, budget, storage, nested).load()

    if following() != TORCH_MAGIC or following() != TORCH_PROTOCOL:
        raise ValueError("it does not begin as the files of torch.save")
    machine, content, keys = following(), following(), following()
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise Refused("numbers of another byte order")
    if not isinstance(keys, list) or len(keys) != len(storages):
        raise ValueError("its storages are not those of its tensors")
    for key in keys:
        flat = storages[key].flat
        count = int.from_bytes(data.read(8), "little")
        if count != flat.numel():
            raise ValueError(f"a storage of {flat.numel()} numbers has {count}")
        _fill(flat, data.read(count * flat.itemsize))
    return content


def stored_part(data: mmap.mmap, entry: zipfile.ZipInfo) -> bytes:
    """The bytes of an uncompressed part, whatever its checksum says: torch.save can be told to leave those out."""
    header = data[entry.header_offset : entry.header_offset + 30]
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile("a part is not where the directory says")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    return data[start : start + entry.file_size]


def _new_storage(budget: _Budget, dtype: torch.dtype, numel: int) -> _Storage:
    budget.take("stored", abs(numel) * dtype.itemsize, "storages of more bytes than the file has")
    return _Storage(torch.empty(numel, dtype=dtype))


def _same(storage: _Storage, dtype: torch.dtype, numel: int) -> _Storage:
    if storage.flat.dtype != dtype or storage.flat.numel() != numel:
        raise Refused("a storage of two kinds")
    return storage


def _fill(flat: Tensor, data: bytes) -> None:
    if len(data) != flat.numel() * flat.itemsize:
        raise ValueError(f"a storage of {flat.numel()} numbers has {len(data)} bytes")
    if data:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody writes to the bytes
            flat.copy_(torch.frombuffer(data, dtype=flat.dtype))


# --- the unpickler ---------------------------------------------------------------------------------------------------

StorageOf = Callable[[torch.dtype, str, int], _Storage]


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Builds plain values from a stream of pickle instructions.

    Args:
        file: at the first instruction.
        budget: what it may take, shared by the streams of a file.
        storage: gives the storage of a type, key and length; None where the pickle must not ask for any.
        nested: it holds a storage and nothing else.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Any, budget: _Budget, storage: StorageOf | None = None, nested: bool = False) -> None:
        super().__init__(file)
        self.dispatch = _table()  # type: ignore[misc]
        self.budget, self.storage, self.nested = budget, storage, nested

    # --- names -----------------------------------------------------------------------------------------------------

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if module in ("torch", "torch.cuda") and name in STORAGES:
            return _StorageType(STORAGES[name])
        if full == "torch.storage.UntypedStorage":
            return _StorageType(torch.uint8)
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return Inert(full)
        if full in _allowed() and not self.nested:
            return _Callable(full, _allowed()[full])
        raise Refused(clean(full, 200))

    def persistent_load(self, pid: Any) -> _Storage:
        if self.storage is None:
            raise Refused("an object outside the file (a persistent id)")
        kind, storage, key, _, numel, *view = pid
        known = isinstance(storage, _StorageType) and type(key) is str and type(numel) is int
        if kind != "storage" or not known or any(v is not None for v in view):
            raise Refused("an unknown kind of storage")
        return self.storage(storage.dtype, key, numel)

    # --- instructions ----------------------------------------------------------------------------------------------

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, _Callable) or not isinstance(arguments, tuple):
            raise Refused(f"a call of a {type(function).__name__}")
        self.stack.append(function.call(self, *arguments))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self._call(self.stack.pop(), arguments)

    def load_newobj_ex(self) -> None:
        if self.stack.pop():
            raise Refused("a call with named arguments")
        self.load_reduce()

    def load_build(self) -> None:
        """Attributes: of a numpy dtype its byte order, of a namespace all; those of a dict are left out."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _DType):
            if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "|", "=")):
                raise Refused("numpy.dtype of another byte order")
        elif isinstance(target, Attributes) and isinstance(state, dict):
            target.update(state)
        elif not isinstance(target, (dict, Inert)):
            raise Refused(f"attributes of a {type(target).__name__}")

    def load_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise Refused(f"items of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(self.entries(zip(items[::2], items[1::2], strict=True)))

    def entries(self, pairs: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Keys and values of a dict, checked: a tensor under many names becomes many tensors of a network."""
        for key, value in pairs:
            if isinstance(value, Tensor):
                self.budget.take("viewed", value.numel() * value.itemsize, STRETCHED)
            yield _plain(key), value

    def load_additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise Refused(f"elements of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(map(_plain, items))

    def load_frozenset(self) -> None:
        self.stack.append(frozenset(map(_plain, self.pop_mark())))


def _plain(key: Any) -> Any:
    """A key whose hash takes no time and, as Python draws those of texts anew in each process, cannot be chosen."""
    if type(key) in (str, bytes, bool, NoneType) or (type(key) is int and key.bit_length() < 60):
        return key
    raise Refused(f"a key of the type {type(key).__name__}")


# What is left out: classes called by INST and OBJ, the extension registry, buffers from outside, and BYTEARRAY8, which
# asks for as much memory as it says.
INSTRUCTIONS = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT "
    "BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM "
    "SETITEMS EMPTY_SET ADDITEMS FROZENSET GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL "
    "REDUCE NEWOBJ NEWOBJ_EX BUILD PERSID BINPERSID"
).split()
REPLACED = {
    "REDUCE": "load_reduce", "NEWOBJ": "load_reduce", "NEWOBJ_EX": "load_newobj_ex", "BUILD": "load_build",
    "SETITEM": "load_setitem", "SETITEMS": "load_setitems", "DICT": "load_dict", "ADDITEMS": "load_additems",
    "FROZENSET": "load_frozenset",
}  # fmt: skip


def _step(method: Callable[[Any], None], unpickler: _Unpickler) -> None:
    budget = unpickler.budget
    budget.instructions -= 1
    if budget.instructions < 0:
        raise Refused(f"more than {MAX_INSTRUCTIONS} instructions")
    method(unpickler)


@functools.lru_cache(maxsize=1)
def _table() -> dict[int, Callable[[Any], None]]:
    """The instructions that are carried out, each counted."""
    table: dict[int, Callable[[Any], None]] = {}
    for name in INSTRUCTIONS:
        opcode = getattr(pickle, name)[0]
        method = getattr(_Unpickler, REPLACED[name]) if name in REPLACED else pickle._Unpickler.dispatch[opcode]  # type: ignore[attr-defined]
        table[opcode] = functools.partial(_step, method)
    return table


# --- what the allowed names stand for; each takes the unpickler first ----------------------------------------------


def _network(_: _Unpickler, meta: Any) -> PickledNetwork:
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise Refused("a persistent object that is no class")
    name, state = meta.get("class_name"), meta.get("state")
    if not isinstance(name, str) or not isinstance(state, dict):
        raise Refused("a persistent class without a name or attributes")
    return PickledNetwork(clean(name, 200), state)


def _from_bytes(unpickler: _Unpickler, data: Any) -> _Storage:
    """A storage that lies in the pickle as a stream of torch.save."""
    found = _stream(io.BytesIO(data), unpickler.budget, nested=True) if isinstance(data, bytes) else None
    return found if isinstance(found, _Storage) else _refuse("torch.storage._load_from_bytes of no storage")


def _tensor(unpickler: _Unpickler, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """A view of a storage."""
    if not isinstance(storage, _Storage):
        raise Refused("a tensor without its storage")
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or len(size) > 8 or any(type(n) is not int or not 0 <= n < 1 << 40 for n in numbers):
        raise Refused("a tensor of an impossible shape")
    flat, count = storage.flat, math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and last >= flat.numel():
        raise Refused(f"a tensor of shape {tuple(size)} whose storage has {flat.numel()} numbers")
    if count > flat.numel():
        unpickler.budget.take("viewed", count * flat.itemsize, f"{STRETCHED} (shape {tuple(size)})")
    return flat.as_strided(size, stride, offset)


def _parameter(_: _Unpickler, tensor: Any, *rest: Any) -> Tensor:
    return tensor if isinstance(tensor, Tensor) else _refuse("a parameter that is no tensor")


def _mapping(unpickler: _Unpickler, *arguments: Any) -> dict[Any, Any]:
    pairs = arguments[0] if arguments else []
    if len(arguments) > 1 or not isinstance(pairs, (list, dict)):
        raise Refused("a dict of something else")
    return dict(unpickler.entries(pairs.items() if isinstance(pairs, dict) else pairs))


def _set_of(_: _Unpickler, elements: Any = ()) -> set[Any]:
    if not isinstance(elements, (list, tuple)):
        raise Refused("a set of something else")
    return {_plain(element) for element in elements}


def _size(_: _Unpickler, sides: Any) -> tuple[Any, ...]:
    return tuple(sides) if isinstance(sides, (list, tuple)) else _refuse("torch.Size of something else")


def _refuse(what: str) -> Any:
    raise Refused(what)


def _encode(_: _Unpickler, text: Any, encoding: Any = "latin1") -> bytes:
    """How protocol 2 stores bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("_codecs.encode")
    return text.encode("latin1")


def _scalar(_: _Unpickler, dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes) or len(data) > 8:
        raise Refused("a numpy scalar of something else")
    return np.frombuffer(data, dtype.code)[0].item()


def _inert(name: str) -> Callable[..., Inert]:
    return lambda *_: Inert(name)


@functools.lru_cache(maxsize=1)
def _allowed() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {
        "torch_utils.persistence._reconstruct_persistent_obj": _network,
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch.storage._load_from_bytes": _from_bytes,
        "torch.Size": _size,
        "torch.device": _inert("torch.device"),
        "collections.OrderedDict": _mapping,
        "collections.Counter": _mapping,
        "argparse.Namespace": lambda *_: Attributes(),
        "dnnlib.util.EasyDict": _mapping,
        "dnnlib.EasyDict": _mapping,
        "_codecs.encode": _encode,
        "numpy.dtype": _DType,
        "numpy.ndarray": _inert("numpy.ndarray"),
    }
    for module in ("builtins", "__builtin__"):
        table[f"{module}.set"] = _set_of
    for module in ("numpy.core", "numpy._core"):
        table[f"{module}.multiarray.scalar"] = _scalar
        table[f"{module}.multiarray._reconstruct"] = table[f"{module}.numeric._frombuffer"] = _inert("numpy.ndarray")
    return table
