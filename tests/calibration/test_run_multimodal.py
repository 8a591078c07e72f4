"""Calibration reaches every part of models that see, hear and read: towers, what lies between, and decoders."""

from __future__ import annotations

import pytest
import torch
from multimodal_models import FAMILIES, speecht5, voxtral

from optimum_fp8 import FP8Config, calibrate, convert, prepare, quantization_report
from optimum_fp8.errors import FP8CalibrationError
from optimum_fp8.lifecycle.state import state_of


def inputs_seen(model, batch) -> dict[str, float]:
    """max|x| of what goes into each module that is called with a tensor, by hooks of torch alone.

    nn.MultiheadAttention never calls its `out_proj`: what is multiplied by its weight is seen as that happens.
    """
    seen: dict[str, float] = {}
    product = torch.nn.functional.linear
    attentions = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.MultiheadAttention)}
    owners = {id(each.out_proj.weight): f"{name}.out_proj" for name, each in attentions.items()}

    def seen_product(x, weight, bias=None):
        if name := owners.get(id(weight)):
            seen[name] = max(seen.get(name, 0.0), x.abs().max().item())
        return product(x, weight, bias)

    def hook(name):
        def record(module, args):
            if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
                seen[name] = max(seen.get(name, 0.0), args[0].abs().max().item())

        return record

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in model.named_modules()]
    torch.manual_seed(1)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", seen_product)
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=pytest.mark.slow) if each in ("qwen2_5_omni", "speecht5") else each for each in FAMILIES],
)
def test_every_selected_module_has_the_range_of_what_it_is_given(family, caplog):
    model, batch = FAMILIES[family]()
    seen = inputs_seen(model.eval(), batch)
    torch.manual_seed(1)  # SpeechT5 drops out at inference too
    calibrate(prepare(model, FP8Config(dataset=[batch])))
    state = state_of(model)
    names = [target.name for target in state.targets(model)]
    assert len(names) >= 13 and "not reached" not in caplog.text
    for name in names:
        assert state.measurements.range(name).item() == pytest.approx(seen[name], rel=1e-5), name
    convert(model)
    assert [row.name for row in quantization_report(model).quantized] == names
    with torch.no_grad():
        model(**batch)


def test_a_tower_that_the_data_do_not_reach_is_named(caplog):
    model, batch = voxtral()
    words = {name: batch[name].clamp(min=10) for name in ("input_ids", "attention_mask")}
    calibrate(prepare(model.eval(), FP8Config(dataset=[words])))
    assert "were not reached by the calibration data" in caplog.text and "audio_tower" in caplog.text


def test_a_decoder_that_begins_with_no_token_says_what_the_batch_lacks():
    model, batch = speecht5()
    del batch["decoder_input_values"]
    message = r"SpeechT5ForTextToSpeech does not begin with a token.*put decoder_input_values or labels into the batch"
    with pytest.raises(FP8CalibrationError, match=message):
        calibrate(prepare(model.eval(), FP8Config(dataset=[batch])))
