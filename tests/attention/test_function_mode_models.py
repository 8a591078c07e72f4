"""Models whose attention multiplies by einsum, in chunks or blocks, or takes a softmax of its own: FP8, and back."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from attention_models import DECODER, IDS, SEQ2SEQ, TEXT, TOKENS, Family
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.cvt.modeling_cvt import CvtSelfAttention
from transformers.models.esm.modeling_esmfold import EsmFoldAttention, EsmFoldSelfAttention
from transformers.models.oneformer.modeling_oneformer import OneFormerTextMapperAttention

from optimum_fp8 import FP8Config, convert, dequantize, prepare, quantization_report
from optimum_fp8.attention.detect import attention_modules

TYPES = {"token_type_ids": IDS % 2}
LONG = {"input_ids": torch.arange(2 * 32).view(2, 32) % 60 + 3}
ENCODER_DECODER = SEQ2SEQ | {
    **{"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
}
SPEECH = {
    **{"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 3), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "squeeze_factor": 2},
}
FAMILIES = {
    "xlnet": Family(
        hf.XLNetModel, hf.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48), TYPES, 2, 0
    ),
    "funnel": Family(
        hf.FunnelBaseModel,
        hf.FunnelConfig(vocab_size=64, d_model=32, d_head=8, n_head=4, d_inner=48, block_sizes=[1, 1]),
        TYPES,
        2,
        0,
    ),
    "reformer": Family(
        hf.ReformerModel,
        hf.ReformerConfig(
            **{"attention_head_size": 8, "hidden_size": 32, "num_attention_heads": 4, "feed_forward_size": 48},
            **{"attn_layers": ["local", "lsh"], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
            **{"num_buckets": 4, "num_hashes": 2, "hash_seed": 0, "axial_pos_embds": False, "vocab_size": 64},
            **{"max_position_embeddings": 64},
        ),
        LONG,
        2,
        0,
    ),
    "squeezebert": Family(hf.SqueezeBertForMaskedLM, hf.SqueezeBertConfig(**TEXT, embedding_size=32), {}, 4, 0),
    "longformer": Family(
        hf.LongformerModel,
        hf.LongformerConfig(**TEXT, attention_window=[4, 4], pad_token_id=0),
        {"global_attention_mask": torch.eye(11, dtype=torch.long)[:2]},
        2,
        0,
    ),
    "prophetnet": Family(
        hf.ProphetNetModel,
        hf.ProphetNetConfig(
            **SEQ2SEQ,
            **{"hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_encoder_layers": 1},
            **{"num_decoder_layers": 1, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
            **{"max_position_embeddings": 64, "ngram": 2},
        ),
        DECODER,
        3,
        2,
    ),
    "pegasus_x": Family(
        hf.PegasusXModel, hf.PegasusXConfig(**ENCODER_DECODER, block_size=8, num_global_tokens=4), LONG | DECODER, 3, 2
    ),
    "longt5": Family(
        hf.LongT5Model,
        hf.LongT5Config(
            **SEQ2SEQ,
            **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "local_radius": 4},
            **{"encoder_attention_type": "transient-global", "global_block_size": 4},
        ),
        LONG | DECODER,
        3,
        2,
    ),
    "big_bird": Family(
        hf.BigBirdModel,
        hf.BigBirdConfig(**TEXT, attention_type="block_sparse", num_random_blocks=1, block_size=2),
        LONG,
        2,
        0,
    ),
    "led": Family(
        hf.LEDModel,
        hf.LEDConfig(
            **ENCODER_DECODER,
            attention_window=[4],
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
        ),
        TOKENS | DECODER,
        3,
        2,
    ),
    "sew_d": Family(
        hf.SEWDModel,
        hf.SEWDConfig(**TEXT, **SPEECH, position_buckets=8, max_relative_positions=16),
        {"input_ids": None, "input_values": torch.linspace(-1, 1, 3200).view(2, 1600).sin()},
        2,
        0,
    ),
}
FAST = ("xlnet", "reformer", "prophetnet")


@torch.no_grad()
def output(model, family):
    inputs = {key: x for key, x in ({"input_ids": IDS} | family.inputs).items() if x is not None}
    torch.manual_seed(0)
    return model(**inputs)[0]


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


class RoundingMode(TorchFunctionMode):
    """Rounds what goes into each product of activations, by its own largest value, and knows nothing else."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm, torch.einsum, torch.baddbmm):
            args = tuple(tuple(map(self.rounded, x)) if isinstance(x, list | tuple) else self.rounded(x) for x in args)
        return func(*args, **(kwargs or {}))

    def rounded(self, x):
        if not isinstance(x, torch.Tensor) or isinstance(x if x._base is None else x._base, nn.Parameter):
            return x
        scale = x.abs().max().clamp(min=1e-12) / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale


