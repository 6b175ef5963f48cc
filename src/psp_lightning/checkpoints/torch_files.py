"""Read files of `torch.save` and pickles of tensors without running any code that they ask for.

A pickle is a program. Here it can only build plain containers and values, tensors, and the results of functions that a
caller allows: each name that it asks for is looked up in a table, and nothing is imported. Time and memory are bounded
too, which `torch.load(weights_only=True)` does not do. The reader restricts Python's own unpickler in its pure-Python
form.

A comment `Needed by: NAME` names the file of tests/unit/hostile_files.py that would do harm without that check.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import mmap
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psp_lightning.checkpoints.file_kinds import NOT_TORCH, explain_request, file_kind
from psp_lightning.utils.errors import UserError, clean

Names = Mapping[str, Callable[..., Any]]
# Used by torch.save and NVIDIA in protocols 2 to 5. Needed by: large bytearray (BYTEARRAY8 allocates what it claims)
INSTRUCTIONS = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING "
    "SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT "
    "MEMOIZE GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
).split()
STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
COPIES, ROOM = 4, 1 << 20  # parts of a file may be used several times (g and g_ema may share), but not without limit


class Refused(Exception):
    """A forbidden request of a pickle; the message is its name or a description."""


class Placeholder:
    """A stand-in for a value that no reader of weights needs, such as a NumPy array."""

    def __init__(self, *_: Any) -> None: ...


class _Namespace(dict[str, Any]):
    """The attributes of an `argparse.Namespace`."""


class _NumPyType:
    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="  # the pickle sets the byte order later


class _Budget:
    """The resources that a file of `size` bytes may still use, shared by all its pickles."""

    def __init__(self, size: int) -> None:
        self.left = {
            "instructions": 1_000_000,  # ten times as many as in a StyleGAN2 of 1024 px. Needed by: many instructions
            "bytes in storages": size + ROOM,  # Needed by: overlapping parts
            "bytes in tensors": COPIES * size + ROOM,  # Needed by: stretched weights, a tensor under many names
            "items in arguments": COPIES * size + ROOM,  # Needed by: long text again and again
        }

    def take(self, kind: str, amount: int, hint: str = "") -> None:
        self.left[kind] -= amount
        if self.left[kind] < 0:
            raise Refused(f"more {kind} than are allowed for this file{hint}")

    def take_tensor(self, shape: tuple[int, ...], itemsize: int) -> None:
        hint = "a tensor made by expand() or stored under many names must be saved with torch.save after .clone()"
        self.take("bytes in tensors", math.prod(shape) * itemsize, f": {hint} (shape {tuple(shape)})")


class _Memo(dict[int, Any]):
    """The values that a pickle reuses. Needed by: a tensor under many names."""

    def __init__(self, budget: _Budget) -> None:
        self.budget = budget

    def __getitem__(self, index: int) -> Any:
        value = super().__getitem__(index)
        if isinstance(value, Tensor):
            self.budget.take_tensor(value.shape, value.itemsize)
        return value


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """An unpickler that builds plain values and may call only the functions in `names`.

    For each storage that the pickle mentions, an uninitialised flat tensor is added to `storages`. If that is None, the
    pickle may mention none.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Any, budget: _Budget, names: Names, storages: dict[str, Tensor] | None = None) -> None:
        super().__init__(file)
        self.budget, self.names, self.storages = budget, names, storages
        self.dispatch, self.memo = _Instructions(budget), _Memo(budget)  # type: ignore[misc,assignment]

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up. Needed by: os.system and the other calls."""
        full = f"{module}.{name}"
        if full in self.names:
            return self.names[full]
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise Refused(clean(full, 200))

    def persistent_load(self, pid: Any) -> Tensor:
        """Return a storage, whose values are outside the pickle."""
        if self.storages is None or not isinstance(pid, tuple) or len(pid) not in (5, 6):
            raise Refused("an object outside the file (a persistent id)")  # Needed by: long storage id
        kind, dtype, key, _, numel, view = (*pid, None)[:6]
        known = kind == "storage" and isinstance(dtype, torch.dtype) and type(key) is str and type(numel) is int
        if not known or view is not None:  # Needed by: parts of storages
            raise Refused("an unknown kind of storage")
        if key not in self.storages:
            self.budget.take("bytes in storages", numel * dtype.itemsize)
            self.storages[key] = torch.empty(numel, dtype=dtype)
        return self.storages[key]

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not callable(function) or not isinstance(arguments, tuple):
            raise Refused(f"a call of a {type(function).__name__}")
        sized = [len(part) for part in arguments if isinstance(part, (str, bytes, tuple, list, dict, set))]
        self.budget.take("items in arguments", len(arguments) + sum(sized))
        self.stack.append(function(*arguments))

    load_newobj = load_reduce

    def load_build(self) -> None:
        """Set a namespace's attributes or a NumPy type's byte order; everything else is ignored."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _NumPyType) and isinstance(state, tuple):
            target.order = state[1]
        elif isinstance(target, _Namespace) and isinstance(state, dict):
            self.budget.take("items in arguments", len(state))  # Needed by: attributes again and again
            target.update(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._last(dict)[_plain(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._last(dict).update((_plain(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    def load_additems(self) -> None:
        items = self.pop_mark()
        self._last(set).update(map(_plain, items))

    def _last(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):  # Needed by: endless tuple as an item of a set
            raise Refused(f"items of a {type(self.stack[-1]).__name__}")
        return self.stack[-1]


class _Instructions:
    """The dispatch table of the allowed instructions, which counts each use."""

    def __init__(self, budget: _Budget) -> None:
        self.budget, self.methods = budget, _methods()

    def __getitem__(self, code: int) -> Callable[[_Unpickler], None]:
        self.budget.take("instructions", 1)
        if code not in self.methods:
            raise ValueError(f"it has the unknown instruction {code}")
        return self.methods[code]


@functools.cache
def _methods() -> dict[int, Callable[[_Unpickler], None]]:
    codes = [getattr(pickle, name)[0] for name in INSTRUCTIONS]
    base = pickle._Unpickler.dispatch  # type: ignore[attr-defined]
    return {code: getattr(_Unpickler, base[code].__name__) for code in codes}


def _plain(key: Any) -> Any:
    """Return the key if its hash is cheap and an attacker cannot make it collide; otherwise raise `Refused`."""
    if type(key) in (str, bytes, bool, type(None)) or (type(key) is int and key.bit_length() < 60):
        return key
    raise Refused(f"a key of the type {type(key).__name__}")  # Needed by: endless tuple as a key, numbers of one hash


def _tensor(budget: _Budget, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """Return a view of a storage."""
    # checked in exact integers, not only by torch: huge shape, negative shape, huge numbers
    numbers = (offset, *size, *stride)
    if len(numbers) > 17 or any(type(n) is not int or not 0 <= n < 1 << 40 for n in numbers):
        raise Refused("a tensor of an impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last * storage.itemsize >= storage.untyped_storage().nbytes():
        raise Refused(f"a tensor of shape {tuple(size)} whose storage has {storage.numel()} numbers")
    budget.take_tensor(size, storage.itemsize)
    return storage.as_strided(size, stride, offset)


def _dict(items: Any = ()) -> dict[Any, Any]:
    return {_plain(key): value for key, value in (items.items() if isinstance(items, dict) else items)}


def _number(dtype: Any, data: Any) -> Any:
    """Return a NumPy scalar as a Python number."""
    if not (isinstance(dtype, _NumPyType) and dtype.order in "<>=|" and re.fullmatch("[fiub][1248]", dtype.code)):
        raise Refused("a NumPy scalar of an unknown kind")
    return np.frombuffer(data, dtype.order + dtype.code)[0].item()


def _allowed(budget: _Budget) -> dict[str, Callable[..., Any]]:
    """Return the functions that a pickle may call, by name."""
    names: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor": functools.partial(_tensor, budget),
        "torch._utils._rebuild_tensor_v2": functools.partial(_tensor, budget),
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        # a stream of torch.save, which may call no function
        "torch.storage._load_from_bytes": lambda data: _read_stream(io.BytesIO(data), budget, {}),
        "torch.Size": tuple,
        "torch.device": Placeholder,
        "argparse.Namespace": lambda *_: _Namespace(),
        # how protocol 2 stores bytes. Needed by: slow codec, which asks for another encoding
        "_codecs.encode": lambda text, *_: text.encode("latin1"),
        "numpy.dtype": _NumPyType,
        "numpy.ndarray": Placeholder,
    }
    for name in ("collections.OrderedDict", "collections.Counter", "dnnlib.EasyDict", "dnnlib.util.EasyDict"):
        names[name] = _dict
    for module in ("builtins", "__builtin__"):  # Needed by: endless tuple in a set
        names[f"{module}.set"] = lambda items=(): set(map(_plain, items))
    for module in ("numpy.core", "numpy._core"):
        names[f"{module}.multiarray.scalar"] = _number
        names[f"{module}.multiarray._reconstruct"] = names[f"{module}.numeric._frombuffer"] = Placeholder
    return names


def _read_archive(file: Any, budget: _Budget, names: Names) -> Any:
    """Read a zip archive: `FOLDER/data.pkl`, with the storages in `FOLDER/data/KEY`."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    folder = next((name[:-8] for name in entries if name.rpartition("/")[2] == "data.pkl"), None)
    if folder is None:
        raise ValueError("it has no data.pkl")
    matches: dict[str, bool] = {}

    def part(name: str) -> bytes:
        entry = entries[folder + name]
        if entry.compress_type != zipfile.ZIP_STORED:  # a decompressed part could be larger than the file
            raise Refused(f"{clean(name, 60)} to be decompressed, which no file of torch.save needs")
        header = file[entry.header_offset : entry.header_offset + 30]
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        data: bytes = file[start : start + entry.file_size]
        if data:
            matches[name] = zlib.crc32(data) == entry.CRC
        return data

    if f"{folder}byteorder" in entries and part("byteorder") != b"little":  # Needed by: big-endian, zip
        raise Refused("numbers in another byte order")
    storages: dict[str, Tensor] = {}
    content = _Unpickler(io.BytesIO(part("data.pkl")), budget, names, storages).load()
    for key, storage in storages.items():
        _fill(storage, part(f"data/{key}"))
    wrong = [name for name, match in matches.items() if not match]
    if 0 < len(wrong) < len(matches):  # if all differ, torch.save was told to leave the checksums out
        raise ValueError(f"{len(wrong)} of its {len(matches)} parts do not match their checksums, first {wrong[0]}")
    return content


def _read_stream(file: Any, budget: _Budget, names: Names) -> Any:
    """Read the format before zip archives: five pickles, then the length and values of each storage."""
    storages: dict[str, Tensor] = {}
    magic, protocol, machine, content, keys = (_Unpickler(file, budget, names, storages).load() for _ in range(5))
    if (magic, protocol) != (0x1950A86A20F9469CFC6C, 1001):
        raise ValueError("it does not begin like a file of torch.save")
    if isinstance(machine, dict) and machine.get("little_endian") is False:  # Needed by: big-endian, legacy
        raise Refused("numbers in another byte order")
    # Needed by: tensors without values, endless tuple as the key of a storage
    if set(map(_plain, keys)) != storages.keys():
        raise ValueError("its storages do not match its tensors")
    for key in keys:
        length = int.from_bytes(file.read(8), "little")
        _fill(storages[key], file.read(length * storages[key].itemsize))
    return content


def _fill(storage: Tensor, data: bytes) -> None:
    target = storage.view(torch.uint8).numpy()
    if len(data) != len(target):  # Needed by: the files that are cut
        raise ValueError(f"a storage of {len(target)} bytes has {len(data)}")
    target[:] = np.frombuffer(data, np.uint8)


def read_torch(path: str | os.PathLike[str], kind: str | None = None) -> Any:
    """Read a file of `torch.save` in either of its formats, as plain containers, plain values and CPU tensors.

    Parameters become tensors, namespaces become dicts, and NumPy arrays become `Placeholder`s. No tensor shares memory
    with the file. `kind` is the result of `file_kind`, if that is known already.

    Raises:
        UserError: the file is of another kind, is damaged, or asks for anything else. Nothing in it was run.
    """
    kind = kind or file_kind(path)
    if kind in NOT_TORCH:
        raise UserError(f"{path} is {NOT_TORCH[kind]}")
    read = _read_archive if kind == "zip" else _read_stream
    with _opened(path) as (data, budget):
        return read(data, budget, _allowed(budget))


def read_pickle(path: str | os.PathLike[str], names: Names) -> Any:
    """Read a bare pickle as `read_torch` does; `names` are further functions that it may call."""
    with _opened(path) as (data, budget):
        return _Unpickler(data, budget, {**_allowed(budget), **names}).load()


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[mmap.mmap, _Budget]]:
    """Yield a memory map of a file and its budget; turn any error into one message."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data, _Budget(len(data))
    except Refused as error:
        raise UserError(f"{path} was refused and nothing in it was run: {explain_request(str(error))}") from None
    except Exception as error:  # a damaged file makes the unpickler fail in many ways
        reason = clean((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
        raise UserError(
            f"{path} is truncated or damaged, or not a PyTorch checkpoint or a pickle of networks ({reason}); nothing "
            "in it was run. Download or copy it again."
        ) from None
