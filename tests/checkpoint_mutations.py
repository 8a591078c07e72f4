"""Everything that can be done to the files of a checkpoint: each mutation, what it damages, and how it is told."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "model.safetensors.index.json"
NAN, ALIGNMENT = 0x7F, 8
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Mutation:
    """A change of a copy of a checkpoint.

    Attributes:
        kind: of the change.
        where: the tensor, file or key that messages must name.
        change: makes it, in a folder.
    """

    kind: str
    where: str
    change: Change

    def __str__(self) -> str:
        return f"{self.kind} {self.where}"


def read_file(path: Path) -> tuple[dict[str, Any], bytearray]:
    """The header and the data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])


def write_file(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def of_file(name: str, edit: Callable[[dict[str, Any], bytearray], Any]) -> Change:
    """A change of a file's header or data."""

    def change(folder: Path) -> None:
        header, data = read_file(folder / name)
        edit(header, data)
        write_file(folder / name, header, bytes(data))

    return change


def of_json(name: str, edit: Callable[[dict[str, Any]], Any]) -> Change:
    def change(folder: Path) -> None:
        said = json.loads((folder / name).read_text())
        edit(said)
        (folder / name).write_text(json.dumps(said))

    return change


def without(header: dict[str, Any], data: bytearray, name: str) -> None:
    """Take a tensor out of a file, with its data."""
    start, end = header.pop(name)["data_offsets"]
    del data[start:end]
    for key, each in header.items():
        if key != "__metadata__" and each["data_offsets"][0] >= end:
            each["data_offsets"] = [place - (end - start) for place in each["data_offsets"]]


def fill(header: dict[str, Any], data: bytearray, name: str, values: bytes) -> None:
    start, end = header[name]["data_offsets"]
    data[start:end] = (values * (end - start))[: end - start]


def scale_of(header: dict[str, Any], data: bytearray, name: str, factor: float) -> None:
    start, end = header[name]["data_offsets"]
    data[start:end] = (np.frombuffer(data[start:end], np.float32) * np.float32(factor)).tobytes()


def flip(header: dict[str, Any], data: bytearray, name: str, at: int) -> None:
    data[at] ^= 1


def rename(header: dict[str, Any], data: bytearray, name: str) -> None:
    header[f"{name}_x"] = header.pop(name)


def update(header: dict[str, Any], data: bytearray, name: str, said: dict[str, Any]) -> None:
    header[name] |= said


def swap(header: dict[str, Any], data: bytearray, one: str, other: str) -> None:
    header[one]["data_offsets"], header[other]["data_offsets"] = (
        header[other]["data_offsets"],
        header[one]["data_offsets"],
    )


_OTHER_DTYPE = {"F8_E4M3": "F8_E5M2", "BF16": "F16", "F32": "I32", "I64": "F64"}


def of_tensors(folder: Path) -> Iterator[Mutation]:
    """Of each tensor in each file."""
    for path in sorted(folder.glob("*.safetensors")):
        header, data = read_file(path)
        file, names = path.name, [name for name in header if name != "__metadata__"]
        by_kind: dict[Any, list[str]] = {}
        for name in names:
            each = header[name]
            start, end = each["data_offsets"]

            def edited(edit: Callable[..., Any], *args: Any, file: str = file, name: str = name) -> Change:
                return of_file(file, lambda said, raw: edit(said, raw, name, *args))

            yield Mutation("drop", name, edited(without))
            yield Mutation(
                "rename", name, edited(lambda header, _, name: header.update({f"{name}_x": header.pop(name)}))
            )
            other = _OTHER_DTYPE[each["dtype"]]
            yield Mutation("dtype", name, edited(update, {"dtype": other}))
            shape = [*each["shape"][1:], each["shape"][0], 1] if each["shape"] else [1]
            yield Mutation("shape", name, edited(update, {"shape": shape}))
            middle = (start + end) // 2

            yield Mutation("flip", name, edited(flip, middle))
            if any(data[start:end]):
                yield Mutation("zero", name, edited(fill, b"\0"))
            if each["dtype"] == "F8_E4M3":
                yield Mutation("NaN codes", name, edited(fill, bytes([NAN])))
            elif each["dtype"] == "F32":
                yield Mutation("times 2", name, edited(scale_of, 2.0))
                yield Mutation("NaN", name, edited(scale_of, float("nan")))
                yield Mutation("negative", name, edited(scale_of, -1.0))
            kind = (each["dtype"], tuple(each["shape"]))
            for before in by_kind.get(kind, [])[-1:]:
                a, b = header[before]["data_offsets"], each["data_offsets"]
                if data[a[0] : a[1]] != data[b[0] : b[1]]:
                    yield Mutation("swap", name, edited(swap, before))
            by_kind.setdefault(kind, []).append(name)


def of_config(folder: Path) -> Iterator[Mutation]:
    """Of each key of `config.json`, and of the configuration of the quantization in it."""
    said = json.loads((folder / "config.json").read_text())
    for path in ((), ("quantization_config",)):
        inner = said if not path else said[path[0]]

        def edited(edit: Callable[[dict[str, Any]], Any], path: tuple[str, ...] = path) -> Change:
            return of_json("config.json", lambda said: edit(said[path[0]] if path else said))

        for key, value in inner.items():
            if key in ("transformers_version", "_name_or_path"):  # change nothing
                continue
            yield Mutation("remove key", key, edited(lambda said, key=key: said.pop(key)))
            new = _other(value)
            yield Mutation("edit key", key, edited(lambda said, key=key, new=new: said.update({key: new})))
        yield Mutation("add key", "odd_key", edited(lambda said: said.update(odd_key=1)))


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list):
        return [*value, "x"]
    return {"x": 1} if value is None or isinstance(value, dict) else None


