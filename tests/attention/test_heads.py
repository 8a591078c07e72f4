"""Where the heads of operands lie: by sizes alone, and nowhere if those may mean two things."""

from __future__ import annotations

import pytest
import torch
from attention_models import FAMILIES, IDS, all_attention_scales
from torch import nn

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.attention.heads import Heads
from optimum_fp8.attention.scale_module import scales_of

HIDDEN = torch.zeros(2, 7, 32)  # [batch, length, size]


def heads_of(hidden=HIDDEN, **counts):
    module = nn.Module()
    for name, count in counts.items():
        setattr(module, name, count)
    return Heads(module, (None, hidden))


LAYOUTS = {
    (2, 4, 7, 8): 1,
    (2, 2, 7, 8): 1,  # of keys and values
    (2, 4, 3, 5, 8): 1,  # chunks after heads
    (2, 3, 4, 5, 8): 2,  # chunks before
    (8, 7, 8): 0,
}


@pytest.mark.core
@pytest.mark.parametrize("shape", LAYOUTS)
def test_each_head_gets_its_scale(shape):
    """Multiplying with scales is multiplying what lies at each head with its own."""
    heads, dim, x = heads_of(num_heads=4, num_key_value_heads=2), LAYOUTS[shape], torch.randn(shape)
    count = 4 if dim == 0 else shape[dim]
    scale = torch.arange(1.0, count + 1).reshape(-1, 1, 1)
    view = heads.view(x)
    assert view.ndim == 4 and view.shape[:2] == (2, count)
    expected = view * scale
    torch.testing.assert_close(heads.view(x * heads.scale_for(scale, x)), expected)


@pytest.mark.parametrize(
    "shape, hidden",
    [
        ((2, 5, 7, 8), HIDDEN),  # no such number of heads
        ((3, 4, 7, 8), HIDDEN),  # no such batch: of batch and heads in one, and chunks
        ((2, 4, 4, 7, 8), HIDDEN),  # as many chunks as heads
        ((9, 7, 8), HIDDEN),
        ((2, 4, 7, 8), None),
        ((4, 8), HIDDEN),
    ],
)
def test_where_sizes_do_not_tell_all_heads_share_a_scale(shape, hidden):
    heads, x = heads_of(hidden, num_heads=4), torch.zeros(shape)
    assert heads.view(x) is None
    assert torch.equal(heads.scale_for(torch.tensor([1.0, 3.0, 2.0, 1.0]).reshape(-1, 1, 1), x), torch.tensor([3.0]))


def test_the_report_says_which_operands_share_a_scale():
    class WideAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv, self.out = 2, nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
            p = (q @ k.mT).softmax(-1)
            out = p[:, :, None] @ v[:, :, None].expand(-1, -1, 2, -1, -1)
            return self.out(out[:, :, 0].transpose(1, 2).flatten(2))

    net, x = nn.Sequential(WideAttention()), torch.randn(3, 5, 16)
    prepare(net, FP8Config(attention=True, attention_granularity="head"))
    net(x)
    convert(net)
    shapes = {name: len(scale) for name, scale in scales_of(net[0]).items()}
    assert shapes == {"q_scale": 2, "k_scale": 2, "v_scale": 1, "p_scale": 1}
    row = quantization_report(net).attention[0]
    assert row.quantized and row.reason == "one scale for all heads of v: where heads lie is not known"
    assert row.reason in str(quantization_report(net))


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_caches_of_modules_that_multiply_have_a_scale_for_each_head(name):
    """Codes that are cached are the codes that would be made again, head by head; Falcon has one head of keys."""
    family = FAMILIES[name]
    model = prepare(family.make(), FP8Config(attention=True, kv_cache=True, attention_granularity="head"))
    with torch.no_grad():
        model(**family.inputs)
    convert(model)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    generated = [model.generate(IDS, **options, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*generated)
    rows = quantization_report(model).attention
    assert all(row.cached and row.reason == "selected" and not row.fallbacks for row in rows)
    shapes = {(key, len(scale)) for _, key, scale in all_attention_scales(model)}
    keys = 1 if name == "falcon" else 4
    assert shapes == {("q_scale", 4), ("k_scale", keys), ("v_scale", keys), ("p_scale", 1)}
