"""Calibration data from the library `datasets`: text, images, model inputs."""

import datasets
import pytest
import torch
from PIL import Image
from tiny_models import tiny_llama
from transformers import BatchFeature

from optimum_fp8.calibration import facts_of
from optimum_fp8.errors import FP8CalibrationError

LLAMA = facts_of(tiny_llama())
TEXTS = ["a b c", "b", "c c c c", "a"]


class ImageProcessor:
    """Gives the mean of each image as its pixel values."""

    def __call__(self, images, return_tensors):
        assert return_tensors == "pt"
        values = [torch.full((3, 2, 2), float(image.convert("L").getpixel((0, 0)))) for image in images]
        return BatchFeature({"pixel_values": torch.stack(values)})


@pytest.mark.core
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("column", ["text", "body"])
def test_text_is_tokenized_in_order(column, streamed, load, ids, tokenizer):
    dataset = datasets.Dataset.from_dict({"label": [0, 1, 0, 1], column: TEXTS})
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    found = load(dataset, tokenizer=tokenizer, text_column=column)
    assert [ids(batch) for batch in found] == [[[2, 3, 4]], [[3]], [[4, 4, 4, 4]], [[2]]]


@pytest.mark.core
@pytest.mark.parametrize("torch_format", [False, True])
def test_rows_of_model_inputs_are_collated(torch_format, load, ids):
    dataset = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2], [3, 4], [5, 6]], "attention_mask": [[1, 1], [0, 1], [1, 1]], "label": [0, 1, 0]}
    )
    dataset = dataset.with_format("torch") if torch_format else dataset
    first, second = load(dataset, LLAMA, batch_size=2)
    assert ids(first) == [[1, 2], [3, 4]] and ids(second) == [[5, 6]]
    assert set(first) == {"input_ids", "attention_mask"}


def test_rows_of_pixel_values(load):
    dataset = datasets.Dataset.from_dict({"pixel_values": torch.rand(3, 3, 2, 2).tolist()})
    assert [batch["pixel_values"].shape for batch in load(dataset, batch_size=3)] == [(3, 3, 2, 2)]


def test_images_go_through_the_processor(load):
    images = [Image.new("RGB", (4, 4), (value, value, value)) for value in (1, 2, 3)]
    dataset = datasets.Dataset.from_dict({"picture": images, "label": [0, 1, 0]}, features=None)
    found = load(dataset.cast_column("picture", datasets.Image()), processor=ImageProcessor(), batch_size=2)
    assert [batch["pixel_values"][:, 0, 0, 0].tolist() for batch in found] == [[1.0, 2.0], [3.0]]


def test_images_without_a_processor(load):
    dataset = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))]})
    with pytest.raises(FP8CalibrationError, match="needs a processor.*pass processor="):
        load(dataset)


@pytest.mark.core
@pytest.mark.parametrize(
    "columns, options, message",
    [
        ({"text": []}, {}, "the dataset is empty"),
        ({"body": ["a"]}, {}, r"columns \['body'\].*set text_column"),
        ({"input_ids": [[1], [1, 2]]}, {"batch_size": 2}, "different lengths"),
        ({"text": ["a", None]}, {}, "sample 1, column 'text' is None, not text: clean the column, or set text_column"),
    ],
    ids=["empty", "columns", "lengths", "missing text"],
)
def test_bad_data_says_what_to_do(columns, options, message, load, tokenizer):
    with pytest.raises(FP8CalibrationError, match=message):
        load(datasets.Dataset.from_dict(columns), tokenizer=tokenizer, **options)
