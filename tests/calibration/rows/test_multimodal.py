"""Images with text or in conversations, for models that see and read: as a processor of transformers makes them."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
import transformers as hf
from PIL import Image
from tiny_models import tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from optimum_fp8 import FP8Config, calibrate, prepare
from optimum_fp8.calibration import facts_of
from optimum_fp8.errors import FP8CalibrationError
from optimum_fp8.lifecycle.state import state_of

WORDS = ["<pad>", "<unk>", "<image>", "<user>", "<assistant>", "a", "b", "c", "</s>"]
TEMPLATE = (
    "{% for message in messages %} <{{ message.role }}> {% for part in message.content %}"
    "{% if part.type == 'image' %} <image> {% else %}{{ part.text }}{% endif %} {% endfor %}{% endfor %}"
)
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def image(value, mode="RGB"):
    return Image.new("RGB", (16, 16), (value, 255 - value, 7)).convert(mode)


def parts(*content):
    return [{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in content]


SHAREGPT = [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "c"}]
NO_PLACE = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}]


def turn(role, *content):
    return {"role": role, "content": parts(*content)}


@pytest.fixture(scope="module")
def processor():
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "extra_special_tokens": {"image_token": "<image>"}}
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    options = {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    return hf.LlavaProcessor(images, fast, chat_template=TEMPLATE, **options)


@pytest.fixture(scope="module")
def without_template(processor):
    options = {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    return hf.LlavaProcessor(processor.image_processor, processor.tokenizer, **options)


def llava():
    text = hf.LlamaConfig(**SIZES, vocab_size=16, max_position_embeddings=64)
    vision = hf.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=2, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config).eval()


FACTS = facts_of(llava())


def same(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def called(processor, messages, images):
    """What transformers itself makes of a conversation."""
    text = processor.apply_chat_template(messages, tokenize=False)
    return processor(text=[text], images=images or None, return_tensors="pt")


@pytest.mark.core
@pytest.mark.parametrize(
    "row, messages",
    [
        ({"image": image(9), "text": "a b"}, [turn("user", "image", "a b")]),
        ({"image": image(9)}, [turn("user", "image")]),
        ({"image": image(9), "messages": [turn("user", "image", "a"), turn("assistant", "c")]}, None),
        (
            {
                "image": image(9),
                "conversations": [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "c"}],
            },
            [turn("user", "image", "a"), turn("assistant", "c")],
        ),
        (
            {"image": image(9), "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}]},
            [turn("user", "image", "a"), turn("assistant", "c")],
        ),
        (
            {
                "images": [image(9), image(70)],
                "messages": [turn("user", "image", "a", "image"), turn("assistant", "c")],
            },
            None,
        ),
        ({"image": image(9), "question": "a", "answer": "c"}, [turn("user", "image", "a"), turn("assistant", "c")]),
    ],
    ids=["caption", "image alone", "messages", "LLaVA", "no place", "several", "pair"],
)
def test_an_image_finds_its_place_in_the_conversation(row, messages, load, processor):
    (batch,) = load([row], FACTS, processor=processor)
    images = row.get("images", [row.get("image")])
    same(batch, called(processor, messages or row["messages"], images))
    assert torch.isfinite(llava()(**batch).logits).all(), "places and images fit together"


def test_images_that_stand_in_the_messages(load, processor, tmp_path):
    image(9).save(tmp_path / "one.png")
    expected = called(processor, [turn("user", "image", "a")], [image(9)])
    for value in ({"image": image(9)}, {"path": str(tmp_path / "one.png")}, {"url": str(tmp_path / "one.png")}):
        content = [{"type": "image", **value}, {"type": "text", "text": "a"}]
        (batch,) = load([{"messages": [{"role": "user", "content": content}]}], FACTS, processor=processor)
        same(batch, expected)
    content = [{"type": "image_url", "image_url": {"url": "https://example.org/one.png"}}]
    with pytest.raises(FP8CalibrationError, match="sample 0, .* has the image 'https://.*': expected a local file"):
        load([{"messages": [{"role": "user", "content": content}]}], FACTS, processor=processor)


@pytest.mark.core
def test_batches_are_padded_and_say_where(load, processor):
    rows = datasets.Dataset.from_dict({"image": [image(1), image(2)], "text": ["a", "a b c"]})
    (batch,) = load(rows, FACTS, processor=processor, batch_size=2)
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["attention_mask"].sum(1).tolist() == [6, 8]  # a role, four patches, the words

    def counts(batch_size):
        config = FP8Config(dataset=rows, processor=processor, batch_size=batch_size)
        tensors = state_of(calibrate(prepare(llava(), config))).measurements.tensors
        return {key: int(observer.statistics()["count"]) for key, observer in tensors.items()}

    assert counts(2) == counts(1), "and do not count"


@pytest.mark.core
def test_text_for_a_model_that_sees_goes_through_the_processors_tokenizer(load, processor, tmp_path):
    (batch,) = load(["a b"], FACTS, processor=processor)
    assert batch["input_ids"].tolist() == [[5, 6]] and "pixel_values" not in batch
    processor.save_pretrained(tmp_path)
    (batch,) = load(["a b"], FACTS, processor=str(tmp_path))
    assert batch["input_ids"].tolist() == [[5, 6]]


def test_conversations_without_images_for_a_model_that_sees(load, processor):
    for content in ("a b", parts("a b")):
        messages = [{"role": "user", "content": content}]
        (batch,) = load([{"messages": messages}], FACTS, processor=processor)
        assert batch["input_ids"].tolist() == [[3, 5, 6]] and "pixel_values" not in batch


def test_without_a_template_the_image_still_has_a_place(load, without_template):
    for text in ("a b", "<image> a b"):
        (batch,) = load([{"image": image(9), "text": text}], FACTS, processor=without_template)
        assert (batch["input_ids"] == 2).sum() == 4
        assert torch.isfinite(llava()(**batch).logits).all()


def test_conversations_without_a_template(load, without_template):
    message = "column 'messages' holds conversations, and LlavaProcessor has no chat template"
    with pytest.raises(FP8CalibrationError, match=message):
        load([{"image": image(9), "messages": [turn("user", "image")]}], FACTS, processor=without_template)


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"image": image(9), "messages": [turn("user", "image", "image")]},
            "sample 1, .* holds 1 of kind 'image', and the messages have 2",
        ),
        (
            {"image": None, "messages": [turn("user", "image")]},
            "sample 1, .* holds 0 of kind 'image', and the messages",
        ),
        (
            {"image": None, "messages": [{"role": "user", "content": "<image> a"}]},
            "sample 1, .* holds 0 of kind 'image', and the messages",
        ),
        (
            {"image": "gone.png", "messages": [turn("user", "image")]},
            "sample 1, .* 'gone.png', and there is no such file",
        ),
        ({"image": image(9), "messages": None}, "sample 1, column 'messages' is None, not a list of messages"),
    ],
)
def test_rows_that_do_not_fit(row, message, load, processor):
    good = {"image": image(9), "conversations" if "conversations" in row else "messages": [turn("user", "image")]}
    with pytest.raises(FP8CalibrationError, match=message):
        load([good, row], FACTS, processor=processor)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_every_mode(mode, load, processor):
    (batch,) = load([{"image": image(100, mode), "text": "a"}], FACTS, processor=processor)
    same(batch, called(processor, [turn("user", "image", "a")], [image(100, mode).convert("RGB")]))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_not_each_conversation_need_have_an_image(batch_size, load, processor, tmp_path):
    image(9).save(tmp_path / "one.png")
    talk, look = {"conversations": NO_PLACE}, {"image": "one.png", "conversations": SHAREGPT}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [talk, look])))
    found = load(tmp_path / "rows.jsonl", FACTS, processor=processor, batch_size=batch_size)
    assert sum(len(batch["input_ids"]) for batch in found) == 2
    assert sum(len(batch.get("pixel_values", ())) for batch in found) == 1
    assert sum(int((batch["input_ids"] == 2).sum()) for batch in found) == 4
    assert all(torch.isfinite(llava()(**batch).logits).all() for batch in found)
    inside = [{"type": "image", "path": str(tmp_path / "one.png")}, {"type": "text", "text": "a"}]
    rows = [{"messages": [{"role": "user", "content": content}]} for content in ("b c", inside)]
    first, second = load(rows, FACTS, processor=processor)
    assert "pixel_values" not in first and "pixel_values" in second


@pytest.mark.core
def test_both_parts_of_the_model_are_measured(processor):
    rows = [{"image": image(number), "text": "a b c"} for number in range(3)]
    model = calibrate(prepare(llava(), FP8Config(dataset=rows, processor=processor)))
    measured = state_of(model).measurements
    assert measured.samples == 3
    for name in ("vision_tower.encoder.layers.0.mlp.fc1", "language_model.layers.0.mlp.up_proj"):
        assert measured.range(f"model.{name}") is not None


def test_images_for_a_model_that_reads_only(load, processor):

    message = (
        r"sample 0 has images in 'image', which the model does not take: expected text in 'text', or inputs of the"
    )
    with pytest.raises(FP8CalibrationError, match=message):
        load([{"image": image(9)}], facts_of(tiny_llama()), processor=processor)


def test_a_processor_in_a_folder_is_loaded_once(load, processor, monkeypatch):
    loaded = []

    def from_pretrained(*args, **kwargs):
        loaded.append(args)
        return processor

    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", from_pretrained)
    load([{"image": image(9), "text": "a"}], FACTS, processor="somewhere")
    assert loaded == [("somewhere",)]
