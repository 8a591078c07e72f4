"""What a `.npz` file of INC's holds, read as data: it is one pickled object, and nothing of it is ever executed.

A pickle is a program for a small stack machine. The few instructions that numpy writes for dictionaries of arrays are
carried out here by hand, and names of functions are only ever compared with those that numpy writes for an array.
Whatever else a file asks for is refused by its name.
"""

from __future__ import annotations

import pickletools
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import FP8MeasurementError

_MEMBER = "arr_0.npy"
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # as numpy 1 and numpy 2 call it
_GLOBALS = {
    **{(module, "_reconstruct"): "array" for module in _MULTIARRAY},
    **{(module, "scalar"): "scalar" for module in _MULTIARRAY},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
}
_NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
_OBJECTS = ("O8", "O4", "O")
_DEPTH = 16  # of dictionaries and lists in each other; INC's have six
_UNFINISHED = object()
# What zipfile (RuntimeError: a password or a compression that it does not know), zlib, numpy and a program that makes
# no sense raise.
_DAMAGE = (
    *(OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(zipfile.BadZipFile, zlib.error),
)

_PUSHED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENTS = frozenset(
    [
        *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINFLOAT"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    ]
)
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Global:
    """One of the names that numpy writes."""

    means: str


@dataclass
class _DType:
    text: str
    order: str = "|"


@dataclass
class _Array:
    """An array, until all of it is there."""

    values: Any = None


@dataclass
class _Machine:
    """The stack machine of a pickle, as far as numpy makes use of it."""

    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, program: bytes) -> Any:
        """The object that a pickle describes."""
        for opcode, argument, position in pickletools.genops(program):
            if opcode.name == "STOP":
                return _finished(self.stack.pop())
            self._step(opcode.name, argument, position)
        raise ValueError("the pickle has no end")

    def _step(self, name: str, argument: Any, position: int | None) -> None:
        if name in ("PROTO", "FRAME"):
            return
        if name in _PUSHED:
            self.stack.append(_PUSHED[name])
        elif name in _ARGUMENTS:
            self.stack.append(argument)
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in _TUPLES:
            self.stack[-_TUPLES[name] :] = [tuple(self.stack[-_TUPLES[name] :])]
        elif name == "TUPLE":
            self.stack.append(tuple(self._marked()))
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            self._extend(name)
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(_global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.stack.pop(), self.stack.pop()
            self.stack.append(_global(module, attribute))
        elif name == "REDUCE":
            arguments, function = self.stack.pop(), self.stack.pop()
            self.stack.append(_called(function, arguments))
        elif name == "BUILD":
            state = self.stack.pop()
            _build(self.stack[-1], state)
        else:
            raise FP8MeasurementError(f"the instruction {name} at byte {position}")

    def _marked(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _extend(self, name: str) -> None:
        values = self._marked() if name.endswith("S") else self.stack[-1 if name == "APPEND" else -2 :]
        if not name.endswith("S"):
            del self.stack[-len(values) :]
        owner = self.stack[-1]
        if isinstance(owner, dict) and name.startswith("SETITEM"):
            owner.update(zip(values[::2], values[1::2], strict=True))
        elif isinstance(owner, list) and name.startswith("APPEND"):
            owner.extend(values)
        else:
            raise ValueError(f"{name} of {type(owner).__name__}")


def read_npz(path: str) -> Any:
    """The object that `numpy.savez(path, object)` wrote: dictionaries, lists, tuples, numbers, texts and arrays.

    Raises:
        FP8MeasurementError: the file is damaged, or holds anything else; the message names what.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if names != [_MEMBER]:
                raise ValueError(f"found {names[:4]}, expected {_MEMBER} alone")
            with archive.open(_MEMBER) as file:
                if (version := np.lib.format.read_magic(file)) != (1, 0):
                    raise ValueError(f"found version {version} of numpy's format, expected (1, 0)")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if not dtype.hasobject or shape != ():
                    raise ValueError(f"found an array of {dtype} and shape {shape}, expected one pickled object")
                program = file.read()
        return _Machine().run(program)
    except FP8MeasurementError as error:
        raise FP8MeasurementError(
            f"{path} holds {error}, which no measurements of INC hold: nothing of it was executed, and it is not read. "
            "Take the .json file beside it, or get the file from where it was measured"
        ) from None
    except _DAMAGE as error:
        raise FP8MeasurementError(
            f"{path} is no .npz file of INC's or is damaged ({error}): copy it again, or take the .json file beside it"
        ) from None


def _global(module: str, attribute: str) -> _Global:
    if (module, attribute) not in _GLOBALS:
        raise FP8MeasurementError(f"{module}.{attribute}")
    return _Global(_GLOBALS[module, attribute])


def _called(function: Any, arguments: Any) -> Any:
    """What numpy means by calling one of its names: an array that is still empty, a dtype, or a number."""
    means = function.means if isinstance(function, _Global) else ""
    if means == "array":
        return _Array()
    if means == "dtype":
        return _DType(str(arguments[0]))
    if means == "scalar":
        return np.frombuffer(arguments[1], _numpy_dtype(arguments[0]), count=1)[0].item()
    raise ValueError(f"a call of {means or type(function).__name__}")


def _build(owner: Any, state: Any) -> None:
    """Fill in a dtype, or an array: (version, shape, dtype, whether columns come first, bytes or objects)."""
    if isinstance(owner, _DType):
        owner.order = str(state[1])
        return
    if not isinstance(owner, _Array):
        raise ValueError(f"state of {type(owner).__name__}")
    _, shape, dtype, by_columns, content = state
    if dtype.text in _OBJECTS:
        if shape != ():
            raise ValueError(f"an array of objects of shape {shape}")
        owner.values = content[0]
        return
    flat = np.frombuffer(content, _numpy_dtype(dtype))
    owner.values = flat.reshape(shape, order="F" if by_columns else "C").copy()


def _numpy_dtype(dtype: _DType) -> np.dtype[Any]:
    if dtype.text not in _NUMBERS:
        raise ValueError(f"an array of {dtype.text!r}")
    return np.dtype((dtype.order if dtype.order in "<>" else "") + dtype.text)


def _finished(value: Any, known: dict[int, Any] | None = None, depth: int = 0) -> Any:
    """An object with arrays in the place of what they were made of; what is referred to often is made once."""
    known = {} if known is None else known
    if depth > _DEPTH:
        raise ValueError("the object is nested too deeply")
    if id(value) not in known:
        known[id(value)], made = _UNFINISHED, value
        if isinstance(value, _Array):
            made = _finished(value.values, known, depth + 1)
        elif isinstance(value, dict):
            made = {key: _finished(each, known, depth + 1) for key, each in value.items()}
        elif isinstance(value, (list, tuple)):
            made = type(value)(_finished(each, known, depth + 1) for each in value)
        known[id(value)] = made
    if known[id(value)] is _UNFINISHED:
        raise ValueError("the object holds itself")
    return known[id(value)]
