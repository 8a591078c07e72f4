"""Folders that are whole or not there, and what is said where a disk is full or closed."""

from __future__ import annotations

import errno
import os

import pytest
from safetensors import SafetensorError

from optimum_fp8.checkpoint.whole_folder import explained, put_in_place, whole_folder
from optimum_fp8.errors import FP8CheckpointError


def test_nothing_is_there_until_the_end_or_after_an_error(tmp_path):
    target = tmp_path / "new" / "folder"
    with pytest.raises(KeyError), whole_folder(target) as folder:
        (target.parent / os.path.basename(folder) / "a").write_text("half", encoding="utf-8")
        raise KeyError
    assert list(target.parent.iterdir()) == []
    with whole_folder(target) as folder:
        assert not target.exists() and os.path.dirname(folder) == str(target.parent)
    assert target.is_dir() and target.stat().st_mode & 0o777 == 0o755
    with pytest.raises(FP8CheckpointError, match="exists: choose another folder"), whole_folder(target):
        pass


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_put_in_the_place_of_another(tmp_path, there):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a").write_text("new", encoding="utf-8")
    if there:
        (tmp_path / "place").mkdir()
        (tmp_path / "place" / "b").write_text("old", encoding="utf-8")
    put_in_place(str(tmp_path / "new"), str(tmp_path / "place"))
    assert [path.name for path in tmp_path.iterdir()] == ["place"] and os.listdir(tmp_path / "place") == ["a"]


def test_what_is_replaced_is_whole_until_the_new_one_is_in_its_place(tmp_path, monkeypatch):
    for name in ("new", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name, encoding="utf-8")
    monkeypatch.setattr("shutil.rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        put_in_place(str(tmp_path / "new"), str(tmp_path / "place"))
    assert (tmp_path / "place" / "a").read_text(encoding="utf-8") == "new"
    (aside,) = tmp_path.glob(".fp8-replaced-*")
    assert (aside / "place" / "a").read_text(encoding="utf-8") == "place"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "nothing of it is left; free some space"),
        (OSError(errno.EROFS, "Read-only file system"), "choose a folder that can be written to"),
        (SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), "free some space"),
    ],
)
def test_errors_of_the_disk_say_what_to_do(error, advice):
    expected = pytest.raises(FP8CheckpointError, match=f"^/data/out could not be written .*{advice}")
    with expected as raised, explained("/data/out"):
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "gone"), SafetensorError("invalid header")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)), explained("/data/out"):
        raise error
