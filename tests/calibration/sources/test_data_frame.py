"""Calibration data from pandas."""

import pandas
import pytest
import torch
from PIL import Image
from tiny_models import tiny_llama
from transformers import AutoImageProcessor

from optimum_fp8 import FP8Config
from optimum_fp8.calibration import ModelFacts, facts_of
from optimum_fp8.errors import FP8CalibrationError

LLAMA = facts_of(tiny_llama())


@pytest.mark.core
def test_a_frame_and_a_series(load, ids, tokenizer):
    frame = pandas.DataFrame({"text": ["a b", "c"], "label": [1, 2]}, index=["x", "y"])
    for dataset in (frame, frame["text"], pandas.Series(["a b", "c"])):
        assert [ids(batch) for batch in load(dataset, LLAMA, tokenizer=tokenizer)] == [[[2, 3]], [[4]]]
    inputs = pandas.DataFrame({"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [0, 1]]})
    (batch,) = load(inputs, LLAMA, batch_size=2)
    assert ids(batch) == [[1, 2], [3, 4]] and batch["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_conversations_and_images(load, chat_tokenizer, tmp_path):
    chats = pandas.DataFrame({"prompt": ["a"], "completion": ["b"]})
    (batch,) = load(chats, LLAMA, tokenizer=chat_tokenizer)
    assert chat_tokenizer.decode(batch["input_ids"][0]) == "<user> a </s> <assistant> b </s>"
    picture = Image.new("RGB", (32, 32), (7, 0, 0))
    picture.save(tmp_path / "one.png")
    processor = AutoImageProcessor.from_pretrained("examples/vision/tiny_vit", backend="pil")
    sees = ModelFacts(inputs=frozenset({"pixel_values"}), main_input="pixel_values")
    for value in (picture, str(tmp_path / "one.png")):
        (batch,) = load(pandas.DataFrame({"image": [value]}), sees, processor=processor)
        assert torch.equal(batch["pixel_values"], processor(picture, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize(
    "frame, message",
    [
        (pandas.DataFrame({"text": ["a", None]}), "row 1, column 'text' is .*, not text"),
        (pandas.DataFrame({"body": ["a"]}), r"row 0 has the columns \['body'\]: .*set text_column \(valid: body\)"),
        (pandas.DataFrame({"text": []}), "the dataset is empty: expected at least one sample"),
    ],
)
def test_bad_frames_say_where(frame, message, load, tokenizer):
    with pytest.raises(FP8CalibrationError, match=message):
        load(frame, LLAMA, tokenizer=tokenizer)


def test_a_config_holds_a_frame_and_does_not_write_it():
    frame = pandas.DataFrame({"text": ["a"]})
    config = FP8Config(dataset=frame)
    assert config.dataset is frame and config.to_dict()["dataset"] is None and "DataFrame" in repr(config)
