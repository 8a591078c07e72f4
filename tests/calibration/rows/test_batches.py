"""Rows of images and texts: which column is taken, of which kind images may be, what is said of the others."""

import datasets
import pytest
import torch
import transformers as hf
from PIL import Image
from tiny_models import tiny_bert
from transformers import AutoImageProcessor

from optimum_fp8 import FP8Config, calibrate, prepare
from optimum_fp8.calibration import ModelFacts, facts_of
from optimum_fp8.errors import FP8CalibrationError
from optimum_fp8.lifecycle.state import state_of

SEES = ModelFacts(inputs=frozenset({"pixel_values", "labels"}), main_input="pixel_values")


def image(value, mode="RGB"):
    return Image.new("RGB", (32, 32), (value, value, value)).convert(mode)


@pytest.fixture(scope="module")
def processor():
    return AutoImageProcessor.from_pretrained("examples/vision/tiny_vit", backend="pil")


def columns(**columns):
    return datasets.Dataset.from_dict(columns)


@pytest.fixture
def pixels(load, processor):
    """`pixels(dataset)`: what the batches of a dataset hold."""
    return lambda dataset, **keys: torch.cat(
        [batch["pixel_values"] for batch in load(dataset, SEES, processor=processor, **keys)]
    )


@pytest.mark.core
@pytest.mark.parametrize("name", ["image", "img", "pixel_values"])
def test_the_image_is_taken_by_its_name(name, pixels, caplog):
    found = pixels(columns(**{"mask": [image(0)], name: [image(200)], "label": [3]}))
    assert torch.equal(found, pixels(columns(image=[image(200)])))
    assert "columns of the dataset that are not the image are left out: label, mask" in caplog.text


def test_the_name_of_the_input_wins(pixels):
    found = pixels(columns(image=[image(0)], pixel_values=[image(200)]))
    assert torch.equal(found, pixels(columns(image=[image(200)])))


def test_one_column_of_images_needs_no_name(pixels):
    assert torch.equal(pixels(columns(picture=[image(7)])), pixels(columns(image=[image(7)])))


def test_several_columns_of_images_without_a_name_are_refused(pixels):
    with pytest.raises(FP8CalibrationError, match=r"several columns of images, \['after', 'before'\].*name it 'image'"):
        pixels(columns(before=[image(0)], after=[image(1)]))


def test_what_stands_beside_a_text_is_said(load, tokenizer, caplog):
    load(columns(text=["a"], target=["b"]), facts_of(tiny_bert()), tokenizer=tokenizer)
    assert "columns of the dataset that are not the text are left out: target" in caplog.text


@pytest.mark.core
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_images_of_every_mode_become_rgb(mode, pixels):
    found, expected = pixels([{"image": image(255, mode)}]), pixels([{"image": image(255)}])
    assert found.shape == (1, 3, 32, 32) and torch.equal(found, expected)


def test_modes_may_be_mixed_in_a_batch(pixels):
    images = [image(100), image(100, "L"), image(100, "RGBA")]
    found = pixels(columns(image=images), batch_size=3)
    assert torch.equal(found, found[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused(mode, pixels):
    deep = Image.new(mode, (32, 32), 3)
    with pytest.raises(FP8CalibrationError, match=f"sample 0, column 'image' is an image of mode '{mode}'"):
        pixels([{"image": deep}])


def test_a_processor_of_gray_images_gets_them_as_they_are(load):
    gray = hf.AutoImageProcessor.from_pretrained(
        "examples/vision/tiny_vit", backend="pil", image_mean=[0.5], image_std=[0.5]
    )
    (batch,) = load([{"image": image(9, "L")}], SEES, processor=gray)
    assert batch["pixel_values"].shape == (1, 1, 32, 32)


@pytest.mark.core
@pytest.mark.parametrize("values, number", [([None, 3], 0), ([5, None], 1), ([5, 6, 7, None], 3)])
def test_rows_without_an_image_are_named(values, number, pixels):
    images = [None if value is None else image(value) for value in values]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": images, "label": [1] * len(images)}, features=features)
    with pytest.raises(FP8CalibrationError, match=f"sample {number}, column 'image' is None, not an image"):
        pixels(rows, batch_size=2)


def test_a_missing_caption_is_named(load):
    both = ModelFacts(inputs=frozenset({"pixel_values", "input_ids"}))
    with pytest.raises(FP8CalibrationError, match="sample 1, column 'text' is None, not text"):
        load(columns(text=["a", None], image=[image(1)] * 2), both, processor=lambda **inputs: inputs)


def test_what_a_processor_refuses_is_said_with_the_samples(load):
    def processor(images, return_tensors):
        raise ValueError("too small")

    with pytest.raises(
        FP8CalibrationError, match=r"sample 0 to sample 1: .* in column 'image' \(RGB \(32, 32\)\): too small"
    ):
        load([image(1), image(2)], SEES, processor=processor, batch_size=2)


def test_text_for_a_model_that_sees_is_refused(load, tokenizer, tmp_path):
    vit = hf.ViTModel(hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    (tmp_path / "texts.txt").write_text("some text")
    for dataset in (["a"], columns(text=["a"]), tmp_path / "texts.txt"):
        with pytest.raises(
            FP8CalibrationError, match="is text, and the model takes 'pixel_values', not .* pass images"
        ):
            load(dataset, facts_of(vit))


@pytest.mark.core
@pytest.mark.parametrize("listed", [lambda images: images, lambda images: [{"image": each} for each in images]])
def test_a_list_of_images_calibrates_a_model(listed, processor):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = hf.ViTModel(hf.ViTConfig(**size, image_size=32, patch_size=8)).eval()
    config = FP8Config(dataset=listed([image(10), image(20, "L")]), processor=processor, batch_size=2)
    assert state_of(calibrate(prepare(model, config))).measurements.samples == 2


def test_a_list_of_texts_under_a_key(load, ids, tokenizer):
    found = load([{"text": "a b"}, {"text": "c"}], facts_of(tiny_bert()), tokenizer=tokenizer)
    assert [ids(batch) for batch in found] == [[[2, 3]], [[4]]]


def test_lists_of_mixed_kinds_are_refused(load, tokenizer, processor):
    with pytest.raises(FP8CalibrationError, match="sample 1 is of type str: expected a dict, as sample 0"):
        load([{"text": "a b"}, "c"], facts_of(tiny_bert()), tokenizer=tokenizer)
    with pytest.raises(FP8CalibrationError, match="sample 1, column 'image' is of type int, not an image"):
        load([image(1), 3], SEES, processor=processor)
