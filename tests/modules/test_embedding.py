"""Embeddings in FP8, beside the original modules with the dequantized table."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from grids import over
from on_gaudi import as_on_a_card
from torch import nn

from optimum_fp8 import FP8Config, convert, dequantize, prepare, quantization_report
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.modules import fp8_modules
from optimum_fp8.modules.embedding import FP8Embedding, FP8EmbeddingBag
from optimum_fp8.ops.fp8_tensor import FP8Tensor
from optimum_fp8.test_utils import gaudi

KEYS = {"target": "cpu", "activation_scheme": "weight_only", "quantize_embeddings": True}
ROWS = {**KEYS, "scale_method": "act_maxabs_pow2_weights_pcs_maxabs_pow2"}
IDS = torch.tensor([[3, 5, 9, 2, 0], [7, 0, 0, 1, 4]])
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 64}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40}


def llama(tied=False):
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()


def gemma():
    torch.manual_seed(0)
    config = hf.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False)
    return hf.Gemma3ForCausalLM(config).eval()


def bart():
    torch.manual_seed(0)
    return hf.BartModel(hf.BartConfig(**BART, scale_embedding=True)).eval()


def opt():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    config = hf.OPTConfig(**sizes, max_position_embeddings=40, word_embed_proj_dim=32, tie_word_embeddings=False)
    return hf.OPTForCausalLM(config).eval()


MODELS = {"llama": llama, "gemma": gemma, "bart": bart, "opt": opt}


def with_values(plain, converted):
    """The plain model with the values of the converted one's tables."""
    with torch.no_grad():
        for name, module in fp8_modules(converted).items():
            plain.get_submodule(name).weight.copy_(module.weight)
    return plain


def outputs(model):
    found = model(IDS)
    return found.logits if "logits" in found else found.last_hidden_state


@over(
    keys=[KEYS, ROWS],
    dtype=[torch.float32, torch.bfloat16],
    make=[lambda: nn.Embedding(20, 8, padding_idx=0), lambda: nn.EmbeddingBag(20, 8, mode="max", padding_idx=3)],
)
@torch.no_grad()
def test_it_is_the_lookup_in_the_dequantized_table(keys, dtype, make):
    plain = make().to(dtype)
    model = convert(nn.Sequential(copy.deepcopy(plain)), FP8Config(**keys))
    module = model[0]
    assert type(module) in (FP8Embedding, FP8EmbeddingBag) and module.codes.shape == (20, 8)
    assert module.weight_scale.shape == ((20, 1) if keys is ROWS else (1,))
    plain.weight.copy_(module.weight)
    assert torch.equal(model(IDS), plain(IDS)) and model(IDS).dtype == dtype
    assert model.state_dict().keys() == {"0.weight", "0.weight_scale"}
    again = convert(nn.Sequential(make().to(dtype)), FP8Config(**keys))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS), model(IDS))
    assert next(model.parameters()).dtype == dtype
    restored = dequantize(model)[0]
    assert type(restored) is type(plain) and torch.equal(restored(IDS), plain(IDS))


@over(
    mode=["sum", "mean", "max"],
    padding=[None, 0, 9],
    last=[True, False],
    weighted=[True, False],
)
@torch.no_grad()
def test_bags(mode, padding, last, weighted):
    plain = nn.EmbeddingBag(20, 8, mode=mode, padding_idx=padding, include_last_offset=last)
    module = convert(nn.Sequential(copy.deepcopy(plain)), FP8Config(**KEYS))[0]
    plain.weight.copy_(module.weight)
    flat, offsets = IDS.flatten(), torch.tensor([0, 3, 3, 10] if last else [0, 3, 3])
    weights = torch.rand(flat.shape) if weighted and mode == "sum" else None
    assert torch.equal(module(flat, offsets, weights), plain(flat, offsets, weights))
    weights = None if weights is None else weights.reshape(IDS.shape)
    assert torch.equal(module(IDS, per_sample_weights=weights), plain(IDS, per_sample_weights=weights))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_models_with_embeddings_of_their_own_kind(make, tmp_path, monkeypatch):
    """Scaled embeddings, and positions with an offset: quantized while loading, saved and loaded to the bit."""
    plain = make()
    plain.save_pretrained(tmp_path / "plain")
    config = FP8Config(**KEYS, quantize_lm_head=True, allowlist={"names": ["embed|shared"]})
    model = type(plain).from_pretrained(tmp_path / "plain", quantization_config=config)
    tables = {name for name, module in plain.named_modules() if isinstance(module, nn.Embedding)}
    assert set(fp8_modules(model)) == tables and model.dtype == torch.float32
    expected = outputs(with_values(plain, model))
    with monkeypatch.context() as patch:
        patch.setattr(FP8Tensor, "dequantize", None)  # of a whole table
        assert torch.equal(outputs(model), expected)
    calls = sum(sum(row.kernels.values()) for row in quantization_report(model).quantized)
    assert calls == (4 if make is bart else len(tables)), "those that share a table share the count of its calls"
    model.save_pretrained(tmp_path / "fp8")
    again = type(plain).from_pretrained(tmp_path / "fp8")
    assert set(fp8_modules(again)) == tables and torch.equal(outputs(again), expected)
    assert torch.equal(outputs(convert(make(), config)), expected)


