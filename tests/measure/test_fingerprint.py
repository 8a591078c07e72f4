"""The fingerprint of a model's weights."""

import pytest
import torch

from optimum_fp8.measure import model_fingerprint, weight_digest

WEIGHT = torch.arange(6000, dtype=torch.float32).reshape(60, 100).sin().bfloat16().float()


def test_it_is_the_same_for_bfloat16_and_float32():
    assert weight_digest(WEIGHT) == weight_digest(WEIGHT.bfloat16()) == weight_digest(torch.nn.Parameter(WEIGHT))


@pytest.mark.core
@pytest.mark.parametrize(
    "other",
    [WEIGHT + 1, WEIGHT.flip(0), WEIGHT.reshape(100, 60), WEIGHT.flatten(), WEIGHT[:59]],
    ids=["other values", "other order", "other shape", "other rank", "one row less"],
)
def test_it_tells_weights_apart(other):
    assert weight_digest(other) != weight_digest(WEIGHT)


def test_it_does_not_depend_on_memory_layout():
    assert weight_digest(WEIGHT.t().contiguous().t()) == weight_digest(WEIGHT)


def test_a_model_is_its_names_and_weights():
    digests = {"a": "1", "b": "2"}
    whole = model_fingerprint(digests)
    assert whole == model_fingerprint({"b": "2", "a": "1"}), "the order does not matter"
    others = [{"a": "1"}, {"a": "2", "b": "1"}, {"a": "1", "c": "2"}, {}]
    assert whole not in {model_fingerprint(other) for other in others}
    assert len(whole) == 32 and int(whole, 16) >= 0
