"""A calibration that is broken off goes on where it was, and ends with the bytes of one that was not."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch
from tiny_models import tiny_llama

from optimum_fp8 import FP8Config, Measurements, calibrate, convert, finalize_calibration, prepare
from optimum_fp8.calibration import resume
from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.measure import kept_until_saved, measurements_path
from optimum_fp8.measure.partial import partial_path

torch.manual_seed(0)
BATCHES = [{"input_ids": torch.randint(3, 64, (1 + n % 2, 8 + n))} for n in range(5)]
WEIGHTS = {name: value.clone() for name, value in tiny_llama().state_dict().items()}


@pytest.fixture(autouse=True)
def saves_after_each_batch(monkeypatch):
    monkeypatch.setattr(resume, "INTERVAL", 0.0)
    monkeypatch.setattr(resume, "_LITTLE", 1e9)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # of which each takes long on a busy disk


@pytest.fixture
def prefix(tmp_path):
    return str(tmp_path / "ranges")


def prepared(prefix, **keys):
    model = tiny_llama()
    model.load_state_dict(WEIGHTS)
    return prepare(model, FP8Config(dump_stats_path=prefix, **{"attention": True, "decode_steps": 1, **keys}))


class Broken(Exception):
    pass


def broken_off(prefix, at, data=BATCHES, how=Broken, **keys):
    """A calibration that ends within the forward pass of a batch; how many forward passes there were before."""
    model = prepared(prefix, **keys)
    passes = []

    def forward(module, args):
        passes.append(args[0].shape)
        if args[0].shape[1] == data[at]["input_ids"].shape[1]:
            raise how

    model.model.layers[0].mlp.register_forward_pre_hook(forward)
    with pytest.raises(how):
        calibrate(model, model_config(prefix, data, **keys))
    return len(passes)


def model_config(prefix, data, **keys):
    return FP8Config(dataset=data, dump_stats_path=prefix, **{"attention": True, "decode_steps": 1, **keys})


def measured(prefix, data=BATCHES, **keys):
    """The bytes of a calibration's measurements, and how many batches went through the model."""
    model, batches = prepared(prefix, **keys), []
    model.model.embed_tokens.register_forward_hook(lambda *call: batches.append(call[1][0].shape[1] > 1))
    calibrate(model, model_config(prefix, data, **keys))
    finalize_calibration(model)
    with open(measurements_path(prefix), "rb") as file:
        return file.read(), sum(batches)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return measured(str(tmp_path_factory.mktemp("unbroken") / "ranges"))[0]


@pytest.mark.parametrize("at, how", [*((at, Broken) for at in range(5)), (2, KeyboardInterrupt)])
def test_broken_off_at_any_batch_it_ends_with_the_same_bytes(prefix, unbroken, tmp_path, at, how):
    broken_off(prefix, at, how=how)
    assert os.path.exists(partial_path(prefix)) == (at > 0)
    found, run = measured(prefix)
    assert found == unbroken
    assert run == 5 - at, "what was done is not done again"
    assert os.listdir(tmp_path) == ["ranges_measurements.safetensors"], "the file goes when its content was used"


def test_broken_off_again_and_again(prefix, unbroken):
    for at in (1, 2, 2, 4):
        broken_off(prefix, at)
    assert measured(prefix) == (unbroken, 1)


def test_broken_off_while_the_data_is_read(prefix, unbroken):
    def source():
        yield from BATCHES[:3]
        raise OSError("gone")

    model = prepared(prefix)
    with pytest.raises(OSError, match="gone"):
        calibrate(model, model_config(prefix, source()))
    assert measured(prefix, data=iter(BATCHES)) == (unbroken, 2), "a stream is read again, too"


def test_broken_off_after_the_last_batch(prefix, unbroken):
    calibrate(prepared(prefix), model_config(prefix, BATCHES))
    assert measured(prefix) == (unbroken, 0)


def test_more_samples_go_on_from_fewer(prefix, unbroken):
    calibrate(prepared(prefix), model_config(prefix, BATCHES, num_calibration_samples=3))
    assert measured(prefix) == (unbroken, 3)


@pytest.mark.parametrize("at", [1, 3])
def test_several_calibrations_of_one_model(tmp_path, at):
    def runs(prefix, broken=None):
        model, count = prepared(prefix), []
        model.model.embed_tokens.register_forward_hook(lambda *call: count.append(call[1][0].shape[1] > 1))
        calibrate(model, model_config(prefix, BATCHES[:2]))
        if broken is not None:
            broken_batches = [*BATCHES[2 : 2 + broken], {"input_ids": torch.full((1, 70), 99)}]
            with pytest.raises(ValueError, match="cannot be run"):
                calibrate(model, model_config(prefix, broken_batches))
            return None
        calibrate(model, model_config(prefix, BATCHES[2:]))
        return finalize_calibration(model).encoded(), sum(count)

    whole, _ = runs(str(tmp_path / "unbroken"))
    runs(str(tmp_path / "ranges"), broken=at)
    assert runs(str(tmp_path / "ranges")) == (whole, 3 - at)
    assert sorted(os.listdir(tmp_path)) == ["ranges_measurements.safetensors", "unbroken_measurements.safetensors"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"data": [{"input_ids": batch["input_ids"].flip(1)} for batch in BATCHES]}, "of other data"),
        ({"data": BATCHES[:2]}, "of other data"),
        ({"decode_steps": 2}, "of another configuration"),
        ({"measure_exclude": "NONE"}, "of another configuration"),
    ],
    ids=["values", "fewer batches", "decoding", "tensors"],
)
def test_the_file_of_another_calibration_is_not_used(prefix, tmp_path, caplog, change, reason):
    broken_off(prefix, 3)
    expected = measured(str(tmp_path / "other"), **change)
    with caplog.at_level(logging.WARNING):
        assert measured(prefix, **change) == expected, "all of its batches are run"
    assert f"{partial_path(prefix)} has measurements of a part" in caplog.text and reason in caplog.text