@torch.no_grad()
def test_static_activations_elsewhere_ask_nothing_of_embeddings(tmp_path):
    model = prepare(llama(), FP8Config(target="cpu", quantize_embeddings=True, scale_method="maxabs_pow2"))
    model(IDS)
    convert(model)
    rows = {row.name: row.activations for row in quantization_report(model).quantized}
    assert rows["model.embed_tokens"] == "weight_only" and rows["model.layers.0.mlp.up_proj"] == "static"
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(hf.LlamaForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)


def test_unasked_they_are_left_alone():
    model = convert(llama(), FP8Config(target="cpu", activation_scheme="weight_only"))
    assert not any(isinstance(module, FP8Embedding) for module in fp8_modules(model).values())
    config = FP8Config(
        target="cpu", activation_scheme="weight_only", overrides={"embed": {"quantize_embeddings": True}}
    )
    assert isinstance(convert(llama(), config).model.embed_tokens, FP8Embedding)


@torch.no_grad()
def test_tied_to_a_head_it_is_one_table(tmp_path):
    left = convert(llama(tied=True), FP8Config(**KEYS))
    assert left.lm_head.weight is left.model.embed_tokens.weight and "lm_head" not in fp8_modules(left)
    reasons = {row.name: row.reason for row in quantization_report(left).modules}
    assert reasons["model.embed_tokens"] == "kept by default: head, tied or float32"
    config = FP8Config(**KEYS, quantize_lm_head=True)
    plain = llama(tied=True)
    plain.save_pretrained(tmp_path / "plain")
    for model in (
        convert(llama(tied=True), config),
        hf.LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config),
    ):
        head, table = model.lm_head, model.model.embed_tokens
        assert head.codes is table.codes and head.weight_scale is table.weight_scale
        with_values(plain, model)
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)
        expected = model(IDS).logits
        model.save_pretrained(tmp_path / "fp8")
        again = hf.LlamaForCausalLM.from_pretrained(tmp_path / "fp8")
        assert torch.equal(again(IDS).logits, expected)


@over(target=["gaudi2", "gaudi3"], keys=[KEYS, ROWS])
@torch.no_grad()
def test_on_a_gaudi_rows_are_those_that_a_cpu_predicts(target, keys):
    plain = nn.Sequential(nn.Embedding(20, 8)).bfloat16()
    expected = convert(copy.deepcopy(plain), FP8Config(**{**keys, "target": target}))
    with gaudi.emulated(target):
        model = convert(plain, FP8Config(**{**keys, "target": target}))
        with as_on_a_card():
            found = model(IDS)
    assert torch.equal(found, expected(IDS))
    assert {backend for _, backend in model[0].record.kernels} == {"reference"}, "Gaudi has no operator for it"


def test_what_is_refused():
    class Own(nn.Embedding):
        def forward(self, x):
            return self.weight[x]

    renormed, own = nn.Embedding(4, 4, max_norm=1.0), Own(4, 4)
    model = convert(nn.Sequential(renormed, own, nn.Linear(4, 4)), FP8Config(**KEYS))
    reasons = {row.name: row.reason for row in quantization_report(model).modules}
    assert reasons["0"] == "max_norm writes into its weight while it is used"
    assert reasons["1"] == "Own has a forward of its own"


def test_resizing_is_refused():
    model = convert(llama(), FP8Config(**KEYS))
    with pytest.raises(FP8NotAvailableError, match=r"model.embed_tokens is in FP8 and would keep its 64 rows"):
        model.resize_token_embeddings(70)
    assert model.resize_token_embeddings(64) is not None
