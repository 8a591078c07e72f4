"""The embedded models, quantized for a Gaudi: what a CPU computes is what an emulated card does.

Kernels add up in different orders, so a few outputs in a million are one step of bfloat16 apart, and codes that follow
from them may be: of a token in hundreds the logits then differ a little.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from on_gaudi import as_on_a_card, compared
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from optimum_fp8 import FP8Config, convert, finalize_calibration, ops, prepare, quantization_report
from optimum_fp8.test_utils import gaudi

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_LM, TINY_VIT = EXAMPLES / "llm" / "tiny_lm", EXAMPLES / "vision" / "tiny_vit"
WINDOW, NEW = 256, 32
PER_CHANNEL = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
WAYS = [
    ("gaudi2", "maxabs_hw", "static"),
    ("gaudi3", "maxabs_hw", "static"),
    ("gaudi2", PER_CHANNEL, "static"),
    ("gaudi3", "maxabs_arbitrary", "static"),
    ("gaudi3", "maxabs_hw", "dynamic"),
]

sys.path.insert(0, str(EXAMPLES / "vision"))

from digits import load_split  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


class Subject:
    """A model, its measurements, and what it is compared on.

    Args:
        model: in bfloat16.
        calibration, heldout: its inputs, a batch each.
        path: where measurements are kept.
        config: what is quantized.
    """

    def __init__(self, model, calibration, heldout, path, **config):
        self.model, self.heldout, self.config = model, heldout, config | {"dump_stats_path": path}
        measured = prepare(copy.deepcopy(model), FP8Config(decode_steps=0, **self.config))
        for batch in calibration:
            measured(batch)
        finalize_calibration(measured)

    def quantized(self, target, method, scheme):
        keys = {"target": target, "scale_method": method, "activation_scheme": scheme}
        return convert(copy.deepcopy(self.model), FP8Config(mode="QUANTIZE", **self.config, **keys))

    def both(self, way, call):
        """What `call` makes of the model on the ordinary path, and of the same on an emulated card."""
        expected = call(self.quantized(*way))
        with gaudi.emulated(way[0]):
            with ops.backend("hpu"):
                packed = self.quantized(*way)
            with as_on_a_card():
                found = call(packed)
        report = quantization_report(packed)
        kernels = {kernel for row in [*report.quantized, *report.attention] for kernel in row.kernels}
        assert kernels == {"hpu"} if way[2] == "static" else "hpu" in kernels
        return found, expected


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM)

    def windows(file):
        text = (TINY_LM / file).read_text(encoding="utf-8")
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        return ids[: len(ids) // WINDOW * WINDOW].view(-1, 1, WINDOW)

    path, model = tmp_path_factory.mktemp("ranges") / "lm", AutoModelForCausalLM.from_pretrained(TINY_LM)
    return Subject(model, windows("calibration.txt")[:8], windows("heldout.txt"), path, attention=True, kv_cache=True)


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    processor = AutoImageProcessor.from_pretrained(TINY_VIT, backend="pil")

    def batches(part):
        pixels = processor(images=load_split(part)[0], return_tensors="pt").pixel_values
        return pixels.bfloat16().split(60)

    path, model = tmp_path_factory.mktemp("ranges") / "vit", AutoModelForImageClassification.from_pretrained(TINY_VIT)
    return Subject(model.bfloat16(), batches("train")[:4], batches("heldout"), path, attention=True)


def assert_alike(found: torch.Tensor, expected: torch.Tensor, agreement: float) -> None:
    """Logits `[…, classes]`: KL of 1e-4 nats at most, and the same most likely class but where two are nearly a tie,
    less than a quarter of a nat apart.

    Args:
        agreement: the least share of the same most likely class, ties or not.
    """
    found, expected = found.float().flatten(0, -2), expected.float().flatten(0, -2)
    logs = found.log_softmax(-1), expected.log_softmax(-1)
    divergence = torch.nn.functional.kl_div(*logs, log_target=True, reduction="batchmean").item()
    first, other = expected.argmax(-1, keepdim=True), found.argmax(-1, keepdim=True)
    same = (first == other).float().mean().item()
    gap = (expected.gather(-1, first) - expected.gather(-1, other)).max().item()
    print(f"{len(found)} compared: KL {divergence:.2e}, the same most likely {same:.3%}, gap {gap:.3f}")
    assert divergence <= 1e-4 and same >= agreement and gap < 0.25


def logits(batches):
    return lambda model: torch.cat([model(batch).logits for batch in batches])


@pytest.mark.parametrize("way", WAYS[1::2], ids="-".join)
def test_language_model(language, way):
    found, expected = language.both(way, logits(language.heldout[:2]))
    assert_alike(found, expected, 0.995)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[::2], ids="-".join)
def test_language_model_on_all_of_the_text(language, way):
    batches = language.heldout.flatten(0, 1).split(8)
    assert_alike(*language.both(way, logits(batches)), 0.999)


@pytest.mark.parametrize("way", WAYS[:4:3], ids="-".join)
def test_vision_model(vision, way):
    assert_alike(*vision.both(way, logits(vision.heldout[:1])), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_vision_model_on_all_images(vision, way):
    assert_alike(*vision.both(way, logits(vision.heldout)), 0.999)


@pytest.mark.parametrize("way", WAYS[3:4], ids="-".join)
def test_each_operator_of_the_language_model(language, way):
    """On the operands that it has there: nothing adds up."""
    with compared(way[0]) as comparison:
        language.quantized(*way)(language.heldout[0])
    counts = {"cast_to_fp8_by_range": 28, "linear": 28, "cast_to_fp8": 8, "attention": 4}
    assert comparison.ran == counts and not comparison.refused and comparison.few_flips()


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, cache",
    [
        ("gaudi2", "static"),
        ("gaudi3", "dynamic"),
        pytest.param("gaudi2", "dynamic", marks=pytest.mark.slow),
        pytest.param("gaudi3", "static", marks=pytest.mark.slow),
    ],
)
def test_generation(language, target, cache):
    """Over FP8 caches, token by token; where tokens differ, they were a tie, and what follows is another text."""
    prompts = language.heldout[3:7, 0, :24]
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "cache_implementation": cache}
    options |= {"attention_mask": torch.ones_like(prompts), "output_logits": True, "return_dict_in_generate": True}
    found, expected = language.both((target, "maxabs_hw", "static"), lambda model: model.generate(prompts, **options))
    same = (found.sequences == expected.sequences)[:, -NEW:].cumprod(1).bool()
    before = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], 1)  # logits that follow from the same tokens
    each = (torch.stack(output.logits, 1)[before] for output in (found, expected))
    assert_alike(*each, 0.99)
    assert same.all(1).float().mean() >= 0.75
