"""npz files of INC's are data: what numpy writes is read, and whatever else a pickle may ask for is refused by name."""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.measure.inc import FileName, read_file
from optimum_fp8.measure.inc.unpickled import read_npz

TREE = {
    "LocalRank": 3,
    "Mode": "DynamicRange",
    "Long": "x" * 300,
    "Big": 1 << 40,
    "Floats": [1.5, -0.0],
    "None": None,
    "Flags": (True, False),
    "Nodes": {
        "a": {"inputs": [np.array([[4.5]], np.float32)], "outputs": (np.float32(2.5), np.float64(0.25))},
        "b": {"params": {"weight": {0: np.arange(300, dtype=np.float32), 1: np.asfortranarray(np.eye(3)[:, :2])}}},
        "empty": {"inputs": [], "params": {}, "half": np.array([1, 2], np.float16), "int": np.array([7], ">i4")},
    },
}


def write(path, program: bytes) -> str:
    """A file of numpy's around a pickle."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", head.getvalue() + program)
    return str(path)


def pickled(value, protocol=4) -> bytes:
    array = np.empty((), dtype=object)
    array[()] = value
    return pickle.dumps(array, protocol=protocol)


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one == other and isinstance(other, (str, int, float, bool, type(None)))


@pytest.mark.core
def test_what_numpy_writes(tmp_path):
    np.savez(tmp_path / "m.npz", TREE)
    assert same(TREE, read_npz(str(tmp_path / "m.npz")))


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("numpy", [1, 2])
def test_the_spellings_of_both_numpys(tmp_path, protocol, numpy):
    old, new = b"numpy.core.multiarray", b"numpy._core.multiarray"
    program = pickled(TREE, protocol)
    if numpy == 1 and protocol == 3:  # GLOBAL has no length before its names
        program = program.replace(new, old)
    elif numpy == 1:  # in place, so that the lengths of frames stay true
        program = program.replace(bytes([len(new)]) + new, bytes([len(old)]) + old)
    assert (new if numpy == 2 else old) in program
    assert same(TREE, read_npz(write(tmp_path / "m.npz", program)))


class _Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.core
@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("where", ["alone", "in a node"])
def test_nothing_is_executed(tmp_path, protocol, where):
    mark = tmp_path / "executed"
    bomb = _Runs(os.mkdir, str(mark))
    program = pickle.dumps(bomb, protocol) if where == "alone" else pickled({"Nodes": {"a": bomb}}, protocol)
    path = write(tmp_path / "m.npz", program)
    with pytest.raises(FP8MeasurementError, match=r"m\.npz (holds|is no \.npz)"):
        read_npz(path)
    assert not mark.exists()
    pickle.loads(program)
    assert mark.exists(), "it would have been"


@pytest.mark.parametrize(
    ("bomb", "named"),
    [
        (_Runs(os.system, "true"), r"posix\.system"),
        (_Runs(eval, "1"), r"builtins\.eval"),
        (_Runs(np.load, "x"), r"numpy\.load"),
        (np.memmap, r"numpy\.memmap"),
        (np.datetime64("2020-01-01"), "array of 'M8'"),
        (np.array(["text"]), "array of 'U4'"),
        (np.array([1, None], dtype=object), r"objects of shape \(2,\)"),
        ({1, 2}, "EMPTY_SET"),
        (_Runs(np.ndarray, (1 << 40,)), "a call of ndarray"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_is_named(tmp_path, bomb, named):
    with pytest.raises(FP8MeasurementError, match=named):
        read_npz(write(tmp_path / "m.npz", pickled({"a": bomb})))


def _itself():
    value: list = []
    value.append(value)
    return value


def _laughs(depth):
    value: object = [0.0] * 8
    for _ in range(depth):
        value = [value] * 8
    return value


def test_nesting_without_end(tmp_path):
    with pytest.raises(FP8MeasurementError, match="holds itself"):
        read_npz(write(tmp_path / "m.npz", pickled(_itself())))
    read_npz(write(tmp_path / "n.npz", pickled(_laughs(12))))  # 8 ** 13 values, each list of which is made once
    laughs = {"Mode": "DynamicRange", "Nodes": {"a": {"inputs": _laughs(9)}}}
    write(tmp_path / "n_hooks_maxabs.npz", pickled(laughs))
    with pytest.raises(FP8MeasurementError, match="lists around each other"):
        read_file(FileName(str(tmp_path / "n")))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"notes of a colleague"),
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: write(path, pickled(TREE)[:-40]),
        lambda path: write(path, b"."),
        lambda path: write(path, b"\x80\x04]h\x07."),
        lambda path: np.savez(path, np.ones(3)),
        lambda path: np.savez(path, a=TREE, b=TREE),
        lambda path: path.mkdir(),
    ],
    ids=["text", "short", "short pickle", "nothing", "no such memory", "array", "two members", "folder"],
)
def test_damaged_files(tmp_path, spoil):
    path = tmp_path / "m.npz"
    if spoil is not None:
        path.touch()
        if "mkdir" in spoil.__code__.co_names:
            path.unlink()
        else:
            np.savez(path, TREE)
        spoil(path)
    with pytest.raises(FP8MeasurementError, match="m.npz is no .npz file of INC's or is damaged"):
        read_npz(str(path))


@pytest.mark.parametrize(("at", "value"), [(6, 1), (8, 99), (4, 200)], ids=["encrypted", "compression", "version"])
def test_an_archive_that_cannot_be_opened(tmp_path, at, value):
    np.savez(tmp_path / "m.npz", TREE)
    data = bytearray((tmp_path / "m.npz").read_bytes())
    for start in (data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02") + 2):
        data[start + at] = value
    (tmp_path / "m.npz").write_bytes(data)
    with pytest.raises(FP8MeasurementError, match="damaged"):
        read_npz(str(tmp_path / "m.npz"))
