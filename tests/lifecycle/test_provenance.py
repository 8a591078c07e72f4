"""What made an FP8 model: what conversion remembers of itself."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest
import torch

from optimum_fp8 import FP8Config, calibrate, convert, finalize_calibration, prepare
from optimum_fp8.lifecycle import loaded_for, name_of_data, provenance_in, state_of, with_change
from optimum_fp8.lifecycle.provenance import today, versions

DYNAMIC = FP8Config(activation_scheme="dynamic", target="gaudi3", blocklist={"names": ["1"], "types": []})


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))


def test_versions_day_and_what_was_left_out():
    made = provenance_in(convert(net(), DYNAMIC))
    assert made == {"made_with": versions(), "date": today(), "skipped": {"1": made["skipped"]["1"]}}
    assert "blocklist" in made["skipped"]["1"]
    assert versions()["torch"] == torch.__version__ and versions()["transformers"] == version("transformers")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", today())


def test_a_loop_of_the_callers_is_told_from_a_dataset_and_from_measurements(tmp_path):
    static = FP8Config(activation_scheme="static", target="cpu", dump_stats_path=str(tmp_path / "m"))
    model = prepare(net(), static)
    model(torch.ones(2, 8))
    finalize_calibration(model)
    convert(model)
    by_hand = provenance_in(model)["data"]
    assert by_hand["source"] == "a loop of the caller's" and by_hand["observer"] == "maxabs"
    assert by_hand["model_fingerprint"] == state_of(model).measurements.fingerprint
    stored = provenance_in(convert(net(), static))["data"]
    assert stored == {**by_hand, "source": "measurements"}
    model = prepare(net(), static.replace(dataset=[torch.ones(2, 8), torch.ones(3, 8)], num_calibration_samples=5))
    calibrate(model)
    data = provenance_in(convert(model))["data"]
    assert data["source"] == "list" and data["samples"] == 5 and len(data["fingerprint"]) == 32
    assert "tokens" not in data  # they are none


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("/data/secret/rows.jsonl", "rows.jsonl"),
        ("./rows.jsonl", "rows.jsonl"),
        ("/data/folder/", "folder"),
        ("Salesforce/wikitext", "Salesforce/wikitext"),
        ([1], "list"),
    ],
    ids=str,
)
def test_data_are_called_by_a_name_and_never_by_a_path(dataset, name):
    assert name_of_data(dataset) == name


def test_a_relative_path_that_is_there_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows.txt").write_text("a")
    assert name_of_data("folder/rows.txt") == "rows.txt"


def test_changes_are_added_at_the_end():
    first = with_change({"date": "2026-01-01"}, "one", of=3)
    both = with_change(first, "two")
    assert [each["what"] for each in both["changes"]] == ["one", "two"] and first["changes"][0]["of"] == 3
    assert both["date"] == "2026-01-01" and both["changes"][1]["made_with"] == versions()


def test_another_target_is_a_change_and_the_same_is_none():
    assert loaded_for({"date": "x"}, "gaudi2", "gaudi2") == {"date": "x"}
    (change,) = loaded_for({"date": "x"}, "gaudi2", "gaudi3")["changes"]
    assert (change["before"], change["target"]) == ("gaudi2", "gaudi3")
    assert loaded_for({}, "gaudi2", "gaudi3") == {}  # of a checkpoint that tells nothing


def test_a_model_in_high_precision_or_being_measured_has_none():
    model = net()
    assert provenance_in(model) == {}
    prepare(model, FP8Config(activation_scheme="static", target="cpu"))
    assert provenance_in(model) == {}
    assert provenance_in(torch.nn.Sequential(convert(net(), DYNAMIC)))["made_with"] == versions()
