"""What calibration hands to the model is what its `generate` hands to it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers as hf
from attention_models import ENCODER, FAMILIES, GQA, IDS, MASK, PIXELS, SEQ2SEQ
from grids import slow_but

from optimum_fp8 import FP8Config, calibrate, prepare
from optimum_fp8.errors import FP8CalibrationError
from optimum_fp8.lifecycle.state import state_of

STEPS = 3
COMPARED = ("input_ids", "decoder_input_ids", "position_ids", "attention_mask", "decoder_attention_mask")
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
VISION = {"depth": 1, "num_heads": 4, "patch_size": 8, "hidden_size": 32}
IMAGE = 60
WITH_IMAGE = torch.cat([IDS[:, :4], torch.full((2, 1), 58), torch.full((2, 4), IMAGE), IDS[:, 4:]], dim=1)
GRID = {
    "input_ids": WITH_IMAGE,
    "attention_mask": torch.cat([MASK, torch.ones(2, 5, dtype=torch.long)], dim=1),
    "mm_token_type_ids": (WITH_IMAGE == IMAGE).long(),
    "pixel_values": torch.linspace(-1, 1, 32 * 384).view(32, 384),  # patches of 3 · 2 · 8 · 8 values
    "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
}
TOKENS_OF = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 58, "vision_end_token_id": 59}


def qwen2_vl():
    text = GQA | {"rope_parameters": dict(ROPE), "head_dim": 8}
    vision = VISION | {"embed_dim": 32, "mlp_ratio": 1}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=text, vision_config=vision, **TOKENS_OF)
    ), GRID


def glm4v():
    text = GQA | {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}, "head_dim": 8}
    vision = VISION | {"out_hidden_size": 32, "intermediate_size": 48, "image_size": 32}
    config = hf.Glm4vConfig(text_config=text, vision_config=vision, image_start_token_id=58, **TOKENS_OF)
    return hf.Glm4vForConditionalGeneration(config), GRID


def qwen3_5():
    text = GQA | {"rope_parameters": dict(ROPE), "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    linear = {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")} | {"linear_num_key_heads": 2}
    vision = VISION | {"out_hidden_size": 32, "intermediate_size": 48, "num_position_embeddings": 64}
    text |= linear | {"linear_num_value_heads": 4}
    return hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(text_config=text, vision_config=vision, **TOKENS_OF)
    ), GRID | {"pixel_values": torch.linspace(-1, 1, 32 * 384).view(32, 384)}


def gemma3():
    text = GQA | {"head_dim": 8, "sliding_window": 5}
    config = hf.Gemma3Config(text_config=text, vision_config=dict(ENCODER), mm_tokens_per_image=4, image_token_id=IMAGE)
    inputs = {name: GRID[name] for name in ("input_ids", "attention_mask")}
    return hf.Gemma3ForConditionalGeneration(config), inputs | PIXELS | {"token_type_ids": (WITH_IMAGE == IMAGE).long()}


def encoder_decoder(model_class, config):
    start = torch.full((2, 1), 1)
    decoder = torch.cat([start, IDS[:, 2:5]], dim=1)
    return lambda: (model_class(config), {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": decoder})


LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDTHS = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
NLLB = hf.NllbMoeConfig(**SEQ2SEQ, **LAYERS, **WIDTHS, num_experts=4, encoder_sparse_step=1, decoder_sparse_step=1)
SWITCH = hf.SwitchTransformersConfig(
    **SEQ2SEQ, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_experts=2, num_sparse_encoder_layers=1
)


def udop():
    config = hf.UdopConfig(
        **SEQ2SEQ, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, image_size=32, patch_size=8
    )
    inputs = {"input_ids": IDS, "attention_mask": MASK, "bbox": torch.rand(2, 11, 4), "decoder_input_ids": IDS[:, :3]}
    inputs["decoder_input_ids"] = torch.cat([torch.full((2, 1), 1), IDS[:, :3]], dim=1)
    return hf.UdopForConditionalGeneration(config), inputs | PIXELS


def moonshine():
    heads = {f"{part}_num_{kind}_heads": 4 for part in ("encoder", "decoder") for kind in ("attention", "key_value")}
    layers = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    config = hf.MoonshineConfig(**SEQ2SEQ, **heads, **layers, hidden_size=32, intermediate_size=48)
    mask = torch.ones(2, 4000, dtype=torch.long)
    mask[1, 2500:] = 0
    decoder = torch.cat([torch.full((2, 1), 1), IDS[:, :3]], dim=1)
    inputs = {"input_values": torch.linspace(-1, 1, 8000).view(2, 4000), "attention_mask": mask}
    return hf.MoonshineForConditionalGeneration(config), inputs | {"decoder_input_ids": decoder}


FAMILY = {
    "llama": lambda: (FAMILIES["llama"].make(), FAMILIES["llama"].inputs),
    "mpt, no position ids": lambda: (FAMILIES["mpt"].make(), FAMILIES["mpt"].inputs),
    "qwen2_vl": qwen2_vl,
    "glm4v": glm4v,
    "qwen3_5": qwen3_5,
    "gemma3": gemma3,
    "bart": lambda: encoder_decoder(hf.BartForConditionalGeneration, FAMILIES["bart"].config)(),
    "t5": lambda: encoder_decoder(hf.T5ForConditionalGeneration, FAMILIES["t5"].config)(),
    "nllb_moe": encoder_decoder(hf.NllbMoeForConditionalGeneration, NLLB),
    "udop": udop,
    "moonshine": moonshine,
}


def record(model, calls):
    """Add the keyword arguments of the model's calls to `calls`."""

    def remember(module, args, kwargs):
        calls.append({name: value.clone() for name in COMPARED if torch.is_tensor(value := kwargs.get(name))})

    return model.register_forward_pre_hook(remember, with_kwargs=True)


