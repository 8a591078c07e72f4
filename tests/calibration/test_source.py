"""Finding the kind of calibration data, checking it early, and adding a kind from outside the package."""

from __future__ import annotations

from pathlib import Path

import datasets
import pandas
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from optimum_fp8 import FP8Config
from optimum_fp8.calibration import (
    SOURCES,
    FileSource,
    ModelFacts,
    Source,
    batch_size_of,
    check_dataset,
    register_source,
    tokenized,
)
from optimum_fp8.errors import FP8CalibrationError


@pytest.fixture
def outside(monkeypatch):
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr("optimum_fp8.calibration.source.SOURCES", list(SOURCES))


class Prompts:
    """A dataset of one's own; it is iterable too."""

    def __iter__(self):
        return iter(["a b", "c"])


@pytest.mark.core
def test_a_kind_of_ones_own(outside, load, ids, tokenizer):
    @register_source
    class PromptSource(Source):
        expected = "prompts"

        def accepts(self, dataset):
            return isinstance(dataset, Prompts)

        def check(self, dataset):
            if getattr(dataset, "broken", False):
                raise FP8CalibrationError("broken prompts")

        def batches(self, dataset, config, model):
            return tokenized(dataset, config, model)

    assert [ids(batch) for batch in load(Prompts(), tokenizer=tokenizer)] == [[[2, 3]], [[4]]]
    broken = Prompts()
    broken.broken = True
    with pytest.raises(FP8CalibrationError, match="broken prompts"):
        check_dataset(broken)
    with pytest.raises(FP8CalibrationError, match="type object cannot be used: expected prompts; .*a list of "):
        check_dataset(object())


def test_a_kind_of_file_of_ones_own(outside, load, ids, tmp_path, tokenizer):
    @register_source
    class CSV(FileSource):
        expected, suffixes = "the path of a .csv file", (".csv",)

        def texts(self, path, config):
            with open(path, encoding="utf-8") as file:
                yield from (line.split(",")[0] for line in file)

    (tmp_path / "data.CSV").write_text("a b,1\nc,2\n")
    assert [ids(batch) for batch in load(tmp_path / "data.CSV", tokenizer=tokenizer)] == [[[2, 3]], [[4]]]
    with pytest.raises(FP8CalibrationError, match=r"'data.csv' is not a file: expected a local file \(.csv, .*txt"):
        check_dataset("data.csv")


def test_the_latest_kind_is_asked_first(outside):
    class Every(Source):
        expected = "anything"

        def accepts(self, dataset):
            return True

        def batches(self, dataset, config, model):
            return iter(())

    first, second = (type(name, (Every,), {}) for name in ("First", "Second"))
    register_source(first)
    register_source(second)
    assert type(check_dataset(["a"])) is second


LOADER = DataLoader(torch.ones(2, 3))


@pytest.mark.core
@pytest.mark.parametrize(
    "dataset, kind",
    [
        (["a", "b"], "Strings"),
        (("a",), "Strings"),
        ([], "Batches"),
        (["a", 3], "Batches"),
        (LOADER, "Batches"),
        (iter(LOADER), "Batches"),
        ({1, 2}, "Batches"),
        (datasets.Dataset.from_dict({"text": ["a"]}), "HFDataset"),
        (datasets.Dataset.from_dict({"text": ["a"]})["text"], "HFDataset"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}), "HFDataset"),
        (pandas.DataFrame({"text": ["a"]}), "DataFrame"),
        (pandas.Series(["a"]), "DataFrame"),
        ([{"text": "a"}], "RowList"),
        ([[{"role": "user", "content": "a"}]], "RowList"),
        ([Path("a.png")], "Paths"),
        ([__file__], "Strings"),
        ("org/name", "Hub"),
        ("wikitext", "Hub"),
        ("tests", "Folder"),
        (datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), "HFDataset"),
        (lambda model: None, "Function"),
        (nn.Sequential(), "Function"),  # iterable too, but it can be called
    ],
)
def test_kinds(dataset, kind):
    assert type(check_dataset(dataset)).__name__ == kind
    assert sum(source.accepts(dataset) for source in SOURCES if not source.catch_all) == (kind != "Batches")


@pytest.mark.parametrize("dataset", [torch.ones(2), 3, b"text", None, object()])
def test_what_is_no_dataset(dataset):
    with pytest.raises(FP8CalibrationError) as error:
        check_dataset(dataset)
    said = str(error.value)
    assert said.startswith(f"dataset of type {type(dataset).__name__} cannot be used: expected ")
    assert said.endswith("; a DataLoader or another iterable of batches")
    assert [source.expected for source in SOURCES if source.expected not in said] == []


def test_checking_takes_nothing_from_a_stream():
    stream = iter([torch.ones(1, 2)])
    check_dataset(stream)
    assert len(list(stream)) == 1


@pytest.mark.core
@pytest.mark.parametrize(
    "dataset",
    [
        lambda: ["a"] * 10,
        lambda: datasets.Dataset.from_dict({"text": ["a"] * 10}),
        lambda: datasets.Dataset.from_dict({"input_ids": [[1]] * 10}),
        lambda: (torch.ones(1, 3) for _ in range(10)),
        lambda: DataLoader(torch.ones(10, 3), batch_size=1),
    ],
    ids=["texts", "Dataset of texts", "Dataset of inputs", "generator", "DataLoader"],
)
@pytest.mark.parametrize("samples, expected", [(3, 3), (10, 10), (100, 10)])
def test_num_calibration_samples(dataset, samples, expected, load, tokenizer):
    found = load(dataset(), num_calibration_samples=samples, tokenizer=tokenizer)
    assert sum(batch_size_of(batch) for batch in found) == expected


@pytest.mark.parametrize(
    "name, exists, message",
    [
        (
            "./wikitext",
            False,
            "'./wikitext' is not a file: expected a local file .*, a folder, or the name",
        ),
        ("a/b/c", False, "'a/b/c' is not a file"),
        ("org/texts.txt", False, "'org/texts.txt' is not a file"),
        ("text.txt", False, "'text.txt' is not a file: .*on the Hub"),
        ("data.jsonl", False, "'data.jsonl' is not a file"),
        ("data.csv.gz", False, "'data.csv.gz' is not a file"),
        ("data.xlsx", False, "'data.xlsx' is not a file"),
        ("data.xlsx", True, "suffix '.xlsx': expected .*.jsonl, .ndjson, .json"),
        ("data", True, "suffix '': expected .*txt"),
    ],
)
def test_paths_that_are_no_data(name, exists, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if exists:
        (tmp_path / name).write_text("a,b")
    with pytest.raises(FP8CalibrationError, match=message):
        check_dataset(name)


def test_batches_that_were_opened_can_be_closed(tokenizer):
    closed = []

    def stream():
        try:
            yield from ["a"] * 10
        finally:
            closed.append(True)

    config = FP8Config(dataset=stream(), tokenizer=tokenizer)
    batches = check_dataset(config.dataset).opened(config.dataset, config, ModelFacts())
    assert [next(batches)["input_ids"].tolist() for _ in range(2)] == [[[2]]] * 2
    batches.close()
    del batches, config
    assert closed == [True]


@pytest.mark.parametrize(
    "dataset", [{"input_ids": torch.ones(2, 8)}, BatchEncoding({"input_ids": [1]}), {"text": ["a"]}]
)
def test_one_batch_or_columns_are_refused_with_the_way_to_pass_them(dataset):
    with pytest.raises(FP8CalibrationError, match=r"with the keys \['(input_ids|text)'\].*\[dataset\].*from_dict"):
        check_dataset(dataset)
