"""The same sample more than once: told through padding and batches."""

import pytest
import torch

from optimum_fp8.calibration.repeats import Repeats


def seen(*batches):
    repeats = Repeats()
    for batch in batches:
        repeats.add(batch)
    return repeats


def text(*rows, side="right"):
    """A padded batch of rows of ids."""
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(len(row)) if side == "right" else slice(length - len(row), None)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_makes_no_difference(side):
    repeats = seen(
        text([1, 2, 3], [4], side=side), text([4], [1, 2], side=side), text([1, 2, 3, 4], [1, 2, 3], side=side)
    )
    assert (repeats.samples, repeats.repeated) == (6, 2)


def test_tokens_of_padding_are_not_taken_for_text():
    assert seen(text([1]), text([1, 0]), text([0, 1])).repeated == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_images(dtype):
    images = torch.arange(4 * 12).view(4, 3, 2, 2).to(dtype)
    assert seen(images, images.flip(0)[:2]).repeated == 2
    assert seen({"pixel_values": images}, {"pixel_values": images + 1}).repeated == 0


def test_all_inputs_of_a_row_count():
    ids = torch.ones(2, 3, dtype=torch.long)
    assert seen({"input_ids": ids, "token_type_ids": torch.tensor([[0, 0, 0], [1, 1, 1]]), "flag": True}).repeated == 0


def test_what_has_no_rows_is_left_out():
    assert seen({"use_cache": False}).samples == 0