def calibrated(model, inputs, steps=STEPS, **options):
    """A copy of the model that was measured, and the calls it got."""
    options = {"attention": True, "kv_cache": True, "ignore_modules_wo_measures": True} | options
    model, calls = prepare(copy.deepcopy(model), FP8Config(dataset=[inputs], decode_steps=steps, **options)), []
    record(model, calls)
    return calibrate(model), calls


def same(x, y):
    """Whether two tensors are equal; a mask of ones is as good as none."""
    x, y = (None if value is None or bool((value == 1).all()) and value.ndim == 2 else value for value in (x, y))
    return x is y or (x is not None and y is not None and torch.equal(x.long(), y.long()))


@pytest.mark.parametrize("family", slow_but(FAMILY, "llama", "qwen2_vl", "bart", "moonshine"))
def test_the_inputs_are_those_of_generate(family):
    torch.manual_seed(1)
    model, inputs = FAMILY[family]()
    model.eval().generation_config.eos_token_id = None
    generated, encoded = [], model.config.is_encoder_decoder
    handle = record(model, generated)
    model.generate(**inputs, max_new_tokens=STEPS + 1, do_sample=False, pad_token_id=0)
    handle.remove()
    _, calls = calibrated(model, inputs)
    assert len(calls) == len(generated) == STEPS + 1
    for number, (ours, theirs) in enumerate(zip(calls, generated, strict=True)):
        for name in COMPARED:
            if encoded and not number and name == "input_ids":  # generate runs the encoder beforehand
                continue
            assert same(ours.get(name), theirs.get(name)), (number, name, ours.get(name), theirs.get(name))


@pytest.mark.core
@pytest.mark.parametrize("family", ["llama", "mpt", "gpt2", "qwen3", "mistral, sliding", "gpt_oss, sinks"])
def test_right_padding_is_as_left_padding(family):
    model = FAMILIES[family].make()
    left = {"input_ids": IDS.clone(), "attention_mask": MASK}
    left["input_ids"][1, :4] = 63
    right = {name: torch.stack([value[0], value[1].roll(-4)]) for name, value in left.items()}
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = 50.0  # what of padding gets into ranges shows
    (one, left_calls), (other, right_calls) = calibrated(model, left), calibrated(model, right)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(left_calls[1:], right_calls[1:], strict=True)
    )
    ranges = [state_of(each).measurements.tensors for each in (one, other)]
    assert ranges[0].keys() == ranges[1].keys()
    for key in ranges[0]:
        assert torch.equal(ranges[0][key].range(), ranges[1][key].range()), key
    kept = {"input_ids": IDS[1:, 4:]}
    alone, _ = calibrated(model, kept)
    first, _ = calibrated(model, {"input_ids": IDS[:1]})
    for key, found in ranges[0].items():
        parts = [state_of(each).measurements.tensors[key].range() for each in (alone, first)]
        assert torch.allclose(found.range(), torch.stack(parts).amax(), rtol=1e-3), key


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_padded_labels_are_as_rows_by_themselves(family):
    model = FAMILIES[family].make()
    model.generation_config.eos_token_id = None
    labels = IDS[:, :6].clone()
    labels[1, 3:] = -100
    both = {"input_ids": IDS, "labels": labels}
    measured, calls = calibrated(model, both)
    rows = [calibrated(model, {"input_ids": IDS[:1], "labels": labels[:1]})]
    rows.append(calibrated(model, {"input_ids": IDS[1:], "labels": labels[1:, :3]}))
    tokens = [torch.cat([row[1][step]["decoder_input_ids"] for row in rows]) for step in (1,)]
    assert torch.equal(calls[1]["decoder_input_ids"], tokens[0]), "it goes on from the last label"
    for key, found in state_of(measured).measurements.tensors.items():
        if key[1] != "weight" and (
            family == "t5" or "decoder" not in key[0]
        ):  # learned positions go on after the padding
            parts = [state_of(row[0]).measurements.tensors[key].statistics()["count"] for row in rows]
            assert found.statistics()["count"] == sum(parts), key


