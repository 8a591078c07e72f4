"""Checkpoints against the model in memory."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama
from transformers import ViTConfig, ViTForImageClassification

from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.verifying.in_memory import _inputs, _other_logits, _other_tensors, check_against_memory


def test_inputs_that_a_model_takes():
    prompts = _inputs(tiny_llama())
    assert [each.shape[1] for each in prompts.values()] == [3, 8, 16] and all(
        each.max() < 64 for each in prompts.values()
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    images = _inputs(ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)))
    assert [tuple(each.shape) for each in images.values()] == [(1, 3, 8, 8)]


def test_tensors_that_differ_are_named():
    found = [str(each) for each in _other_tensors({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"})]
    assert [each.split(":")[1].strip() for each in found] == ["b", "c", "d"]


@pytest.mark.parametrize("off, severity", [(0.001, "warning"), (0.5, "error"), (float("nan"), "error")])
def test_logits_that_differ(off, severity):
    logits = {"a prompt": torch.ones(2, 3)}
    assert not list(_other_logits("folder", logits, logits))
    (found,) = _other_logits("folder", logits, {"a prompt": torch.ones(2, 3) + off})
    assert (found.severity, found.where) == (severity, "the logits of a prompt")
    (found,) = _other_logits("folder", logits, {"a prompt": torch.ones(3)})
    assert found.severity == "error"
    (found,) = _other_logits("folder", {}, {})
    assert found.severity == "warning"


def test_models_that_are_not_of_transformers_are_refused():
    with pytest.raises(FP8NotAvailableError, match="expected a model of transformers"):
        list(check_against_memory("folder", torch.nn.Linear(2, 2)))
