"""What observers gain where activations have outliers, and on which weights to measure: perplexity and divergence.

    python -m benchmarks.observers [--scale-method maxabs_hw] [--target cpu] [--windows 32]

The embedded language model has no outliers worth the name. They are planted so that the model computes the same: an
output channel is scaled up, and what reads it scaled down.

* "channel": one channel of what each norm gives to the projections, in every token, as large language models have them.
* "spikes": the neuron of each MLP that is most rarely large, so that few values in a million are, as first tokens and
  delimiters have them in large language models.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

TINY_LM = Path(__file__).parents[1] / "examples" / "llm" / "tiny_lm"
OBSERVERS = ("maxabs", "percentile", "mse", "entropy")
OUTLIERS = (("none", 1), ("channel", 300), ("channel", 3000), ("spikes", 300), ("spikes", 3000))
METHODS = ("maxabs_hw", "maxabs_arbitrary", "act_maxabs_pow2_weights_pcs_opt_pow2")
CHANNEL = 7


class Quality(NamedTuple):
    """How a model does on held-out text.

    Attributes:
        perplexity: of the text.
        divergence: KL from the next-token distribution of the model in bfloat16, nats; 0 for that itself.
    """

    perplexity: float
    divergence: float


class Texts:
    """Windows of 256 tokens `[windows, 256]` to calibrate on, and to compare on."""

    def __init__(self, windows: int):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(TINY_LM)

        def first(file: str) -> torch.Tensor:
            text = (TINY_LM / file).read_text(encoding="utf-8")
            ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
            return ids.unfold(0, 256, 256)[:windows]

        self.calibration, self.heldout = first("calibration.txt"), first("heldout.txt")


def loaded(**options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY_LM, dtype=torch.bfloat16, **options)


@torch.no_grad()
def plant(model: Any, kind: str, factor: float, ids: torch.Tensor) -> Any:
    """Give `model` outliers that change nothing of what it computes, and return it."""
    for layer in model.model.layers if kind == "channel" else ():
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[CHANNEL] *= factor
            for reader in readers:
                reader.weight[:, CHANNEL] /= factor
    if kind == "spikes":
        for layer, neuron in zip(model.model.layers, rarest_neurons(model, ids), strict=True):
            layer.mlp.up_proj.weight[neuron] *= factor
            layer.mlp.down_proj.weight[:, neuron] /= factor
    return model


def rarest_neurons(model: Any, ids: torch.Tensor) -> list[int]:
    """Of each layer the neuron whose largest activation stands out most from what nine tokens in ten have."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].float().abs().flatten(0, 1)))
        for layer in model.model.layers
    ]
    model(ids[:8])
    for handle in handles:
        handle.remove()
    return [int((x.amax(0) / x.quantile(0.9, dim=0).clamp(min=1e-3)).argmax()) for x in seen]


@torch.no_grad()
def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all next tokens, float32 `[n * 255, vocabulary]`."""
    return torch.cat([model(part).logits[:, :-1].float() for part in ids.split(16)]).flatten(0, 1).log_softmax(-1)


def quality(found: torch.Tensor, expected: torch.Tensor, ids: torch.Tensor) -> Quality:
    divergence = F.kl_div(found, expected, log_target=True, reduction="batchmean").item()
    return Quality(F.nll_loss(found, ids[:, 1:].flatten()).exp().item(), divergence)


@torch.no_grad()
def of_observers(
    kind: str, factor: float, texts: Texts, scale_method: str = "maxabs_hw", target: str = "cpu"
) -> Iterator[tuple[str, Quality]]:
    """The model in bfloat16, then in FP8 by each observer; measured once."""
    from optimum_fp8 import FP8Config, convert, finalize_calibration, prepare

    def model() -> Any:
        return plant(loaded(), kind, factor, texts.calibration)

    expected = log_probabilities(model(), texts.heldout)
    yield "bfloat16", quality(expected, expected, texts.heldout)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/ranges"
        measured = prepare(model(), FP8Config(observer="mse", dump_stats_path=path))
        for window in texts.calibration:
            measured(window[None])
        finalize_calibration(measured)
        for observer in OBSERVERS:
            options = {"scale_method": scale_method, "target": target, "dump_stats_path": path}
            quantized = convert(model(), FP8Config(mode="QUANTIZE", observer=observer, **options))
            yield observer, quality(log_probabilities(quantized, texts.heldout), expected, texts.heldout)


def of_weights(texts: Texts) -> Iterator[tuple[str, str, Quality]]:
    """By scale method: ranges measured on weights in FP8, and in high precision; the weights that run are the same."""
    from optimum_fp8 import FP8Config

    expected = log_probabilities(loaded(), texts.heldout)
    dataset = [{"input_ids": window.tolist()} for window in texts.calibration]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/ranges"
        loaded(quantization_config=FP8Config(mode="MEASURE", dataset=dataset, dump_stats_path=path))
        for method in METHODS:
            for weights, config in (
                ("in FP8", FP8Config(dataset=dataset, scale_method=method)),
                ("in bfloat16", FP8Config(mode="QUANTIZE", dump_stats_path=path, scale_method=method)),
            ):
                found = log_probabilities(loaded(quantization_config=config), texts.heldout)
                yield method, weights, quality(found, expected, texts.heldout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale-method", default="maxabs_hw")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--windows", type=int, default=32, help="of 256 tokens, to calibrate on and to compare on")
    options = parser.parse_args()
    texts = Texts(options.windows)
    print(f"| outliers | bfloat16 | {' | '.join(OBSERVERS)} |")
    print("|---|---|" + "---|" * len(OBSERVERS))
    for kind, factor in OUTLIERS:
        found = dict(of_observers(kind, factor, texts, options.scale_method, options.target))
        cells = [f"{found[each].perplexity:.3f} / {found[each].divergence:.4f}" for each in OBSERVERS]
        name = kind if kind == "none" else f"{kind} × {factor}"
        print(f"| {name} | {found['bfloat16'].perplexity:.3f} | {' | '.join(cells)} |", flush=True)
    print("\n| scale method | measured on weights | perplexity | KL |\n|---|---|---|---|")
    for method, weights, each in of_weights(texts):
        print(f"| `{method}` | {weights} | {each.perplexity:.3f} | {each.divergence:.5f} |", flush=True)


if __name__ == "__main__":
    main()
