"""Calibration data that are batches already."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from optimum_fp8 import FP8Config, calibrate, prepare
from optimum_fp8.calibration import facts_of
from optimum_fp8.errors import FP8CalibrationError
from optimum_fp8.lifecycle.state import state_of

DICTS = [{"input_ids": torch.tensor([[n, n]])} for n in range(4)]


@pytest.mark.core
@pytest.mark.parametrize(
    "dataset",
    [
        lambda: (batch for batch in DICTS),
        lambda: iter(DICTS),
        lambda: DICTS,
        lambda: DataLoader(list(range(4)), collate_fn=lambda rows: DICTS[rows[0]]),
    ],
    ids=["generator", "iterator", "list", "DataLoader"],
)
def test_batches_are_passed_on_as_they_are(dataset, load):
    assert all(found is given for found, given in zip(load(dataset()), DICTS, strict=True))


def test_a_torch_dataset_of_tuples_through_a_loader(load):
    loader = DataLoader(TensorDataset(torch.rand(5, 3), torch.arange(5)), batch_size=2)
    assert [len(batch[0]) for batch in load(loader)] == [2, 2, 1]


def test_no_more_of_a_stream_is_read_than_needed(load):
    taken = []

    def stream():
        for n in range(100):
            taken.append(n)
            yield torch.ones(2, 3)

    assert len(load(stream(), num_calibration_samples=6)) == 3
    assert len(taken) <= 4


def test_a_generator_of_one_endless_batch_ends(load):
    def endless():
        while True:
            yield {"input_ids": torch.ones(4, 2, dtype=torch.long)}

    assert len(load(endless(), num_calibration_samples=10)) == 3


ROW, MASK = [3, 4, 5], [1, 1, 1]


@pytest.mark.core
@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": [ROW], "attention_mask": [MASK]},
        {"input_ids": ROW, "attention_mask": MASK},
        {"input_ids": np.array([ROW]), "attention_mask": np.array([MASK])},
        {"input_ids": [np.array(ROW)], "attention_mask": np.array(MASK)},
        {"input_ids": torch.tensor(ROW), "attention_mask": torch.tensor(MASK)},
        {"input_ids": torch.tensor(ROW), "attention_mask": torch.tensor([MASK])},
        {"input_ids": torch.tensor([ROW])},
        BatchEncoding({"input_ids": ROW, "attention_mask": MASK}),
        ROW,
        [ROW],
        np.array(ROW),
        torch.tensor(ROW),
        (ROW, 1),
        (np.array([ROW]), np.array([1])),
    ],
)
def test_rows_of_tokens_of_every_kind(batch):
    def measured(batch):
        torch.manual_seed(0)
        model = calibrate(prepare(tiny_llama(), FP8Config(dataset=[batch])))
        tensors = state_of(model).measurements.tensors
        return state_of(model).measurements.samples, {key: value.range() for key, value in tensors.items()}

    (samples, found), (_, expected) = measured(batch), measured({"input_ids": torch.tensor([ROW])})
    assert samples == 1 and found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_several_rows_of_tokens(load, ids):
    model = facts_of(tiny_llama())
    assert [batch.tolist() for batch in load([[3, 4, 5], [6, 7]], model)] == [[[3, 4, 5]], [[6, 7]]]
    assert [batch.tolist() for batch in load(np.array([[3, 4], [6, 7]]), model)] == [[[3, 4]], [[6, 7]]]
    assert len(load([{"input_ids": [[3, 4], [5, 6]]}] * 4, model, num_calibration_samples=4)) == 2


def test_labels_of_a_row_get_the_dimension_of_a_batch(load):
    (batch,) = load([{"input_ids": [3, 4], "labels": 1, "decoder_input_ids": [5], "use_cache": False}])
    assert batch["decoder_input_ids"].tolist() == [[5]] and batch["use_cache"] is False


def test_other_inputs_keep_their_shape(load):
    values = {"image_sizes": torch.tensor([3, 4]), "pixel_values": torch.rand(1, 3, 2, 2)}
    given = {"input_ids": torch.tensor([[3, 4]]), **values, "patches": [torch.rand(2), torch.rand(3)]}
    assert load([given])[0] is given
    (flat,) = load([np.ones(3, dtype=np.float32)], facts_of(nn.Sequential(nn.Linear(3, 3))))
    assert flat.shape == (3,)


@pytest.mark.parametrize(
    "batch, where",
    [
        ({"input_ids": [[3, 4], [5]]}, "batch 1, 'input_ids'"),
        ({"input_ids": [3, None]}, "batch 1, 'input_ids'"),
        ({"input_ids": np.array([[3], None], dtype=object)}, "batch 1, 'input_ids'"),
        ([[3, 4], [5]], "batch 1"),
    ],
)
def test_rows_that_are_no_tensor(batch, where, load):
    with pytest.raises(
        FP8CalibrationError, match=f"{where} cannot be made a tensor .*: expected numbers in rows of one"
    ):
        load([{"input_ids": [3]}, batch], facts_of(tiny_llama()))


def test_what_a_model_cannot_take_is_ours():
    model = prepare(tiny_llama(), FP8Config(dataset=iter([{"input_ids": "some text"}])))
    with pytest.raises(FP8CalibrationError, match=r"cannot be run on the calibration batch after 0 samples"):
        calibrate(model)


@pytest.mark.core
@pytest.mark.parametrize(
    "samples",
    [["a b", "c"], [{"text": "a b"}, {"text": "c"}], [{"text": "a b", "id": 1}, {"text": "c", "id": 2}]],
    ids=["strings", "dicts", "dicts with more"],
)
def test_a_stream_of_samples_is_no_stream_of_batches(samples, load, ids, tokenizer):
    read = []

    def stream():
        for sample in samples * 10:
            read.append(sample)
            yield sample

    found = load(stream(), facts_of(tiny_llama()), tokenizer=tokenizer, num_calibration_samples=3)
    assert [ids(batch) for batch in found] == [[[2, 3]], [[4]], [[2, 3]]] and len(read) == 3


def test_a_stream_of_conversations(load, chat_tokenizer):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (batch,) = load(iter([chat]), facts_of(tiny_llama()), tokenizer=chat_tokenizer)
    assert chat_tokenizer.decode(batch["input_ids"][0]) == "<user> a </s> <assistant> b </s>"


def test_a_stream_of_different_kinds_is_refused(load, tokenizer):
    with pytest.raises(FP8CalibrationError, match="sample 1, column 'text' is 3, not text"):
        load(iter(["a", 3]), facts_of(tiny_llama()), tokenizer=tokenizer)


@pytest.mark.parametrize("make", [list, iter])
@pytest.mark.parametrize(
    "row, said",
    [
        ({"text": 5}, "sample 0, column 'text' is of type int, not text"),
        ({"messages": None}, "sample 0, column 'messages'"),
        ({"picture": None}, r"sample 0 has the columns \['picture'\]: expected text in 'text'"),
        ({"audio": np.zeros(8)}, r"sample 0 has the columns \['audio'\]: expected text in 'text'"),
    ],
)
def test_a_dict_without_an_input_of_the_model_is_refused_as_a_row(make, row, said, load, chat_tokenizer):
    with pytest.raises(FP8CalibrationError, match=said):
        load(make([row]), facts_of(tiny_llama()), tokenizer=chat_tokenizer)