def rounded_by_hand(family):
    """The model's output with all products of its attention modules rounded, and nothing else."""
    model = family.make()
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    for name in attention_modules(model):
        round_products(model.get_submodule(name))
    return output(model, family)


def round_products(module):
    modes = []
    module.register_forward_pre_hook(lambda *args: modes.append(RoundingMode().__enter__()))
    module.register_forward_hook(lambda *args: modes.pop().__exit__(None, None, None))


def names_of(family):
    """One layer beside attention: something must be selected."""
    model = family.make()
    inside = tuple(f"{name}." for name in attention_modules(model))
    outside = [(name, module) for name, module in model.named_modules() if not name.startswith(inside)]
    layers = (name for name, module in outside if isinstance(module, nn.Linear))
    first = next(name for name in layers if not name.endswith("pooler.dense"))
    return {"names": [f"^{first}$".replace(".", r"\.")]}


@pytest.mark.core
@pytest.mark.parametrize("granularity", ["tensor", pytest.param("head", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_attention_of_its_own_is_in_fp8(name, granularity, tmp_path):
    family = FAMILIES[name]
    plain = output(family.make(), family)
    config = FP8Config(
        attention=True,
        attention_granularity=granularity,
        attention_dataflow="unfused",  # which does not round the output either
        scale_method="maxabs_arbitrary",
        allowlist=names_of(family),
    )
    model = prepare(family.make(), config)
    torch.testing.assert_close(output(model, family), plain, atol=1e-6, rtol=1e-5)
    found = output(convert(model), family)
    rows = quantization_report(model).attention
    assert len(rows) == family.ours and all(row.quantized and row.kernels and not row.fallbacks for row in rows), rows
    layer = prepare(family.make(), config.replace(attention=False))
    output(layer, family)
    without = output(convert(layer), family)
    assert error(found, without) > 1e-4
    assert error(found, plain) < 1.5 * error(rounded_by_hand(family), plain) + error(without, plain)

    model.save_pretrained(tmp_path)
    again = family.model_class.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(output(again, family), found)
    assert torch.equal(output(copy.deepcopy(model), family), found)
    assert torch.equal(output(dequantize(model), family), output(dequantize(layer), family))


def cvt_attention():
    return CvtSelfAttention(4, 32, 3, 1, 1, 1, 1, "dw_bn", qkv_bias=True, attention_drop_rate=0.0, with_cls_token=False)


MODULES = {  # how to make each, and what it is called with besides the first argument
    "cvt": (cvt_attention, lambda x: (3, 4)),
    "esmfold": (lambda: EsmFoldSelfAttention(32, 4, 8), lambda x: ()),
    "esmfold, triangles": (lambda: EsmFoldAttention(32, 32, 32, 8, 4), lambda x: (x,)),
    "oneformer, texts": (lambda: OneFormerTextMapperAttention(32, 4), lambda x: (x, x)),
}


class Net(nn.Module):
    def __init__(self, name):
        super().__init__()
        torch.manual_seed(6)
        make, self.further = MODULES[name]
        self.fc, self.attn = nn.Linear(32, 32), make()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        output = self.attn(self.fc(x), *self.further(x))
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
@pytest.mark.parametrize("name", MODULES)
def test_modules_of_large_models(name):
    net, x = Net(name).eval(), torch.randn(2, 12, 32)
    config = FP8Config(allowlist={"names": ["^fc$"]}, attention=True, scale_method="maxabs_arbitrary")
    prepare(net, config)
    net(x)
    found = convert(net)(x)
    (row,) = quantization_report(net).attention
    assert row.quantized and sum(row.kernels.values()) == 2 and not row.fallbacks
    plain = Net(name).eval()
    plain.fc = net.fc
    expected = plain(x)
    round_products(plain.attn)
    assert 1e-3 < error(found, expected) < 1.5 * error(plain(x), expected)
