"""Files, their index and their headers: what is wrong with them is told, and the rest is read."""

from __future__ import annotations

import pytest
from verifying.conftest import UP, edit, edit_json, told

from optimum_fp8.errors import FP8CheckpointError
from optimum_fp8.verifying.opened import open_folder

INDEX = "model.safetensors.index.json"


def test_what_is_there(made):
    opened = open_folder(made["ours"])
    assert opened.method == "optimum_fp8" and len(opened.files) > 1 and not opened.findings
    assert opened.tensors[f"{UP}.weight"].shape == (1, 64, 32) and len(opened.records) == len(opened.files)
    with pytest.raises(FP8CheckpointError, match="is not a folder"):
        open_folder(made["ours"] / "config.json")


@pytest.mark.parametrize("name", ["ours", "compressed-tensors"])
def test_an_index_that_does_not_fit(copied, name):
    folder = copied(name)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    edit_json(folder, INDEX, lambda said: said["weight_map"].update({f"{UP}.weight": files[0], "odd": files[0]}))
    edit_json(folder, INDEX, lambda said: said["weight_map"].pop("model.norm.weight"))
    found = told(folder)
    assert any(f"{INDEX}: {UP}.weight: found '{files[0]}'" in each for each in found)
    assert any(f"odd: found nothing, though the index names it in {files[0]}" in each for each in found)
    assert any(f"{INDEX}: model.norm.weight: found no entry" in each for each in found)


def test_a_size_that_does_not_fit(copied):
    folder = copied("compressed-tensors")
    edit_json(folder, INDEX, lambda said: said["metadata"].update(total_size=1))
    assert any("metadata.total_size: found 1" in each for each in told(folder))


def test_files_that_are_absent_damaged_or_too_many(copied):
    folder = copied("compressed-tensors")
    one, *_, last = sorted(folder.glob("*.safetensors"))
    one.unlink()
    last.write_bytes(last.read_bytes()[:50])
    (folder / "extra.safetensors").write_bytes(b"")
    found = told(folder)
    assert any(f"{one.name}: found no such file" in each for each in found)
    assert any(f"{last.name}: found a damaged file" in each for each in found)
    assert any("warning: extra.safetensors: found a file that the index does not name" in each for each in found)


def test_configurations_that_cannot_be_read(copied):
    folder = copied("compressed-tensors")
    (folder / "config.json").write_text("{")
    assert any("config.json: found no JSON" in each for each in told(folder))
    (folder / "config.json").write_text('{"quantization_config": {}}')
    assert any("quant_method: found nothing" in each for each in told(folder))


def test_a_tensor_in_two_files(copied):
    folder = copied("compressed-tensors")
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": tensors[f"{UP}.weight"].clone()}))
    assert any("model.norm.weight: found the same in" in each for each in told(folder))


def test_a_folder_that_holds_no_checkpoint(tmp_path):
    (tmp_path / "quantization_config.json").write_text("{}")
    found = told(tmp_path)
    assert any(f"{tmp_path}: found no checkpoint: there are no files of weights" in each for each in found)
    assert any("give the folder that holds the weights" in each for each in found)
