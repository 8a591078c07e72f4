"""Paths and data are looked at before weights are read: what is wrong with them costs no time."""

from __future__ import annotations

import datasets
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config
from optimum_fp8.errors import FP8CalibrationError, FP8ConfigError, FP8MeasurementError
from optimum_fp8.lifecycle.state import state_of

from .conftest import llama

ROWS = datasets.Dataset.from_dict({"text": ["a"]})


@pytest.fixture
def folder(save, tokenizer, monkeypatch) -> str:
    """A model with a tokenizer, the weights of which must not be read."""
    folder = save(llama())
    tokenizer.save_pretrained(folder)

    def read(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr("transformers.PreTrainedModel._load_pretrained_model", read)
    return folder


def load(folder, **keys):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FP8Config(**keys))


@pytest.mark.core
@pytest.mark.parametrize("mode", ["AUTO", "MEASURE"])
@pytest.mark.parametrize(
    "dataset, keys, message",
    [
        ("empty.txt", {}, r"the dataset='.*empty.txt' is empty"),
        ("blank.jsonl", {}, r"the dataset='.*blank.jsonl' is empty"),
        ("lines.jsonl", {"text_column": "body"}, r"line 1 has the columns \['text'\], and none is 'body'.*set text"),
        (["", " "], {}, "the dataset is empty"),
        (datasets.Dataset.from_dict({"body": ["a"]}), {}, r"columns \['body'\].*set text_column"),
        (datasets.Dataset.from_dict({"text": []}), {}, "the dataset is empty"),
        ((batch for batch in ()), {}, "the dataset is empty"),
        ("lines.jsonl", {}, "lines.jsonl, line 2, column 'text' is None, not text"),
        (["a"] * 9 + [None], {}, "sample 9, column 'text' is None, not text"),
        (
            [{"image": Image.new("RGB", (8, 8))}],
            {},
            "has images in 'image', which the model does not take: exp",
        ),
        ([{"prompt": "a", "completion": "b"}], {}, "column 'prompt' holds conversations, and .* has no chat template"),
        (datasets.DatasetDict(one=ROWS, two=ROWS), {}, r"has the splits \['one', 'two'\]: set dataset_split"),
        (
            (batch for batch in ()),
            {"shuffle_calibration_samples": True},
            "shuffle_calibration_samples=True does not go",
        ),
        (lambda model: None, {"shuffle_calibration_samples": True}, "shuffle_calibration_samples=True does not go"),
        (["a"], {"dataset_split": "train"}, "dataset_split='train' does not go with a list of strings"),
        ("./folder", {}, "dataset='./folder' is not a file"),
        (["a"], {"tokenizer": "./nowhere"}, r"no tokenizer at './nowhere' \(.*pass tokenizer="),
    ],
)
def test_data(folder, tmp_path, mode, dataset, keys, message):
    for name, content in {
        "empty.txt": "",
        "blank.jsonl": "\n\n",
        "lines.jsonl": '{"text": "a"}\n{"text": null}\n',
    }.items():
        (tmp_path / name).write_text(content)
    if isinstance(dataset, str) and not dataset.startswith("."):
        dataset = str(tmp_path / dataset)
    with pytest.raises(FP8CalibrationError, match=message):
        load(folder, dataset=dataset, mode=mode, dump_stats_path=str(tmp_path / "ranges"), **keys)


def test_a_model_without_a_tokenizer(save, folder):
    with pytest.raises(FP8CalibrationError, match=r"no tokenizer at '.*bare' \(.*pass tokenizer="):
        load(save(llama(), name="bare"), dataset=["a"])


@pytest.mark.core
@pytest.mark.parametrize("place", ["file/ranges", "file/deep/er/ranges", "/proc/nowhere/ranges"])
def test_measurements_that_cannot_be_written(folder, tmp_path, place, batches):
    (tmp_path / "file").write_text("")
    with pytest.raises(FP8ConfigError, match=r"dump_stats_path='.*ranges' cannot take the measurements: .*(file|proc)"):
        load(folder, dataset=batches, mode="MEASURE", dump_stats_path=str(tmp_path / place))


def test_a_folder_where_the_measurements_should_be(folder, tmp_path, batches):
    (tmp_path / "ranges_measurements.safetensors").mkdir()
    with pytest.raises(FP8ConfigError, match="dump_stats_path=.*is a folder"):
        load(folder, dataset=batches, mode="MEASURE", dump_stats_path=str(tmp_path / "ranges"))


def test_nothing_is_left_where_it_was_tried(folder, tmp_path, batches):
    with pytest.raises(AssertionError, match="weights are read"):
        load(folder, dataset=batches, mode="MEASURE", dump_stats_path=str(tmp_path / "deep" / "ranges"))
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("mode, there, message", [("QUANTIZE", False, "no measurements at"), ("AUTO", True, "damaged")])
def test_measurements_that_cannot_be_used(folder, tmp_path, mode, there, message):
    if there:
        (tmp_path / "ranges_measurements.safetensors").write_bytes(b"x")
    with pytest.raises(FP8MeasurementError, match=message):
        load(folder, mode=mode, dump_stats_path=str(tmp_path / "ranges"))


@pytest.fixture
def launched(monkeypatch):
    """This process is one of two, by the launcher's word, and the other is not there."""
    PartialState(cpu=True)  # made before, for this process alone
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.core
@pytest.mark.parametrize("keys", [{"mode": "MEASURE"}, {"mode": "AUTO"}, {"activation_scheme": "static"}], ids=str)
def test_other_processes_that_cannot_be_reached(launched, folder, tmp_path, batches, keys):
    dataset = None if "activation_scheme" in keys else batches
    with pytest.raises(FP8CalibrationError, match="one of 2 processes, .* cannot be reached"):
        load(folder, dataset=dataset, dump_stats_path=str(tmp_path / "ranges"), **keys)


def test_processes_without_calibration_need_no_others(launched, folder):
    with pytest.raises(AssertionError, match="weights are read"):
        load(folder, activation_scheme="dynamic")


@pytest.mark.core
def test_what_was_looked_at_is_used_and_no_sample_is_lost(save, batches):
    taken = []

    def stream():
        for batch in batches:
            assert torch.empty(0).device.type == "cpu" and torch.get_default_dtype() == torch.float32
            taken.append(batch)
            yield batch

    measured = state_of(load(save(llama()), dataset=stream())).measurements
    assert len(taken) == len(batches) and measured.samples == sum(len(batch["input_ids"]) for batch in batches)
    assert measured.data == state_of(load(save(llama(), name="again"), dataset=batches)).measurements.data


def test_data_that_call_the_model_are_not_called_before(save):
    def run(model):
        assert not any(parameter.is_meta for parameter in model.parameters())
        model(torch.ones(1, 4, dtype=torch.long))

    assert state_of(load(save(llama()), dataset=run)).phase == "converted"
