"""FP8 modules under autocast and in inference mode, copied and stored whole."""

import copy
import io

import pytest
import torch
from grids import over
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from torch import nn

from optimum_fp8 import FP8Config, convert, dequantize

LAYERS = {
    "linear": (lambda: nn.Linear(64, 32), (4, 64)),
    "conv": (lambda: nn.Conv2d(4, 8, 3), (2, 4, 7, 7)),
}
HIGH = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def made(kind, scheme="dynamic", dtype=torch.float32):
    plain, shape = nn.Sequential(LAYERS[kind][0]()).to(dtype), LAYERS[kind][1]
    config = FP8Config(activation_scheme=scheme, quantize_lm_head=True)
    return copy.deepcopy(plain), convert(plain, config), torch.randn(shape).to(dtype)


@pytest.mark.core
@torch.no_grad()
@over(kind=LAYERS, scheme=["dynamic", "weight_only"], dtype=HIGH, to=[torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_that_it_gives_torchs_modules(kind, scheme, dtype, to):
    plain, module, x = made(kind, scheme, dtype)
    outside = module(x)
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=to, enabled=enabled):
            expected, found = plain(x), module(x)
            with torch.autocast("cpu", enabled=False):
                assert module(x).dtype == dtype
        assert found.dtype == expected.dtype
        assert (found - expected).norm() < 0.06 * expected.norm()
    assert torch.equal(module(x), outside)


@torch.no_grad()
@over(kind=LAYERS)
def test_autocast_of_a_compiled_module(kind):
    torch._dynamo.reset()
    plain, module, x = made(kind)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == plain(x).dtype == torch.bfloat16
        assert torch.equal(compiled(x), module(x))
    assert torch.equal(compiled(x), module(x))


@over(kind=LAYERS, scheme=["dynamic", "weight_only"])
def test_made_in_inference_mode_and_used_outside(kind, scheme):
    with torch.inference_mode():
        _, module, x = made(kind, scheme)
        expected = module(x)
    x = x.clone()
    for _ in range(2):
        assert torch.equal(module(x), expected)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(module)(x), expected)
        other = copy.deepcopy(module)
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(x), expected)
        assert torch.equal(other.to(torch.float64).to(torch.float32)(x), expected)
        assert torch.allclose(dequantize(module)(x), expected, atol=0.2)


@over(kind=LAYERS, scheme=["dynamic", "weight_only"])
def test_made_outside_and_used_in_inference_mode(kind, scheme):
    _, module, x = made(kind, scheme)
    expected = module(x)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(module(x), expected)
    assert torch.equal(module(x), expected)


def copied(model):
    return copy.deepcopy(model)


def stored(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@over(make=[tiny_llama, tiny_gpt2, tiny_bert], options=["", "attention", "attention kv_cache"], again=[copied, stored])
def test_whole_models_are_copied_and_stored(make, options, again):
    if make is tiny_bert and "kv_cache" in options:
        return
    keys = dict.fromkeys(options.split(), True)
    model, ids = convert(make().eval(), FP8Config(activation_scheme="dynamic", **keys)), torch.arange(6)[None]
    with torch.no_grad():
        expected = model(ids)[0]
        other = again(model)
        assert torch.equal(other(ids)[0], expected)
        assert torch.equal(dequantize(other)(ids)[0], dequantize(again(model))(ids)[0])
        if "kv_cache" in options:
            options = {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True}
            one, two = model.generate(ids, **options), again(model).generate(ids, **options)
            assert torch.equal(one.sequences, two.sequences)
            assert type(one.past_key_values.layers[0]) is type(two.past_key_values.layers[0])
