"""Calibration data from lists of paths."""

import json

import pytest
import torch
from PIL import Image
from tiny_models import tiny_llama
from transformers import AutoImageProcessor

from optimum_fp8.calibration import ModelFacts, check_dataset, facts_of
from optimum_fp8.errors import FP8CalibrationError

LLAMA = facts_of(tiny_llama())
SEES = ModelFacts(inputs=frozenset({"pixel_values"}), main_input="pixel_values")


@pytest.fixture(scope="module")
def processor():
    return AutoImageProcessor.from_pretrained("examples/vision/tiny_vit", backend="pil")


@pytest.fixture
def images(tmp_path):
    for value in (10, 100, 200):
        Image.new("RGB", (32, 32), (value, 0, 0)).save(tmp_path / f"{value}.png")
    return sorted(tmp_path.glob("*.png"))


@pytest.mark.core
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_paths_of_images(kind, images, load, processor):
    (batch,) = load([kind(path) for path in images], SEES, processor=processor, batch_size=3)
    expected = processor([Image.open(path) for path in images], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])


@pytest.mark.core
def test_images_that_rows_name_are_beside_their_file(images, load, processor):
    lines = [json.dumps({"image": path.name, "label": 1}) for path in images]
    (images[0].parent / "rows.jsonl").write_text("\n".join(lines))
    (batch,) = load(images[0].parent / "rows.jsonl", SEES, processor=processor, batch_size=3)
    expected = processor([Image.open(path) for path in images], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_paths_of_files_of_rows(tmp_path, load, ids, tokenizer):
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    (tmp_path / "two.csv").write_text("text\nc\n")
    found = load([tmp_path / "one.jsonl", tmp_path / "two.csv"], LLAMA, tokenizer=tokenizer)
    assert [ids(batch) for batch in found] == [[[2]], [[3]], [[4]]]


def test_texts_that_look_like_paths_are_texts(load, ids, tokenizer):
    for texts in (["see a.png", "read b.txt"], ["a.png", "b"]):
        assert type(check_dataset(texts)).__name__ == "Strings"
        assert len(load(texts, LLAMA, tokenizer=tokenizer)) == 2


@pytest.mark.parametrize("gone", ["gone.jsonl", "gone.csv.gz", "gone.png", "gone.wav"])
@pytest.mark.parametrize("with_one_there", [False, True])
def test_misspelt_paths_are_not_taken_for_texts(gone, with_one_there, tmp_path, load, tokenizer):
    (tmp_path / "there.txt").write_text("a b")
    paths = [str(tmp_path / "there.txt")] * with_one_there + [str(tmp_path / gone)]
    with pytest.raises(FP8CalibrationError, match=f"holds the path '.*{gone}', and there is no such file"):
        load(paths, LLAMA, tokenizer=tokenizer)


def test_bad_paths_are_named(tmp_path, images, load, processor, tokenizer):
    with pytest.raises(FP8CalibrationError, match="holds the path '.*gone.png', and there is no such file"):
        load([images[0], tmp_path / "gone.png"], SEES, processor=processor)
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(FP8CalibrationError, match=r"holds '.*text.txt' beside image files such as '.*10.png'"):
        load([images[0], tmp_path / "text.txt"], SEES, processor=processor)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(FP8CalibrationError, match="broken.png, column 'image' cannot be read as an image"):
        load([tmp_path / "broken.png"], SEES, processor=processor)
    (tmp_path / "table.xlsx").write_bytes(b"")
    with pytest.raises(FP8CalibrationError, match="table.xlsx', which is of no kind that can be read"):
        load([tmp_path / "table.xlsx"], LLAMA, tokenizer=tokenizer)
    with pytest.raises(FP8CalibrationError, match="has images in 'image', which the model does not take"):
        load(images, LLAMA, tokenizer=tokenizer)