@pytest.mark.core
@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
@pytest.mark.parametrize("attention", [False, True])
def test_a_decoder_without_inputs_gets_its_start(family, attention):
    model = FAMILIES[family].make()
    model.generation_config.eos_token_id, model.generation_config.decoder_start_token_id = None, 1
    inputs = {name: value for name, value in FAMILIES[family].inputs.items() if name != "decoder_input_ids"}
    _, calls = calibrated(model, inputs, attention=attention, kv_cache=False)
    assert calls[0]["decoder_input_ids"].tolist() == [[1], [1]]
    assert [call["decoder_input_ids"].shape[1] for call in calls] == [1] * (STEPS + 1)


def dia():
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": 64}
    cross = {"cross_num_attention_heads": 4, "cross_num_key_value_heads": 4, "cross_head_dim": 8}
    tokens = {"pad_token_id": 61, "eos_token_id": 60, "bos_token_id": 62}
    decoder = text | cross | tokens | {"cross_hidden_size": 32, "num_channels": 3}
    config = hf.DiaConfig(encoder_config=text, decoder_config=decoder, delay_pattern=[0, 1, 2])
    return hf.DiaForConditionalGeneration(config).eval()


@torch.no_grad()
def test_a_decoder_that_reads_several_ids_at_a_place_begins_as_its_model_lets_it():
    model = dia()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    _, calls = calibrated(model, inputs, kv_cache=False)
    begun = model(**inputs, decoder_input_ids=calls[0]["decoder_input_ids"])
    assert torch.equal(begun.logits, model(**inputs).logits), "Dia's forward knows where to begin"
    _, calls = calibrated(model, inputs | {"use_cache": True})
    assert [tuple(call["decoder_input_ids"].shape) for call in calls[1:]] == [(2, 1, 3)] * STEPS
    given = torch.full((2, 4, 3), 5)
    _, calls = calibrated(model, inputs | {"use_cache": True, "decoder_input_ids": given})
    assert len(calls) == 1 and torch.equal(calls[0]["decoder_input_ids"], given), "what it predicts has another shape"


class Letters:
    """A tokenizer with a token for each letter."""

    pad_token = "_"

    def __call__(self, texts, **options):
        ids = [[3 + ord(letter) % 60 for letter in text] for text in texts]
        longest = max(map(len, ids))
        rows = [row + [0] * (longest - len(row)) for row in ids]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
        return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize(
    "model_class, config",
    [
        (hf.SwitchTransformersForConditionalGeneration, SWITCH),
        (hf.T5ForConditionalGeneration, FAMILIES["t5"].config),
        (hf.MarianMTModel, hf.MarianConfig(**SEQ2SEQ, **LAYERS, **WIDTHS)),
        (hf.PegasusForConditionalGeneration, hf.PegasusConfig(**SEQ2SEQ, **LAYERS, **WIDTHS)),
        (hf.M2M100ForConditionalGeneration, hf.M2M100Config(**SEQ2SEQ, **LAYERS, **WIDTHS)),
    ],
)
def test_texts_calibrate_encoder_decoders(model_class, config):
    model = model_class(copy.deepcopy(config)).eval()
    options = FP8Config(dataset=["some text", "other", "words"], tokenizer=Letters(), batch_size=2)
    measured = state_of(calibrate(prepare(model, options))).measurements
    assert {name for name, kind in measured.tensors if kind == "input" and "decoder" in name}


def test_a_decoder_of_which_no_start_is_known_is_refused():
    model = FAMILIES["t5"].make()
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = config.bos_token_id = None
    with pytest.raises(FP8CalibrationError, match="decoder_start_token_id"):
        calibrated(model, {"input_ids": IDS})


@pytest.mark.core
@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_the_old_name_of_the_cache_is_not_used(family, caplog, monkeypatch):
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.Logger, "warning_once", logging.Logger.warning)  # else the first test alone sees it
    with caplog.at_level(logging.WARNING, logger="transformers"):
        calibrated(model, inputs)
    assert "past_key_values" not in caplog.text
