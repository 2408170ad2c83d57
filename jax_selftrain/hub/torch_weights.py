"""PyTorch checkpoints (`pytorch_model.bin`), read without executing anything.

`torch.save` writes a zip container: the bytes of each storage, and `data.pkl`, a pickle that names them. A pickle is a
program, which can call any function. This reader knows only the instructions of a state dict: strings, numbers, tuples,
dicts, and the calls that rebuild a tensor or an `OrderedDict`. It refuses everything else by name and never imports or
calls what a file names.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from jax_selftrain.errors import InputError
from jax_selftrain.hub.weight_mapping import StoredTensor

MAX_PICKLE_BYTES = 2**27
"""Upper bound of `data.pkl`; a model with a million tensors needs less."""

_STORAGES = {
    "torch FloatStorage": ("F32", 4),
    "torch HalfStorage": ("F16", 2),
    "torch BFloat16Storage": ("BF16", 2),
    "torch DoubleStorage": ("F64", 8),
    "torch LongStorage": ("I64", 8),
    "torch IntStorage": ("I32", 4),
    "torch ShortStorage": ("I16", 2),
    "torch CharStorage": ("I8", 1),
    "torch ByteStorage": ("U8", 1),
    "torch BoolStorage": ("BOOL", 1),
}
"""Code of safetensors and bytes of an element, by storage class."""
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
_GLOBALS = frozenset({*_STORAGES, _DICT, _TENSOR, _PARAMETER})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"})
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Signature, and lengths of name and extra field, of a file in a zip container."""