def test_the_file_of_another_model_is_kept(prefix, tmp_path, unbroken, caplog):
    broken_off(prefix, 3)
    other = prepare(tiny_llama(), FP8Config(dump_stats_path=prefix))
    with caplog.at_level(logging.WARNING):
        calibrate(other, FP8Config(dataset=BATCHES, dump_stats_path=prefix))
    assert "of another model" in caplog.text and "it is now" in caplog.text
    assert measured(prefix) == (unbroken, 2), "found where it is kept"


@pytest.mark.parametrize("content", [b"", b"x" * 100, None], ids=["empty", "noise", "cut"])
def test_a_file_that_cannot_be_read_is_kept_and_not_used(prefix, unbroken, tmp_path, content, caplog):
    broken_off(prefix, 3)
    with open(partial_path(prefix), "rb") as file:
        content = file.read()[:-9] if content is None else content
    with open(partial_path(prefix), "wb") as file:
        file.write(content)
    with caplog.at_level(logging.WARNING):
        assert measured(prefix) == (unbroken, 5)
    assert "not readable" in caplog.text
    kept = [name for name in os.listdir(tmp_path) if name.startswith("ranges_partial-")]
    assert len(kept) == 1 and (tmp_path / kept[0]).read_bytes() == content


def test_a_short_calibration_writes_nothing(prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "INTERVAL", 10.0)
    calibrate(prepared(prefix), model_config(prefix, BATCHES))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_warns_once_and_goes_on(tmp_path, unbroken, caplog):
    (tmp_path / "file").write_text("")
    prefix = str(tmp_path / "file" / "ranges")
    model = prepared(prefix)
    with caplog.at_level(logging.WARNING):
        calibrate(model, model_config(prefix, BATCHES))
    warnings = [record for record in caplog.records if "cannot be written" in record.message]
    assert len(warnings) == 1 and partial_path(prefix) in warnings[0].message
    convert(model)


def test_it_is_kept_until_a_checkpoint_is_saved(prefix):
    model = prepared(prefix)
    with pytest.raises(OSError), kept_until_saved():
        calibrate(model, model_config(prefix, BATCHES))
        convert(model)
        raise OSError("no space")
    assert os.path.exists(partial_path(prefix))
    model = prepared(prefix)
    with kept_until_saved():
        calibrate(model, model_config(prefix, BATCHES))
        convert(model)
        assert os.path.exists(partial_path(prefix))
    assert not os.path.exists(partial_path(prefix))


def test_a_conversion_that_fails_keeps_it(prefix):
    model = prepared(prefix, overrides={"down_proj": {"activation_scheme": "static"}})
    calibrate(model, model_config(prefix, BATCHES))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 100.0
    with pytest.raises(FP8MeasurementError, match="weights of the model have changed"):
        convert(model)
    assert os.path.exists(partial_path(prefix))


class Third:
    """Ends the calibration the third time it looks."""

    def __init__(self):
        self.looks = []

    def is_due(self, batches):
        return True

    def note(self, measurements, batches, samples):
        self.looks.append([batches, samples])
        return len(self.looks) == 3

    def state(self):
        return {"looks": self.looks}

    def restore(self, state):
        self.looks = list(state["looks"])


@pytest.mark.parametrize("at", [1, 2, None])
def test_checks_go_on_too(prefix, at):
    check = Third()
    if at is None:
        calibrate(prepared(prefix), model_config(prefix, BATCHES), checks=[check])
    else:
        broken = [*BATCHES[:at], {"input_ids": torch.full((1, 70), 99)}]
        with pytest.raises(ValueError, match="cannot be run"):
            calibrate(prepared(prefix), model_config(prefix, broken), checks=[check])
    again, model = Third(), prepared(prefix)
    calibrate(model, model_config(prefix, BATCHES), checks=[again])
    assert again.looks == [[1, 1], [2, 3], [3, 4]]
    assert finalize_calibration(model).samples == 4


def test_the_file_is_of_measurements_and_says_how_far_they_are(prefix):
    broken_off(prefix, 3)
    with open(partial_path(prefix), "rb") as file:
        measurements, notes = Measurements.decoded(file.read(), "it")
    assert measurements.samples == 4 == notes["part"]["samples"] and notes["part"]["batches"] == 3
    assert measurements.data == notes["part"]["data"]
    json.dumps(notes)
