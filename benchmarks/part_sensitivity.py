"""What FP8 in one part of a model alone does to what it computes, beside all parts: patch embeddings, layers, heads.

    python -m benchmarks.part_sensitivity [--only tiny_vit tiny_clip] [--write benchmarks/results/part-sensitivity.md]

Each model is a trained one that the repository or a package carries. A part is the layers whose names match a pattern.
It is calibrated and converted alone, with the default settings and nothing left out, and the model is compared with
itself in float32 on data that were not calibrated on.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).parents[1] / "examples"
HEADER = ("model", "part in FP8", "layers", "error", "KL", "changed", "metric")


class Case(NamedTuple):
    """A trained model, and what it is measured on.

    Attributes:
        load: the model in float32.
        calibration: batches of its inputs.
        heldout: batches of its inputs.
        output: what counts of an output: logits, `[n, classes]`, or embeddings, `[n, width]`, to be normalized.
        parts: the name of a part and the pattern of the names of its layers.
        embeds: whether outputs are embeddings.
        metric: what the model is for, between 0 and 1: its accuracy, or its mean average precision. None: not known.
        agreement: how well what a model finds is what the one in float32 finds, between 0 and 1, in place of comparing
            outputs row by row: a detector chooses its queries by what it sees.
    """

    load: Callable[[], Any]
    calibration: list[dict[str, torch.Tensor]]
    heldout: list[dict[str, torch.Tensor]]
    output: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]
    parts: dict[str, str]
    embeds: bool = False
    metric: Callable[[Any], float] | None = None
    agreement: Callable[[Any], float] | None = None


class Sensitivity(NamedTuple):
    """What a part in FP8 does.

    Attributes:
        layers: how many.
        error: the part of the output that is other than in float32: its norm over that of the output's deviation from
            its mean.
        kl: the mean of KL(float32 ‖ FP8) of the classes' probabilities in nats; None for embeddings.
        changed: how often the largest logit, or the nearest neighbour, is another; of a detector, which part of the
            boxes that it is sure of are not the same.
        metric: the metric of the case, less that in float32; None where there is none.
    """

    layers: int
    error: float | None
    kl: float | None
    changed: float
    metric: float | None

    def cells(self) -> tuple[str, ...]:
        """As they stand in the table."""
        error = "" if self.error is None else f"{self.error:.4f}"
        kl = "" if self.kl is None else f"{self.kl:.1e}"
        metric = "" if self.metric is None else f"{100 * self.metric:+.2f}"
        return str(self.layers), error, kl, f"{self.changed:.2%}", metric


def batches(size: int = 32, **inputs: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    count = len(next(iter(inputs.values())))
    return [{key: value[first : first + size] for key, value in inputs.items()} for first in range(0, count, size)]


def with_another_first(model: Any) -> Any:
    """The model, and the models in it, with a first parameter of no use.

    transformers takes the dtype of the first for the model's, and a layer that has it stays in high precision: so a
    stem could not be measured.
    """
    from transformers import PreTrainedModel

    for part in list(model.modules()):
        if isinstance(part, PreTrainedModel):
            part.register_parameter("first", torch.nn.Parameter(torch.zeros(1)))
    return model


def logits(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return output.logits.flatten(0, -2)


def accuracy(heldout: list[dict[str, torch.Tensor]], output: Callable[..., Any], truth: torch.Tensor) -> Any:
    """The metric of a classifier: how often its largest logit is that of the class."""

    def metric(model: Any) -> float:
        found = torch.cat([output(model(**batch), batch).argmax(-1) for batch in heldout])
        return (found == truth).float().mean().item()

    return metric


def digits(name: str, parts: dict[str, str]) -> Case:
    sys.path.insert(0, str(EXAMPLES / "vision"))
    from digits import load_split
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder = EXAMPLES / "vision" / name
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def pixels(part: str, count: int) -> list[dict[str, torch.Tensor]]:
        return batches(pixel_values=processor(images=load_split(part)[0][:count], return_tensors="pt").pixel_values)

    def load() -> Any:
        model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
        return with_another_first(model)

    heldout, truth = pixels("heldout", 360), torch.tensor(load_split("heldout")[1])
    return Case(load, pixels("train", 128), heldout, logits, parts, metric=accuracy(heldout, logits, truth))


def tiny_clip() -> Case:
    sys.path.insert(0, str(EXAMPLES / "vision"))
    from clip_zero_shot import NUMBERS, PROMPT, TINY_CLIP
    from digits import load_split
    from transformers import AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained(TINY_CLIP, backend="pil")
    texts = [PROMPT.format(number) for number in NUMBERS]

    def both(part: str, count: int) -> list[dict[str, torch.Tensor]]:
        images = load_split(part)[0][:count]
        parts = [images[first : first + 32] for first in range(0, count, 32)]
        return [dict(processor(text=texts, images=each, padding=True, return_tensors="pt")) for each in parts]

    def per_image(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return output.logits_per_image

    heldout, truth = both("heldout", 360), torch.tensor(load_split("heldout")[1])
    return Case(
        lambda: AutoModel.from_pretrained(TINY_CLIP, dtype=torch.float32),
        both("train", 128),
        heldout,
        per_image,
        {
            "patch embedding": "patch_embedding",
            "vision tower": "vision_model.encoder",
            "text tower": "text_model.encoder",
            "visual projection": "visual_projection",
            "text projection": "text_projection",
        },
        metric=accuracy(heldout, per_image, truth),
    )


def tiny_detr() -> Case:
    sys.path.insert(0, str(EXAMPLES / "vision"))
    from average_precision import Boxes, mean_average_precision
    from detection import STRICTER, TINY_DETR, detect
    from detection import batches as pixels
    from shapes import scenes
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    processor, pictures = AutoImageProcessor.from_pretrained(TINY_DETR, backend="pil"), scenes(256, seed=2)
    images = [each.image for each in pictures]
    truth = [
        Boxes(torch.tensor(each.boxes), torch.tensor(each.kinds), torch.ones(len(each.kinds))) for each in pictures
    ]

    def load() -> Any:
        return with_another_first(AutoModelForObjectDetection.from_pretrained(TINY_DETR, dtype=torch.float32))

    sure = [Boxes(*(each[boxes.scores >= 0.5] for each in boxes)) for boxes in detect(load().eval(), processor, images)]

    return Case(
        load,
        pixels(processor, [each.image for each in scenes(128, seed=3)]),
        pixels(processor, images),
        logits,
        {
            "stem": "backbone.*embedder",
            "backbone's stages": "backbone.*stages",
            "hybrid encoder": r"^model\.encoder\.|input_proj",
            "heads of the encoder": r"enc_(output|score_head|bbox_head)",
            "decoder": r"decoder\.layers|query_pos_head",
            "class heads": "class_embed",
            "box heads": "bbox_embed",
        },
        metric=lambda model: mean_average_precision(detect(model, processor, images), truth, STRICTER),
        agreement=lambda model: mean_average_precision(detect(model, processor, images), sure),
    )


def tiny_whisper() -> Case:
    sys.path.insert(0, str(EXAMPLES / "audio"))
    from keywords import TINY_WHISPER, features
    from tones import sounds
    from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

    extractor, (waves, kinds) = AutoFeatureExtractor.from_pretrained(TINY_WHISPER), sounds(256, seed=2)
    heldout = batches(input_features=features(extractor, waves))
    return Case(
        lambda: with_another_first(AutoModelForAudioClassification.from_pretrained(TINY_WHISPER, dtype=torch.float32)),
        batches(input_features=features(extractor, sounds(64, seed=3)[0])),
        heldout,
        logits,
        {
            "stem's first": "conv1$",
            "stem's second": "conv2$",
            "attention projections": "self_attn",
            "MLP": "fc[12]$",
            "projector": "projector",
            "head": "classifier",
        },
        metric=accuracy(heldout, logits, torch.tensor(kinds)),
    )


def tiny_lm() -> Case:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = EXAMPLES / "llm" / "tiny_lm"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def windows(file: str, count: int) -> list[dict[str, torch.Tensor]]:
        text = (folder / file).read_text(encoding="utf-8")
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        return batches(8, input_ids=ids.unfold(0, 256, 256)[:count])

    return Case(
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        windows("calibration.txt", 16),
        windows("heldout.txt", 16),
        logits,
        {
            "queries, keys, values": "[qkv]_proj",
            "attention output": "o_proj",
            "MLP in": "(gate|up)_proj",
            "MLP out": "down_proj",
            "head": "lm_head",
        },
    )


def minilm() -> Case:
    sys.path.insert(0, str(EXAMPLES / "llm"))
    from embeddings import CALIBRATION, packaged_model, python_reference, sentences, spread
    from transformers import AutoModel, AutoTokenizer

    folder = packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = sentences(CALIBRATION.read_text(encoding="utf-8"))

    def tokenized(texts: list[str]) -> list[dict[str, torch.Tensor]]:
        parts = [texts[first : first + 32] for first in range(0, len(texts), 32)]
        return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]

    def pooled(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["attention_mask"][..., None]
        return F.normalize((output.last_hidden_state * mask).sum(1) / mask.sum(1))

    return Case(
        lambda: AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False),
        tokenized(known[:128]),
        tokenized(spread(python_reference(known), 128)),
        pooled,
        {
            "queries, keys, values": "attention.self",
            "attention output": "attention.output",
            "MLP in": "intermediate",
            "MLP out": "layer.[0-9].output",
        },
        embeds=True,
    )


CASES: dict[str, Callable[[], Case]] = {
    "tiny_vit": lambda: digits(
        "tiny_vit",
        {
            "patch embedding": "patch_embeddings",
            "attention projections": "attention",
            "MLP in": "fc1|intermediate",
            "MLP out": "fc2|layer.[0-9].output|layers.[0-9].output",
            "head": "classifier",
        },
    ),
    "tiny_resnet": lambda: digits(
        "tiny_resnet",
        {
            "stem": "embedder.embedder",
            "stages": r"layer.\d.convolution",
            "shortcuts": "shortcut",
            "head": "classifier",
        },
    ),
    "tiny_clip": tiny_clip,
    "tiny_detr": tiny_detr,
    "tiny_whisper": tiny_whisper,
    "tiny_lm": tiny_lm,
    "all-MiniLM-L6-v2": minilm,
}


class Expected(NamedTuple):
    """What the model in float32 gives: its outputs, and its metric."""

    outputs: torch.Tensor
    metric: float


@torch.no_grad()
def in_float32(case: Case) -> Expected:
    model = case.load().eval()
    return Expected(outputs(model, case), 0.0 if case.metric is None else case.metric(model))


@torch.no_grad()
def outputs(model: Any, case: Case) -> torch.Tensor:
    return torch.cat([case.output(model(**batch), batch).float() for batch in case.heldout])


def winners(found: torch.Tensor, case: Case) -> torch.Tensor:
    """The largest logit of each row, or its nearest neighbour where rows are embeddings."""
    return (found @ found.T - 2 * torch.eye(len(found)) if case.embeds else found).argmax(1)


@torch.no_grad()
def sensitivity(case: Case, pattern: str, expected: Expected) -> Sensitivity:
    """A model of which only the layers that match are in FP8."""
    from optimum_fp8 import FP8Config, calibrate, convert, prepare, quantization_report

    model = case.load().eval()
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    others = [f"^{re.escape(name)}$" for name in names if not re.search(pattern, name)]
    config = FP8Config(
        dataset=case.calibration, quantize_lm_head=True, blocklist={"names": others}, num_calibration_samples=128
    )
    model = convert(calibrate(prepare(model, config)))
    layers = len(quantization_report(model).quantized)
    metric = None if case.metric is None else case.metric(model) - expected.metric
    if case.agreement is not None:
        return Sensitivity(layers, None, None, 1 - case.agreement(model), metric)
    found, plain = outputs(model, case), expected.outputs
    error = ((found - plain).norm() / (plain - plain.mean(0)).norm()).item()
    changed = (winners(found, case) != winners(plain, case)).float().mean().item()
    return Sensitivity(layers, error, None if case.embeds else divergence(plain, found), changed, metric)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The mean of KL(expected ‖ found) over rows of logits, in nats."""
    ours, theirs = found.double().log_softmax(-1), expected.double().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True).item()


@torch.no_grad()
def rows(names: list[str]) -> Iterator[tuple[str, ...]]:
    for name in names:
        case = CASES[name]()
        expected = in_float32(case)
        for part, pattern in {**case.parts, "all": ""}.items():
            yield name, part, *sensitivity(case, pattern, expected).cells()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    lines = []
    for row in chain([HEADER, ("---",) * len(HEADER)], rows(options.only)):
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    if options.write:
        options.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
