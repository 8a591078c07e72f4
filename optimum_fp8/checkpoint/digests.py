"""The digest of each tensor and the id of the save, in the record of the files: what is read is what was written.

A digest is the CRC-32 of dtype, shape and bytes: it tells flipped bits, tensors that changed places, and files of
different saves, and is computed faster than disks deliver. It tells nothing of who wrote a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from safetensors import safe_open

from ..errors import FP8CheckpointError
from ..formats import is_fp8, not_finite

RECORD = "optimum_fp8"  # the key of the metadata that holds the record
SAVE, DIGESTS, FILES, SELF = "save", "crc32", "files", "record"
UNKNOWN = "00000000"
_AGAIN = "copy the checkpoint again from where it was saved, or quantize the original model again"

One = TypeVar("One")
Other = TypeVar("Other")


def digest(tensor: torch.Tensor) -> str:
    """The digest of a tensor: eight hexadecimal digits; `UNKNOWN` for one that is on meta."""
    if tensor.is_meta:
        return UNKNOWN
    head = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if not tensor.numel():
        return f"{head:08x}"
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(data.data, head):08x}"


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The digest of each of some tensors, by name."""
    names = sorted(tensors)
    return dict(zip(names, _in_threads(lambda name: digest(tensors[name]), names), strict=True))


def sealed(tensors: Mapping[str, torch.Tensor], *said: Any) -> dict[str, Any]:
    """What the record of files says of the tensors in them: their digests, and an id of the save that follows from
    them and from what else is `said`, in JSON."""
    found = digests(tensors)
    return {SAVE: id_of(found, *said), DIGESTS: found}


def signed(record: Mapping[str, Any]) -> str:
    """A record as text, with an id of all in it but the digests, which may be filled in later."""
    said = json.loads(json.dumps(record))
    return json.dumps({**said, SELF: _id_of_record(said)})


def is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a record is as it was written; of one without an id of a save, which are older, nothing is known."""
    if not {SAVE, SELF} & record.keys():
        return True
    return bool(record.get(DIGESTS)) and record.get(SELF) == _id_of_record(record)


def _id_of_record(record: Mapping[str, Any]) -> str:
    return id_of({key: value for key, value in record.items() if key not in (DIGESTS, SELF)})


def id_of(*said: Any) -> str:
    """An id of what can be written as JSON: 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def check_digests(
    files: Sequence[str], records: Mapping[str, Mapping[str, Any]], told: Mapping[str, Any] | None = None
) -> None:
    """Refuse files of a checkpoint that do not hold what was saved together; of older ones nothing is known.

    Args:
        files: of weights; those that are no safetensors tell nothing.
        records: in them, by path.
        told: the record, where it is in none of them.

    Raises:
        FP8CheckpointError: names the tensor that is missing, new or damaged, or the file that is of another save.
    """
    if wrong := next(iter(differences(files, records, told)), None):
        name, what = wrong
        raise FP8CheckpointError(f"{name}: {what}; {_AGAIN}")


def differences(
    files: Sequence[str], records: Mapping[str, Mapping[str, Any]], told: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """What in some files is not as it was saved: a tensor or a file, and what is wrong with it; as `check_digests`."""
    files = [path for path in files if str(path).endswith(".safetensors")]
    said = [record for record in (told or {}, *(records.get(path, {}) for path in files)) if record.get(SAVE)]
    if not said:
        return []
    if wrong := _of_other_saves(files, records):
        return wrong
    known: dict[str, str] = {}
    for record in said:
        known |= record.get(DIGESTS, {})
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in files}
        names = {path: list(file.keys()) for path, file in opened.items()}
        pairs = [(path, name) for path, found in names.items() for name in found if known.get(name, UNKNOWN) != UNKNOWN]

        def damage(pair: tuple[str, str]) -> tuple[str, str] | None:
            path, name = pair
            return _damage(path, name, opened[path].get_tensor(name), known[name])

        damaged = [each for each in _in_threads(damage, pairs) if each]
    return _not_together(names, known, said[0].get(FILES)) + damaged


def _of_other_saves(files: Iterable[str], records: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    ids = {path: records[path][SAVE] for path in files if records.get(path, {}).get(SAVE)}
    first = next(iter(ids), "")
    others = [path for path, found in ids.items() if found != ids[first]]
    return [
        (path, f"is of another save than {os.path.basename(first)} ({ids[path]}, not {ids[first]}): files are mixed")
        for path in others
    ]


def _not_together(names: Mapping[str, Sequence[str]], known: Mapping[str, str], count: int | None) -> list[Any]:
    wrong, owners = [], dict[str, str]()
    for path, found in names.items():
        if found and not known.keys() & found:
            wrong.append((path, "says nothing of a save, or of none of its tensors, and was not saved with the rest"))
            owners |= dict.fromkeys(found, path)
            continue
        for name in found:
            if name in owners:
                wrong.append((name, f"is in {os.path.basename(owners[name])} and {os.path.basename(path)}"))
            elif name not in known:
                wrong.append((name, f"is in {path}, but was not saved with the rest"))
            owners[name] = path
    wrong += [(name, "was saved, and is in none of the files") for name in known if name not in owners]
    if count is not None and len(names) != count:
        listed = ", ".join(map(os.path.basename, names))
        wrong.append((listed, f"{len(names)} files of weights are there or in the index, of {count} that were saved"))
    return wrong


def _damage(path: str, name: str, tensor: torch.Tensor, expected: str) -> tuple[str, str] | None:
    if (found := digest(tensor)) == expected:
        return None
    nan = ", and holds codes that are NaN or Inf" if is_fp8(tensor.dtype) and not_finite(tensor) else ""
    what = f"in {path} is not what was saved (digest {found}, expected {expected}){nan}: it is damaged or was exchanged"
    return name, what


def _in_threads(step: Callable[[One], Other], items: Sequence[One]) -> list[Other]:
    """The results for all items in order; the digest of a large tensor leaves other threads running."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return list(pool.map(step, items))