@dataclass(frozen=True)
class _Global:
    """A class or function that a pickle names."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    itemsize: int
    key: str
    size: int
    """Number of elements."""


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _DamagedError(Exception):
    """The file does not have the structure of a state dict."""


def open_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Memory-map the tensors of a state dict that `torch.save` wrote.

    Raises:
      InputError: the file is damaged, not a zip container, or its pickle has an instruction, a class or a function that
        a state dict does not need (the message names it).
    """
    try:
        root, entries, pickle = _read_container(path)
        data = np.memmap(path, np.uint8, "r")
        found = _read_pickle(pickle, str(path))
        return {name: _locate(path, data, entries, root, tensor) for name, tensor in found.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except _DamagedError as error:
        raise InputError(f"{path}: is not a whole state dict of PyTorch ({error}); download it again") from error


def _read_container(path: Path) -> tuple[str, dict[str, zipfile.ZipInfo], bytes]:
    """Return the folder in the container, its entries by name, and `data.pkl`."""
    try:
        with zipfile.ZipFile(path) as container:
            entries = {entry.filename: entry for entry in container.infolist()}
            roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
            if len(roots) != 1 or len(entries) != len(container.infolist()):
                raise _DamagedError("it does not have one data.pkl and one entry of each name")
            (root,) = roots
            if entries[root + "data.pkl"].file_size > MAX_PICKLE_BYTES:
                raise _DamagedError(f"data.pkl has more than {MAX_PICKLE_BYTES:,} bytes")
            order = root + "byteorder"
            if order in entries and _read(container, entries[order]) != b"little":
                raise _DamagedError("its byte order is not little")
            return root, entries, _read(container, entries[root + "data.pkl"])
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:  # all of `zipfile`
        raise InputError(
            f"{path}: is not a zip container of PyTorch 1.6 or later ({error}); download it again, or convert it to "
            "safetensors where you trust it"
        ) from error


def _read(container: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    _check_stored(entry)
    return container.read(entry)


def _check_stored(entry: zipfile.ZipInfo) -> None:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
        raise _DamagedError(f"{entry.filename} is compressed or encrypted")


def _locate(
    path: Path, data: np.ndarray, entries: Mapping[str, zipfile.ZipInfo], root: str, tensor: _Tensor
) -> StoredTensor:
    """Return a tensor: a view of the file, if it is contiguous."""
    storage = tensor.storage
    entry = entries.get(f"{root}data/{storage.key}")
    if entry is None:
        raise _DamagedError(f"it has no storage {storage.key}")
    _check_stored(entry)
    header = data[entry.header_offset : entry.header_offset + _LOCAL_HEADER.size].tobytes()
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise _DamagedError(f"the header of {entry.filename} is missing")
    _, name, extra = _LOCAL_HEADER.unpack(header)
    start = entry.header_offset + _LOCAL_HEADER.size + name + extra
    stored = data[start : start + entry.file_size]
    size = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    if stored.size != storage.size * storage.itemsize or size > storage.size or (size and last >= storage.size):
        raise _DamagedError(f"storage {storage.key} has {stored.size:,} bytes, which its tensors do not fit")
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    moves = [(step, dense) for n, step, dense in zip(tensor.shape, tensor.stride, strides, strict=True) if n > 1]
    begin = tensor.offset * storage.itemsize
    values = stored[begin : begin + size * storage.itemsize]
    if any(step != dense for step, dense in moves):
        elements = stored[: storage.size * storage.itemsize].view(f"V{storage.itemsize}")
        index = np.zeros(tensor.shape, np.int64) + tensor.offset
        for axis, step in enumerate(tensor.stride):
            index += step * np.arange(tensor.shape[axis]).reshape([-1 if axis == n else 1 for n in range(index.ndim)])
        values = np.frombuffer(elements[index].tobytes(), np.uint8)
    return StoredTensor(path, storage.dtype, tensor.shape, values)


# ---------------------------------------------------------------- the pickle


def _read_pickle(data: bytes, where: str) -> dict[str, _Tensor]:
    """Return the tensors of a state dict by name."""
    try:
        found = _Machine(where).run(data)
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:  # of any sequence of bytes
        raise _DamagedError(f"data.pkl: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise _DamagedError("data.pkl holds no dict")
    for name, value in found.items():
        if not isinstance(value, _Tensor):
            raise InputError(f"{where}: {name} is not a tensor; give a state dict, as save_pretrained writes it")
    return cast(dict[str, _Tensor], found)


class _Machine:
    """Interpreter of the instructions of a state dict."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Return the value of a pickle."""
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in _TUPLES or name == "TUPLE":
            stack.append(tuple(self._pop(_TUPLES.get(name))))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            stack.append(self._find(argument))
        elif name == "STACK_GLOBAL":
            stack.append(self._find(" ".join(self._pop(2))))
        elif name == "BINPERSID":
            stack.append(self._find_storage(*stack.pop()))
        elif name == "REDUCE":
            function, arguments = self._pop(2)
            stack.append(self._call(function, arguments))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2 if name == "SETITEM" else None)
            self._update(stack[-1], items)
        elif name == "BUILD":
            state = stack.pop()  # attributes of an OrderedDict, such as `_metadata`
            if not isinstance(stack[-1], dict) or not isinstance(state, dict):
                raise TypeError("BUILD of something other than a dict")
        else:
            raise InputError(
                f"{self._where}: its pickle has the instruction {name}, which no state dict needs; refused"
            )

    def _pop(self, count: int | None) -> list[Any]:
        """Pop a number of values; None: those after the last mark."""
        start = self._marks.pop() if count is None else len(self._stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise IndexError("the stack is empty")
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _find(self, name: str) -> _Global:
        if name not in _GLOBALS:
            raise InputError(
                f"{self._where}: its pickle names {name.replace(' ', '.')!r}, which no state dict needs; refused, "
                "because unpickling it could run any code"
            )
        return _Global(name)

    @staticmethod
    def _find_storage(kind: str, storage: _Global, key: str, _location: str, size: int) -> _Storage:
        if kind != "storage" or not isinstance(key, str) or type(size) is not int or size < 0:
            raise ValueError("a persistent id is not that of a storage")
        return _Storage(*_STORAGES[storage.name], key, size)

    @staticmethod
    def _call(function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, _Global) else ""
        if name == _DICT and arguments == ():
            return {}
        if name == _PARAMETER:
            tensor = arguments[0]
        elif name == _TENSOR:
            storage, offset, shape, stride = arguments[:4]
            sizes = (offset, *shape, *stride)
            if len(shape) != len(stride) or not all(type(size) is int and size >= 0 for size in sizes):
                raise ValueError("a tensor has no valid shape")
            tensor = _Tensor(storage, offset, shape, stride) if isinstance(storage, _Storage) else None
        else:
            tensor = None
        if not isinstance(tensor, _Tensor):
            raise TypeError("a call rebuilds no tensor")
        return tensor

    @staticmethod
    def _update(target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
            raise TypeError("items are not values by name")
        target.update(zip(items[::2], items[1::2], strict=True))
