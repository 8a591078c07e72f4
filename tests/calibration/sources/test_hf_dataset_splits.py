"""Splits, streams, formats and columns of the library `datasets`."""

import datasets
import pytest
import torch
from PIL import Image
from tiny_models import tiny_llama
from transformers import AutoImageProcessor

from optimum_fp8 import FP8Config
from optimum_fp8.calibration import ModelFacts, check_dataset, facts_of
from optimum_fp8.errors import FP8CalibrationError

LLAMA = facts_of(tiny_llama())
SEES = ModelFacts(inputs=frozenset({"pixel_values"}), main_input="pixel_values")
TRAIN = datasets.Dataset.from_dict({"text": list("aabbcc")}, split="train")
TEST = datasets.Dataset.from_dict({"text": ["c"]}, split="test")


def both(streamed):
    splits = {"train": TRAIN, "test": TEST}
    if streamed:
        return datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    return datasets.DatasetDict(splits)


@pytest.fixture
def words(load, tokenizer):
    """`words(dataset)`: the samples, each of one word."""
    return lambda dataset, **keys: "".join(
        tokenizer.decode(batch["input_ids"][0]) for batch in load(dataset, LLAMA, tokenizer=tokenizer, **keys)
    )


@pytest.mark.core
@pytest.mark.parametrize("streamed", [False, True])
def test_a_dict_of_splits(streamed, words):
    splits = both(streamed)
    assert words(splits, dataset_split="test") == "c" and words(splits, dataset_split="train") == "aabbcc"
    assert words(type(splits)({"validation": splits["test"]})) == "c", "one alone is taken"
    with pytest.raises(FP8CalibrationError, match=r"the dataset has the splits \['test', 'train'\]: set dataset_split"):
        words(splits)
    with pytest.raises(FP8CalibrationError, match=r"'trains' is no split of the dataset: did you mean 'train'\?"):
        words(splits, dataset_split="trains")


@pytest.mark.parametrize(
    "wanted, found",
    [("train[:2]", "aa"), ("train[4:]", "cc"), ("train[1:3]", "ab"), ("train[50%:]", "bcc"), ("train[:33%]", "aa")],
)
def test_slices_of_splits(wanted, found, words):
    assert words(both(False), dataset_split=wanted) == words(TRAIN, dataset_split=wanted) == found
    if "%" not in wanted:
        assert words(both(True), dataset_split=wanted) == found


@pytest.mark.parametrize("wanted, dataset", [("train+test", both(False)), ("train[a:b]", both(False)), ("test", TRAIN)])
def test_what_is_no_split(wanted, dataset, words):
    with pytest.raises(FP8CalibrationError, match=r"dataset_split='t.*(is no split of the dataset|drop dataset_split)"):
        words(dataset, dataset_split=wanted)


@pytest.mark.core
def test_no_more_of_a_stream_is_read_than_batches_are_asked_for(tokenizer):
    read = []

    def generate():
        for number in range(1000):
            read.append(number)
            yield {"text": "a"}

    stream = datasets.IterableDataset.from_generator(generate)
    config = FP8Config(dataset=stream, tokenizer=tokenizer, batch_size=2, num_calibration_samples="auto")
    batches = check_dataset(stream).opened(stream, config, LLAMA)
    assert len(read) == 2
    for _ in range(3):
        next(batches)
    assert len(read) == 6


def test_a_column_by_itself(words, load):
    assert words(TRAIN["text"]) == words(TRAIN.to_iterable_dataset()["text"]) == "aabbcc"
    processor = AutoImageProcessor.from_pretrained("examples/vision/tiny_vit", backend="pil")
    pictures = datasets.Dataset.from_dict({"image": [Image.new("RGB", (32, 32), (7, 0, 0))]})
    (one,), (other,) = (load(each, SEES, processor=processor) for each in (pictures, pictures["image"]))
    assert torch.equal(one["pixel_values"], other["pixel_values"])


@pytest.mark.core
@pytest.mark.parametrize("kind", [None, "torch", "numpy", "pandas", "arrow"])
def test_formats_change_nothing(kind, words, load):
    assert words(TRAIN.with_format(kind)) == "aabbcc"
    processor = AutoImageProcessor.from_pretrained("examples/vision/tiny_vit", backend="pil")
    pictures = datasets.Dataset.from_dict({"image": [Image.new("RGB", (32, 32), (7, 0, 0))], "other": [3]})
    (one,), (other,) = (load(each, SEES, processor=processor) for each in (pictures, pictures.with_format(kind)))
    assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_columns_of_a_format_stay_chosen(load, caplog):
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "position_ids": [[4, 5]], "note": ["x"]})
    (batch,) = load(rows.with_format("torch", columns=["input_ids"]), LLAMA)
    assert set(batch) == {"input_ids"} and "left out" not in caplog.text


def test_a_transform_of_ones_own_is_applied_to_what_is_used(load):
    seen = []

    def transform(rows):
        seen.extend(rows["text"])
        return {"input_ids": [[ord(text)] for text in rows["text"]]}

    found = load(TRAIN.with_transform(transform), LLAMA, num_calibration_samples=3)
    assert [batch["input_ids"].item() for batch in found] == [97, 97, 98]
    assert len(seen) <= 4


def test_images_are_turned_as_the_library_turns_them(load, tmp_path):
    picture = Image.new("RGB", (32, 32))
    picture.paste((255, 0, 0), (0, 0, 32, 8))
    exif = picture.getexif()
    exif[0x0112] = 6  # held on its side
    picture.save(tmp_path / "one.png", exif=exif)
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "one.png")]}).cast_column("image", datasets.Image())
    processor = AutoImageProcessor.from_pretrained("examples/vision/tiny_vit", backend="pil")
    (batch,) = load(rows, SEES, processor=processor)
    assert torch.equal(batch["pixel_values"], processor(rows[0]["image"], return_tensors="pt")["pixel_values"])


@pytest.mark.core
def test_every_row_that_may_be_used_is_looked_at_before(tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["a"] * 20 + [None]})
    for count, message in ((21, "sample 20, column 'text' is None"), (20, None)):
        config = FP8Config(dataset=rows, tokenizer=tokenizer, num_calibration_samples=count)
        if message is None:
            assert len(list(check_dataset(rows).opened(rows, config, LLAMA))) == 20
            continue
        with pytest.raises(FP8CalibrationError, match=message):
            check_dataset(rows).opened(rows, config, LLAMA)