def of_files(folder: Path, other: Path) -> Iterator[Mutation]:
    """Of whole files, of the index and of the record; `other`: another save of the same model."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    for name in files:
        size = (folder / name).stat().st_size
        for keep in (0, 4, 100, size // 2, size - 1):

            def cut(folder: Path, name: str = name, keep: int = keep) -> None:
                (folder / name).write_bytes((folder / name).read_bytes()[:keep])

            yield Mutation(f"truncate to {keep}", name, cut)
        yield Mutation("remove file", name, lambda folder, name=name: (folder / name).unlink())
        yield Mutation("shard of another save", name, lambda folder, name=name: _take(other, folder, name))
        yield Mutation(
            "record removed", name, of_file(name, lambda header, _: header["__metadata__"].pop("optimum_fp8"))
        )
        said = json.loads(read_file(folder / name)[0]["__metadata__"]["optimum_fp8"])
        for key in said:
            yield Mutation(
                "record without", f"{name} {key}", of_file(name, lambda header, _, key=key: _forget(header, key))
            )
        yield Mutation("shard not in the index", name, of_json(INDEX, lambda said, name=name: _leave_out(said, name)))
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    for name, file in weight_map.items():
        others = [each for each in files if each != file]
        moved = lambda said, name=name, others=others: said["weight_map"].update({name: others[0]})  # noqa: E731
        yield Mutation("moved in the index", name, of_json(INDEX, moved))
        yield Mutation("not in the index", name, of_json(INDEX, lambda said, name=name: said["weight_map"].pop(name)))
    added = lambda said: said["weight_map"].update({"odd.weight": files[0]})  # noqa: E731
    yield Mutation("new in the index", "odd.weight", of_json(INDEX, added))
    yield Mutation("no weight_map", "weight_map", of_json(INDEX, lambda said: said.pop("weight_map")))


def _take(other: Path, folder: Path, name: str) -> None:
    (folder / name).write_bytes((other / name).read_bytes())


def _forget_all(header: dict[str, Any], data: bytearray) -> None:
    header["__metadata__"].pop("optimum_fp8")


def _forget(header: dict[str, Any], key: str) -> None:
    said = json.loads(header["__metadata__"]["optimum_fp8"])
    said.pop(key)
    header["__metadata__"]["optimum_fp8"] = json.dumps(said)


def _leave_out(said: dict[str, Any], file: str) -> None:
    said["weight_map"] = {name: each for name, each in said["weight_map"].items() if each != file}
