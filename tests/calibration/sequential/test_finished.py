"""A calibration that was broken off is gone on with, by the same model, configuration and data only."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny_llama
from transformers import LlamaForCausalLM

from optimum_fp8 import FP8Config
from optimum_fp8.calibration.sequential.finished import FinishedParts
from optimum_fp8.calibration.sequential.walk import Walk


def saved(folder):
    """The bytes of all tensors of a checkpoint, and its metadata, which safetensors writes in no certain order."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key).view(torch.uint8).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 64, (2, 8), generator=generator)} for _ in range(2)]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_hidden_layers = 3
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.fixture
def load(folder, monkeypatch):
    """`load(break_at=None, seed=0, …)`: what is saved of the model, and the parts that were observed."""

    def load(break_at=None, seed=0, **keys):
        observed, to = {}, Walk.to

        def watched(self, batch, goal, **options):
            if goal == break_at and not options:
                raise KeyboardInterrupt
            if not options:  # those with `keep` are a look at the model
                observed[goal] = True
            return to(self, batch, goal, **options)

        options = {"calibration_inputs": "disk", "scale_method": "maxabs_arbitrary", **keys}
        config = FP8Config(
            dataset=data(seed), calibration="sequential", dump_stats_path=str(folder / "w" / "m"), **options
        )
        with monkeypatch.context() as patch:
            patch.setattr(Walk, "to", watched)
            model = LlamaForCausalLM.from_pretrained(folder / "model", quantization_config=config)
        model.save_pretrained(folder / "out")
        return saved(folder / "out"), list(observed)

    return load


def names(*numbers):
    return [f"model.layers.{number}" for number in numbers]


def broken_off(load, at, **keys):
    with pytest.raises(KeyboardInterrupt):
        load(f"model.layers.{at}", **keys)


def but_for_inputs(saved):
    """What was saved, but for where inputs were kept, which the record says, and what follows from that."""
    tensors, metadata = saved
    record = json.loads(metadata["optimum_fp8"])
    del record["config"]["calibration_inputs"], record["save"], record["record"]
    return tensors, record


def test_goes_on_and_ends_with_the_same_checkpoint(folder, load, caplog):
    expected, observed = load()
    assert observed == names(0, 1, 2)
    broken_off(load, 2)
    (work,) = (folder / "w" / "m_blocks").iterdir()
    assert json.loads((work / "finished.json").read_text())["finished"] == names(0, 1), "and no inputs are left"
    with caplog.at_level(logging.WARNING, logger="optimum_fp8"):
        found, observed = load(calibration_inputs="memory")
    assert observed == names(2) and but_for_inputs(found) == but_for_inputs(expected)
    assert any("going on after model.layers.1" in message for message in caplog.messages)
    assert not (folder / "w" / "m_blocks").exists()


@pytest.mark.parametrize("other", [{"seed": 1}, pytest.param({"input_backoff": 0.5}, marks=pytest.mark.slow)])
def test_another_calibration_starts_anew_and_leaves_it(folder, load, caplog, other):
    broken_off(load, 2)
    before = {path: path.read_bytes() for path in (folder / "w").rglob("*") if path.is_file()}
    with caplog.at_level(logging.WARNING, logger="optimum_fp8"):
        _, observed = load(**other)
    assert observed == names(0, 1, 2)
    assert any("not used" in message for message in caplog.messages)
    assert {path: path.read_bytes() for path in (folder / "w").rglob("*") if path.is_file()} == before


def test_another_model_starts_anew(folder, load):
    broken_off(load, 1)
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    model.model.layers[2].mlp.up_proj.weight.data.mul_(2)
    model.save_pretrained(folder / "model")
    assert load()[1] == names(0, 1, 2)


@pytest.mark.parametrize(
    "file", ["finished.json", pytest.param("finished_measurements.safetensors", marks=pytest.mark.slow)]
)
def test_damaged_files_are_not_used(folder, load, caplog, file):
    broken_off(load, 2)
    (work,) = (folder / "w" / "m_blocks").iterdir()
    content = (work / file).read_bytes()
    (work / file).write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING, logger="optimum_fp8"):
        assert load()[1] == names(0, 1, 2)
    assert any("cannot be read" in message and "starting anew" in message for message in caplog.messages)


@pytest.mark.slow
def test_ranges_of_a_part_that_was_broken_off_are_left_out(folder, load, monkeypatch):
    """A process that ends between the two files leaves ranges of a part that the manifest does not name."""
    expected, _ = load()
    add, calls = FinishedParts.add, []

    def broken(self, name):
        calls.append(name)
        if len(calls) == 2:
            monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        add(self, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FinishedParts, "add", broken)
        load()
    monkeypatch.undo()
    assert calls == names(0, 1)
    found, observed = load()
    assert observed == names(1, 2) and found == expected
