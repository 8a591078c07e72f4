"""Calibration data by its name on the Hub, which no test reaches."""

import datasets
import pytest
from tiny_models import tiny_llama

from optimum_fp8.calibration import ModelFacts, check_dataset, facts_of
from optimum_fp8.errors import FP8CalibrationError
from optimum_fp8.lifecycle import Origin

LLAMA = facts_of(tiny_llama())


@pytest.fixture
def hub(monkeypatch):
    """What `load_dataset` was called with, and which rows were read; it gives two splits."""
    calls, read = [], []

    def rows(split):
        for number in range(100):
            read.append(number)
            yield {"text": "a" if split == "train" else "b"}

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        splits = ("train", "test")
        streams = {name: datasets.IterableDataset.from_generator(rows, gen_kwargs={"split": name}) for name in splits}
        return datasets.IterableDatasetDict(streams)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls, read


@pytest.mark.core
def test_what_is_asked_of_the_hub(hub, load, ids, tokenizer):
    calls, read = hub
    model = ModelFacts(Origin("model", {"token": "secret"}), LLAMA.inputs)
    keys = {"dataset_config_name": "small", "dataset_revision": "v1", "dataset_split": "test"}
    found = load("org/name", model, tokenizer=tokenizer, num_calibration_samples=3, **keys)
    assert [ids(batch) for batch in found] == [[[3]]] * 3
    options = {"name": "small", "revision": "v1", "streaming": True, "token": "secret"}
    assert calls == [(("org/name",), options)] and len(read) == 3, "no more is read than needed"


def test_the_splits_are_listed(hub, load, tokenizer):
    with pytest.raises(FP8CalibrationError, match=r"'org/name' has the splits \['test', 'train'\]: set dataset_split"):
        load("org/name", LLAMA, tokenizer=tokenizer)


@pytest.mark.core
@pytest.mark.parametrize(
    "error, message",
    [
        (ConnectionError("no route\nto it"), r"cannot be reached \(no route\): pass local data, or run where"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub"),
            "dataset='org/name' cannot be read: Dataset 'org/name' doesn't exist",
        ),
        (
            ValueError("Config name is missing.\nPick one"),
            "cannot be read: Config name is missing.; set dataset_config",
        ),
    ],
    ids=["offline", "no such dataset", "no configuration"],
)
def test_what_the_hub_says_is_one_sentence(error, message, load, tokenizer, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(FP8CalibrationError, match=message) as raised:
        load("org/name", LLAMA, tokenizer=tokenizer)
    assert "\n" not in str(raised.value)


def test_offline(load, tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FP8CalibrationError, match=r"dataset='org/name' is neither a local file .* cannot be reached"):
        load("org/name", LLAMA, tokenizer=tokenizer)


def test_nothing_is_asked_while_the_kind_is_found(hub):
    assert type(check_dataset("org/name")).__name__ == "Hub" and hub == ([], [])
