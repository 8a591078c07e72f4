"""examples/vision/detection.py: the embedded detector finds shapes in FP8 as it does in bfloat16."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "vision"))

from average_precision import mean_average_precision
from detection import STRICTER, TINY_DETR, main
from shapes import scenes


def test_shapes_are_found_as_in_bfloat16(tmp_path, capsys):
    picture = tmp_path / "boxes.png"
    found = main(["--count", "64", "--output", str(picture)])
    truth = found["truth"]
    plain, fp8 = (mean_average_precision(found[name], truth) for name in ("bfloat16", "FP8"))
    assert plain >= 0.7 and fp8 >= plain - 0.02
    strict = [mean_average_precision(found[name], truth, STRICTER) for name in ("bfloat16", "FP8")]
    assert strict[1] >= strict[0] - 0.03
    assert not torch.equal(found["FP8"][0].scores, found["bfloat16"][0].scores), "FP8 rounds"
    assert Image.open(picture).size == (8 * 192, 2 * 192)
    said = capsys.readouterr().out
    assert "of all parameters in FP8" in said and f"{plain:.2%}" in said and f"{fp8:.2%}" in said


def test_pictures_of_ones_own(tmp_path, capsys):
    for number, scene in enumerate(scenes(6, seed=9)):
        scene.image.resize((96, 80)).save(tmp_path / f"{number}.png")
    found = main(["--images", str(tmp_path), "--output", str(tmp_path / "out.jpg")])
    assert len(found["FP8"]) == 4 and "truth" not in found
    assert "FP8 beside the boxes of bfloat16" in capsys.readouterr().out
    # Boxes are in pixels of the picture as it was given.
    sure = [boxes for boxes in found["bfloat16"] if boxes.scores.max() > 0.5]
    assert sure and max(float(boxes.places[:, 2].max()) for boxes in sure) > 64


@pytest.mark.parametrize(
    "given, said",
    [
        (["--model", "{folder}", "--images", "{folder}"], "no pictures in it"),
        (["--images", "{folder}/none"], "no such folder"),
        (["--model", "{pictures}", "--images", "{pictures}"], "AutoImageProcessor cannot load it"),
        (["--images", "{text}"], "not a picture that Pillow reads"),
    ],
)
def test_wrong_input_ends_with_one_line(tmp_path, given, said):
    folders = {name: tmp_path / name for name in ("folder", "pictures", "text")}
    for folder in folders.values():
        folder.mkdir()
    Image.new("RGB", (64, 64)).save(folders["pictures"] / "black.png")
    (folders["text"] / "notes.png").write_text("no picture")
    with pytest.raises(SystemExit) as caught:
        main([argument.format(**folders) for argument in given])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_other_models_need_pictures(capsys):
    with pytest.raises(SystemExit):
        main(["--model", "some/detector"])
    assert "--model needs --images" in capsys.readouterr().err
    assert TINY_DETR.is_dir()


def test_shapes_are_the_same_each_time_and_lie_in_the_picture():
    one, other = scenes(20, seed=4), scenes(20, seed=4)
    assert all(
        a.image.tobytes() == b.image.tobytes() and (a.boxes == b.boxes).all() for a, b in zip(one, other, strict=True)
    )
    assert all((each.boxes >= 0).all() and (each.boxes <= 64).all() for each in one)
    assert {int(kind) for each in one for kind in each.kinds} == {0, 1, 2}
