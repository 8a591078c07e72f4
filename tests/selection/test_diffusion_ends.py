"""Both ends of a diffusion model, which read the sample and write the prediction, stay in high precision."""

from __future__ import annotations

import pytest
from diffusion_models import TINY, output, tiny
from grids import slow_but

from optimum_fp8 import FP8Config, convert, load, prepare, quantization_report, save

ENDS = {
    "ddim": {"conv_in", "conv_out"},
    "stable diffusion": {"conv_in", "conv_out"},
    "stable diffusion xl": {"conv_in", "conv_out"},
    "stable diffusion 3": {"pos_embed.proj", "proj_out"},
    "flux": {"x_embedder", "proj_out"},
    "dit": {"pos_embed.proj", "proj_out_2"},
    "wan": {"patch_embedding", "proj_out"},
    "autoencoder": set(),
}
DYNAMIC = {"target": "cpu", "activation_scheme": "dynamic"}
WORDS = ("it reads the noisy sample", "it writes the prediction")


@pytest.mark.parametrize("name", slow_but(TINY, "stable diffusion", "flux", "dit"))
def test_ends_are_kept_and_the_report_says_why(name):
    report = quantization_report(prepare(tiny(name), FP8Config(target="cpu")))
    kept = {row.name for row in report.modules if row.reason.endswith(WORDS)}
    linear = {row.name for row in report.modules}
    assert kept == ENDS[name] & linear and (len(kept) == 2 or name in ("wan", "autoencoder"))


def test_ends_are_quantized_where_they_are_asked_for(tmp_path):
    model = convert(tiny("dit"), FP8Config(**DYNAMIC, quantize_lm_head=True))
    assert {"pos_embed.proj", "proj_out_2"} <= {row.name for row in quantization_report(model).quantized}
    save(model, tmp_path / "fp8")
    assert (output(load(tmp_path / "fp8"), "dit") == output(model, "dit")).all()


def test_layers_inside_of_blocks_are_no_ends():
    quantized = {row.name for row in quantization_report(convert(tiny("flux"), FP8Config(**DYNAMIC))).quantized}
    assert "single_transformer_blocks.0.proj_out" in quantized
