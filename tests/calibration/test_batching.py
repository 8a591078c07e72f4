"""From samples to batches: tokenizing, padding, cutting, counting."""

import datasets
import pytest
import torch

from optimum_fp8 import FP8Config
from optimum_fp8.calibration import ModelFacts, batch_size_of, check_dataset, groups
from optimum_fp8.errors import FP8CalibrationError
from optimum_fp8.lifecycle import Origin

TEXTS = ["a b c", "b", "c c c c", "a"]


@pytest.mark.parametrize("limit, tokens", [(1, [1, 1, 1, 1]), (3, [3, 1, 3, 1]), (100, [3, 1, 4, 1])])
def test_max_seq_length(limit, tokens, load, tokenizer):
    found = load(TEXTS, tokenizer=tokenizer, max_seq_length=limit)
    assert [batch["input_ids"].shape[1] for batch in found] == tokens


@pytest.mark.core
def test_batches_are_padded_and_say_where(load, tokenizer):
    first, second = load(TEXTS[:3], tokenizer=tokenizer, batch_size=2)
    assert first["input_ids"].shape == (2, 3) and second["input_ids"].shape == (1, 4)
    assert first["attention_mask"].sum(1).tolist() == [3, 1]


def test_blank_texts_are_left_out(load, tokenizer):
    assert len(load(["", "a b", "  \n"], tokenizer=tokenizer)) == 1


def test_blank_texts_do_not_count_as_samples(load, ids, tokenizer):
    found = load(["", "a", "", "b", "c"], tokenizer=tokenizer, num_calibration_samples=2)
    assert [ids(batch) for batch in found] == [[[2]], [[3]]]


def test_a_tokenizer_in_a_folder(tmp_path, load, ids, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    assert ids(load(["a b"], tokenizer=str(tmp_path))[0]) == [[2, 3]]
    assert ids(load(["a b"], ModelFacts(Origin(str(tmp_path))))[0]) == [[2, 3]], "or beside the model"


def test_a_processor_tokenizes_where_there_is_no_tokenizer(load, ids, tokenizer):
    assert ids(load(["a b"], processor=tokenizer)[0]) == [[2, 3]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "needs a tokenizer and the model has no path.*pass tokenizer="),
        ({"tokenizer": "./nowhere"}, "no tokenizer at './nowhere'.*pass tokenizer="),
    ],
    ids=["none", "bad path"],
)
def test_no_tokenizer(options, message, load):
    with pytest.raises(FP8CalibrationError, match=message):
        load(["a"], **options)


def test_a_tokenizer_that_cannot_pad(load, tokenizer_without_padding):
    with pytest.raises(FP8CalibrationError, match="batch_size=2 needs padding, but the tokenizer has no pad_token"):
        load(["a"], batch_size=2, tokenizer=tokenizer_without_padding)
    assert len(load(["a"], batch_size=1, tokenizer=tokenizer_without_padding)) == 1


def test_groups():
    assert list(groups("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]] and list(groups("", 2)) == []


@pytest.mark.parametrize(
    "batch, size",
    [
        (torch.ones(3, 2), 3),
        (torch.tensor(1.0), 1),
        ({"x": torch.ones(4, 1)}, 4),
        ({"use_cache": False, "x": torch.ones(4, 1)}, 4),
        ((torch.ones(5, 1), torch.ones(5)), 5),
        ([], 1),
        ({}, 1),
    ],
)
def test_size_of_a_batch(batch, size):
    assert batch_size_of(batch) == size


FEW = {
    "list": lambda: ["a"] * 3,
    "stream": lambda: iter(["a"] * 3),
    "batches": lambda: [{"input_ids": torch.ones(3, 2, dtype=torch.long)}],
    "Dataset": lambda: datasets.Dataset.from_dict({"text": ["a", "", "b", "c"]}),
}


@pytest.mark.core
@pytest.mark.parametrize("kind", FEW)
def test_too_few_samples_are_said_with_both_numbers(kind, load, tokenizer, caplog):
    load(FEW[kind](), tokenizer=tokenizer, num_calibration_samples=5)
    assert caplog.text.count("num_calibration_samples=5, and the dataset has 3 samples: all of them are used") == 1


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("keys", [{}, {"num_calibration_samples": 3}, {"num_calibration_samples": "auto"}], ids=str)
def test_enough_samples_are_not_spoken_of(kind, keys, load, tokenizer, caplog):
    load(FEW[kind](), tokenizer=tokenizer, **keys)
    assert "samples" not in caplog.text


@pytest.mark.parametrize("key", ["dataset_split", "dataset_config_name", "dataset_revision"])
@pytest.mark.parametrize("dataset", [["a"], iter([{"input_ids": torch.ones(1, 2)}]), lambda model: None])
def test_keys_that_mean_nothing_are_refused(key, dataset, tokenizer):
    config = FP8Config(dataset=dataset, tokenizer=tokenizer, **{key: "x"})
    source = check_dataset(dataset)
    for use in (source.opened, lambda dataset, config, model: source.run(dataset, None, config, list)):
        with pytest.raises(FP8CalibrationError, match=f"{key}='x' does not go with .*: it is for .*drop it"):
            use(dataset, config, ModelFacts())
