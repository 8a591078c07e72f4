"""Digests of tensors and the id of the save: what was damaged, exchanged or mixed is refused, by its name."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from moe_models import tiny_moe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM
from unsealed import unsealed

from optimum_fp8 import FP8Config, convert, export, load, quantize_files, save
from optimum_fp8.checkpoint.digests import UNKNOWN, digest, digests
from optimum_fp8.errors import FP8CheckpointError

DYNAMIC = {"activation_scheme": "dynamic", "target": "cpu"}
UP = "model.layers.0.mlp.up_proj"


def quantized(folder: Path, seed: int = 0, **options) -> Path:
    """A folder with a tiny model in FP8, of which `max_shard_size` tells the number of files."""
    torch.manual_seed(seed)
    original = tiny_llama(tie_word_embeddings=False).to(torch.bfloat16)
    original.save_pretrained(folder / f"original-{seed}")
    config = FP8Config(**DYNAMIC)
    model = AutoModelForCausalLM.from_pretrained(folder / f"original-{seed}", quantization_config=config)
    model.save_pretrained(folder / f"fp8-{seed}", **options)
    return folder / f"fp8-{seed}"


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def record(path: Path) -> dict:
    return json.loads(metadata(path)["optimum_fp8"])


def edit(path: Path, change) -> None:
    """Change the tensors of a file, and leave what it says of them."""
    tensors, kept = load_file(path), metadata(path)
    change(tensors)
    save_file(tensors, path, metadata=kept)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(FP8CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.core
def test_a_digest_is_the_crc_of_dtype_shape_and_bytes():
    tensor = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    expected = zlib.crc32(b"torch.float32 (2, 2)" + tensor.numpy().tobytes())
    assert digest(tensor) == f"{expected:08x}" == digest(tensor.t().contiguous().t())
    same_bytes = [tensor.view(torch.int32), tensor.view(4), tensor.t()]
    assert digest(tensor) not in map(digest, same_bytes) and len({*map(digest, same_bytes)}) == 3
    assert digest(torch.empty(0, 3)) != digest(torch.empty(3, 0)) and digest(torch.tensor(True)) != UNKNOWN
    assert digests({"b": tensor, "a": tensor.to("meta")}) == {"a": UNKNOWN, "b": digest(tensor)}


@pytest.mark.core
def test_each_file_says_what_is_in_all_of_them(tmp_path):
    folder = quantized(tmp_path, max_shard_size="10KB")
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert len(files) > 2 and "model.norm.weight" in tensors and "model.embed_tokens.weight" in tensors
    assert [record(path)["crc32"] for path in files] == [digests(tensors)] * len(files)
    assert len({record(path)["save"] for path in files}) == 1
    again = quantized(tmp_path / "again", max_shard_size="10KB")
    assert record(next(again.glob("*.safetensors")))["save"] == record(files[0])["save"]  # of the same content


@pytest.mark.parametrize(
    "name", [f"{UP}.weight", f"{UP}.weight_scale", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_a_flipped_bit_is_told_by_the_name_of_its_tensor(tmp_path, name):
    folder = quantized(tmp_path)
    edit(folder / "model.safetensors", lambda tensors: tensors[name].view(torch.uint8).flatten()[:1].bitwise_xor_(1))
    refused(folder, rf"^{name}: in .* is not what was saved")


def test_codes_that_are_nan_are_told(tmp_path):
    folder = quantized(tmp_path)
    edit(folder / "model.safetensors", lambda tensors: tensors[f"{UP}.weight"].view(torch.uint8)[0, 0].fill_(0x7F))
    refused(folder, rf"^{UP}.weight: .*holds codes that are NaN")


def test_tensors_that_changed_places_are_missing_or_new(tmp_path):
    folder, (one, other) = quantized(tmp_path), (f"{UP}.weight", "model.layers.0.mlp.gate_proj.weight")
    path = folder / "model.safetensors"
    edit(path, lambda tensors: tensors.update({one: tensors[other], other: tensors[one]}))
    refused(folder, rf"^{other}: in .* is not what was saved")
    edit(path, lambda tensors: tensors.update({one: tensors[other], other: tensors[one]}))
    assert AutoModelForCausalLM.from_pretrained(folder) is not None
    edit(path, lambda tensors: tensors.pop("model.norm.weight"))
    refused(folder, r"^model.norm.weight: was saved, and is in none of the files")
    edit(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.bfloat16)}))
    edit(path, lambda tensors: tensors.update({"model.norm2.weight": torch.ones(32)}))
    refused(folder, r"^model.norm2.weight: is in .*, but was not saved with the rest")


def test_files_of_two_saves_are_told(tmp_path):
    one, other = (quantized(tmp_path, seed, max_shard_size="10KB") for seed in (0, 1))
    name = sorted(path.name for path in one.glob("*.safetensors"))[1]
    (one / name).write_bytes((other / name).read_bytes())
    refused(one, rf"{name}: is of another save than model-00001-of-\d+.safetensors")
    tensors = load_file(one / name)
    save_file(tensors, one / name, metadata={"format": "pt"})  # a tool that keeps no metadata
    refused(one, r"is not what was saved")


def test_checkpoints_without_digests_load_as_before(tmp_path):
    folder = quantized(tmp_path)
    path = folder / "model.safetensors"
    before = metadata(path)
    save_file(load_file(path), path, metadata=unsealed(before))
    edit(path, lambda tensors: tensors[f"{UP}.weight"].view(torch.uint8).flatten()[:1].bitwise_xor_(1))
    assert AutoModelForCausalLM.from_pretrained(folder) is not None


def test_loading_in_another_dtype_or_for_another_target_changes_no_file(tmp_path):
    folder = quantized(tmp_path, max_shard_size="10KB")
    for options in ({"dtype": torch.float32}, {"quantization_config": FP8Config(target="gaudi2")}):
        assert AutoModelForCausalLM.from_pretrained(folder, **options) is not None
    offloaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path / "off"
    )
    assert offloaded.hf_device_map["lm_head"] == "disk"


def test_a_model_on_meta_reads_no_data(tmp_path):
    folder = quantized(tmp_path)
    edit(folder / "model.safetensors", lambda tensors: tensors[f"{UP}.weight_scale"].mul_(2))
    assert AutoModelForCausalLM.from_pretrained(folder, device_map="meta").lm_head.weight.is_meta
    with pytest.raises(FP8CheckpointError, match=rf"{UP}.weight_scale"):
        export(folder, tmp_path / "exported")


@pytest.mark.parametrize("kept", [None, ["experts"]])
def test_tensors_that_transformers_renames_and_splits_while_it_saves(tmp_path, kept):
    torch.manual_seed(0)
    model = convert(tiny_moe("mixtral").to(torch.bfloat16), FP8Config(**DYNAMIC, modules_to_not_convert=kept))
    model.save_pretrained(tmp_path / "fp8")
    path = tmp_path / "fp8" / "model.safetensors"
    assert record(path)["crc32"] == digests(load_file(path))
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in record(path)["crc32"]
    assert type(model).from_pretrained(tmp_path / "fp8") is not None


def test_a_state_dict_that_was_given(tmp_path):
    folder = quantized(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given["model.norm.weight"] += 1
    model.save_pretrained(tmp_path / "given", state_dict=given)
    path = tmp_path / "given" / "model.safetensors"
    assert record(path)["crc32"] == digests(load_file(path))
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "given").model.norm.weight, given["model.norm.weight"]
    )


@pytest.mark.parametrize("size", ["5GB", "1KB"])
def test_models_that_are_not_of_transformers(tmp_path, size):
    torch.manual_seed(0)
    make = lambda: torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 32))  # noqa: E731
    save(convert(make(), FP8Config(**DYNAMIC)), tmp_path / "fp8", max_shard_size=size)
    assert load(tmp_path / "fp8", make())(torch.ones(1, 32)).isfinite().all()
    path = sorted((tmp_path / "fp8").glob("*.safetensors"))[0]
    name = sorted(load_file(path))[0]
    edit(path, lambda tensors: tensors[name].view(torch.uint8).flatten()[:1].bitwise_xor_(1))
    with pytest.raises(FP8CheckpointError, match=rf"{name}: .* is not what was saved"):
        load(tmp_path / "fp8", make())


@pytest.mark.parametrize("size", ["5GB", "10KB"])
def test_files_that_were_quantized_without_the_model(tmp_path, size):
    torch.manual_seed(0)
    tiny_llama(tie_word_embeddings=False).to(torch.bfloat16).save_pretrained(tmp_path / "original")
    quantize_files(tmp_path / "original", tmp_path / "fp8", FP8Config(**DYNAMIC), max_shard_size=size)
    files = sorted((tmp_path / "fp8").glob("*.safetensors"))
    for path in files:
        assert record(path)["crc32"] == digests(load_file(path)) and record(path)["files"] == len(files)
    assert len({record(path)["save"] for path in files}) == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "fp8") is not None
    if len(files) > 1:
        index = tmp_path / "fp8" / "model.safetensors.index.json"
        said = json.loads(index.read_text())
        kept = {name: file for name, file in said["weight_map"].items() if file != files[-1].name}
        index.write_text(json.dumps({**said, "weight_map": kept}))
        refused(tmp_path / "fp8", rf"of {len(files)} that were saved")


def test_exported_files_say_what_is_in_them(tmp_path):
    export(quantized(tmp_path, max_shard_size="10KB"), tmp_path / "exported")
    files = sorted((tmp_path / "exported").glob("*.safetensors"))
    assert len(files) > 1 and all(record(path)["crc32"] == digests(load_file(path)) for path in files)
    assert len({record(path)["save"] for path in files}) == 1


def test_an_edited_model_configuration_is_told(tmp_path, caplog):
    folder = quantized(tmp_path)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "rms_norm_eps": 0.1}))
    AutoModelForCausalLM.from_pretrained(folder)
    assert "was edited (rms_norm_eps=0.1, saved was 1e-06)" in caplog.text


@pytest.mark.parametrize("key", ["quantize_lm_head", "fold_batch_norm"])
def test_an_edited_selection_is_refused(tmp_path, key):
    folder = quantized(tmp_path)
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"][key] = True
    (folder / "config.json").write_text(json.dumps(said))
    refused(folder, rf"was made with {key}=False")
