"""The fingerprint of a model's weights."""

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, convert
from optimum_fp8.measure import architecture, difference, model_fingerprint, weight_digest

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


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Embedding(3, 4))


@pytest.mark.parametrize("name", [name for name, _ in small_model().named_parameters()])
def test_a_model_is_all_its_parameters(name):
    whole = model_fingerprint(small_model())
    assert whole == model_fingerprint(small_model()) and len(whole) == 32
    assert whole == model_fingerprint(small_model().to(torch.bfloat16)), "the same weights in another dtype"
    other = small_model()
    other.get_parameter(name).data[0] += 1
    assert whole != model_fingerprint(other)


def test_weights_that_became_fp8_count_as_they_were():
    model = small_model()
    whole, known = model_fingerprint(model), {"1.weight": weight_digest(model[1].weight)}
    convert(model, FP8Config(activation_scheme="weight_only"))
    assert model_fingerprint(model, known) == whole


@pytest.mark.core
def test_what_holds_nothing_is_told_by_its_class():
    relu, gelu = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.GELU())
    assert architecture(relu) == {"1": "ReLU"} and architecture(gelu) == {"1": "GELU"}
    assert difference(architecture(relu), architecture(gelu)) == "1 is ReLU, not GELU"
    assert difference(architecture(relu), architecture(relu)) is None
    assert difference(architecture(relu), {}) is None, "what only one of them has tells nothing"


def test_the_architecture_stays_when_modules_become_fp8():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    before = architecture(model)
    convert(model, FP8Config(activation_scheme="weight_only"))
    assert architecture(model) == before == {"1": "ReLU"}
