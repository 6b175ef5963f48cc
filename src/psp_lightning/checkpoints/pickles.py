"""Reading pickles of NVIDIA's networks without running anything that they ask for.

Such a file is no checkpoint of tensors: each network is a call of `torch_utils.persistence._reconstruct_persistent_obj`
with the Python source of its class and the instance's attributes. Here the call becomes an inert record of the class's
name and the attributes, and the source is thrown away. Of all that a pickle may import, a short list of names is known,
each of which stands for a function of this module; nothing is ever imported. The instructions themselves are bounded:
their number, the keys of dicts (hashing a deep tuple would overflow the stack), tensors by the bytes that are there.

Python's unpickler in Python, not the one in C, is the base: its instruction table can be cut down, and it neither
trusts the sizes nor the memo indices that a file declares.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import pickletools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psp_lightning.utils.errors import UserError

MAX_INSTRUCTIONS = 3_000_000  # a StyleGAN2 pickle of 1024 px has a tenth of a million
MAX_DEPTH = 100  # of tuples in tuples; hashing one goes into depth on the C stack
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


@dataclass(frozen=True)
class _Callable:
    """What an allowed name stands for."""

    name: str
    call: Callable[..., Any]


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


@dataclass(frozen=True)
class _StorageReference:
    dtype: torch.dtype
    key: str
    numel: int


class _DType:
    """numpy's dtype; its byte order comes after its making."""

    def __init__(self, _: _Unpickler, code: Any, *rest: Any) -> None:
        if not isinstance(code, str) or len(code) > 4 or code[:1] not in "fiub":
            raise Refused(f"numpy.dtype({str(code)[:20]!r})")
        self.code = code


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """What a pickle holds: plain containers and values, tensors (views of the file's bytes), `PickledNetwork`s.

    Raises:
        UserError: the pickle asks for anything else, with its name; it is damaged. Nothing in it was run.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Refused as error:
        raise UserError(f"{path} was refused and nothing in it was run: {_explain(str(error))}") from None
    except Exception as error:  # a damaged file makes the unpickler fail in any way whatever
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = "an unknown instruction" if isinstance(error, KeyError) else reason
        raise UserError(f"{path} is a damaged pickle, or none ({reason[:200]}). Download or copy it again.") from None


def _explain(name: str) -> str:
    """What a file is whose pickle asks for `name`, and what can be done."""
    if name.startswith("dnnlib.tflib"):
        return (
            f"it is a TensorFlow pickle of StyleGAN or StyleGAN2 ({name}). Convert it in its own environment, a "
            "StyleGAN2 with legacy.py of NVlabs/stylegan2-ada-pytorch (--source, --dest) or convert_weight.py of "
            "rosinality/stylegan2-pytorch, and import what that writes. StyleGAN1 has another generator and cannot be "
            "used."
        )
    if name.startswith(("torch.nn.", "torch.jit", "models.", "model.", "training.")):
        return (
            f"it holds whole Python objects ({name}), not weights. Load it where it was made and save its "
            "state_dict() with torch.save."
        )
    return f"it asks for {name}, which is neither a plain value, a tensor nor a network of NVIDIA's StyleGAN2."


def check_instructions(stream: Any, pickles: int = 1) -> None:
    """Go through pickles that `torch.load(weights_only=True)` is to read, without carrying anything out.

    That reader runs no code, but it can be told to fill the memory (`bytearray(n)`) or to overflow the stack (the hash
    of a deep tuple).

    Args:
        stream: binary file or mmap at the first pickle.
        pickles: how many there are, one after the other.

    Raises:
        Refused: a name or a depth that no checkpoint has, or too many instructions.
        ValueError: not a pickle.
    """
    left = MAX_INSTRUCTIONS
    for _ in range(pickles):
        stack: list[int | None] = []  # depth of tuples in each value; None: a mark
        memo: dict[Any, int] = {}
        for opcode, argument, _ in pickletools.genops(stream):
            left -= 1
            if left < 0:
                raise Refused(f"more than {MAX_INSTRUCTIONS} instructions")
            if opcode.name in ("GLOBAL", "INST") and str(argument).endswith(" bytearray"):
                raise Refused("builtins.bytearray")
            _follow(opcode, argument, stack, memo)


def _follow(opcode: Any, argument: Any, stack: list[int | None], memo: dict[Any, int]) -> None:
    """What an instruction does to the depths on the stack."""
    name = opcode.name
    if name == "MARK":
        stack.append(None)
    elif "PUT" in name and stack:
        memo[argument] = stack[-1] or 0
    elif "GET" in name:
        stack.append(memo.get(argument, 0))
    else:
        taken: list[int] = []
        if pickletools.markobject in opcode.stack_before:
            while stack and (top := stack.pop()) is not None:
                taken.append(top)
        before = [part for part in opcode.stack_before if part not in (pickletools.markobject, pickletools.stackslice)]
        taken += [stack.pop() or 0 for _ in before if stack]
        depth = 1 + max(taken, default=0) if name.startswith("TUPLE") else 0
        if depth > MAX_DEPTH:
            raise Refused(f"tuples nested more than {MAX_DEPTH} times")
        stack.extend([depth] * len(opcode.stack_after))


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Builds plain values from a stream of pickle instructions."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: io.BytesIO, outer: _Unpickler | None = None) -> None:
        super().__init__(file)
        self.dispatch = _table()  # type: ignore[misc]
        self.nested = outer is not None
        self.budget: list[int] = [MAX_INSTRUCTIONS] if outer is None else outer.budget  # one for all nested streams

    # --- names -----------------------------------------------------------------------------------------------------

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if module == "torch" and name in STORAGES:
            return _StorageType(STORAGES[name])
        if full == "torch.storage.UntypedStorage":
            return _StorageType(torch.uint8)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return Inert(full)
        if full in _allowed() and not self.nested:
            return _Callable(full, _allowed()[full])
        raise Refused(full[:200])

    def persistent_load(self, pid: Any) -> Any:
        if not self.nested:
            raise Refused("an object outside the file (a persistent id)")
        kind, storage, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(storage, _StorageType) or any(v is not None for v in view):
            raise Refused("an unknown kind of storage")
        return _StorageReference(storage.dtype, str(key), int(numel))

    # --- instructions ----------------------------------------------------------------------------------------------

    def _count(self) -> None:
        self.budget[0] -= 1
        if self.budget[0] < 0:
            raise Refused(f"more than {MAX_INSTRUCTIONS} instructions")

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
        """Attributes: of a numpy dtype its byte order; those of a dict or of what is not needed are left out."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _DType):
            if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "|", "=")):
                raise Refused("numpy.dtype of another byte order")
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
        self.stack[-1].update(zip(map(_plain, items[::2]), items[1::2], strict=True))

    def load_additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise Refused(f"elements of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(map(_plain, items))

    def load_frozenset(self) -> None:
        self.stack.append(frozenset(map(_plain, self.pop_mark())))


def _plain(key: Any) -> Any:
    """A key that can be hashed without going into depth."""
    if type(key) in SCALARS or (type(key) is tuple and len(key) < 17 and all(type(part) in SCALARS for part in key)):
        return key
    raise Refused(f"a {type(key).__name__} as a key")


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
    unpickler._count()
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
    return PickledNetwork(name[:200], state)


def _bytes(_: _Unpickler, data: Any) -> bytes:
    if not isinstance(data, bytes):
        raise Refused("torch.storage._load_from_bytes of no bytes")
    return data


def _tensor(unpickler: _Unpickler, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A tensor of a nested stream of torch.save, which holds one storage; a view of its bytes."""
    if not isinstance(storage, bytes):
        raise Refused("a tensor without its storage")
    flat = _storage(unpickler, storage)
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or len(size) > 8 or any(type(n) is not int or n < 0 for n in numbers):
        raise Refused("a tensor of an impossible shape")
    count = 1
    for n in size:
        count *= n
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > flat.numel() or (count and last >= flat.numel()):
        raise Refused(f"a tensor of {count} numbers whose storage has {flat.numel()}")
    return flat.as_strided(size, stride, offset)


def _storage(unpickler: _Unpickler, data: bytes) -> Tensor:
    """The numbers of a storage as torch.save wrote it before zip archives: five pickles, a count, the raw values."""
    stream = io.BytesIO(data)

    def following() -> Any:
        return _Unpickler(stream, unpickler).load()

    if following() != TORCH_MAGIC or following() != TORCH_PROTOCOL:
        raise Refused("a storage of another format than torch.save's")
    following()  # the machine that wrote it; the values below are little-endian
    reference, keys = following(), following()
    if not isinstance(reference, _StorageReference) or keys != [reference.key]:
        raise Refused("a stream of torch.save that is no single storage")
    start = stream.tell() + 8
    count = int.from_bytes(data[start - 8 : start], "little")
    wanted = reference.numel * reference.dtype.itemsize
    if count != reference.numel or len(data) - start != wanted:
        raise Refused(f"a storage of {reference.numel} numbers in {max(0, len(data) - start)} bytes")
    if not count:
        return torch.empty(0, dtype=reference.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody writes to these tensors
        return torch.frombuffer(data, dtype=reference.dtype, offset=start, count=count)


def _parameter(_: _Unpickler, tensor: Any, *rest: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise Refused("a parameter that is no tensor")
    return tensor


def _mapping(_: _Unpickler, *arguments: Any) -> dict[str, Any]:
    pairs = arguments[0] if arguments else []
    if len(arguments) > 1 or not isinstance(pairs, (list, dict)):
        raise Refused("a dict of something else")
    items: Iterable[Any] = pairs.items() if isinstance(pairs, dict) else pairs
    return {_plain(key): value for key, value in items}


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
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch.storage._load_from_bytes": _bytes,
        "torch.Size": _size,
        "torch.device": _inert("torch.device"),
        "collections.OrderedDict": _mapping,
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
