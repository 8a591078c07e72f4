"""Train the tiny causal language model in `tiny_lm/` on the Python standard library's own text.

The text (reference topics and module sources) comes with every Python, so nothing is downloaded. Besides
the model and its tokenizer the script writes two texts: `heldout.txt`, documents that were never trained on,
to measure perplexity with, and `calibration.txt`, some of the training text, to calibrate with.

    python examples/llm/train_tiny_lm.py --output examples/llm/tiny_lm
"""

import argparse
import math
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
WINDOW = 256
# Bundled packages have other licences, encodings are number tables, tests are missing from some distributions.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "_bundled",
    "encodings",
    "pydoc_data",
}


def read_documents() -> list[dict[str, str]]:
    """Return the reference topics and the module sources, each sorted by name."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        # _sysconfigdata* and config-* describe how one machine built Python, not the library.
        if SKIPPED_FOLDERS.isdisjoint(parts) and not parts[-1].startswith("_sysconfig") and "config-" not in parts[0]:
            sources["/".join(parts)] = path.read_text(encoding="utf-8", errors="ignore").strip()
    return [{name: topics[name].strip() for name in sorted(topics)}, sources]


def take(documents: dict[str, str], size: int, longest: int, generator: random.Random) -> list[str]:
    """Draw names of documents, none too short or longer than `longest`, until they hold `size` characters."""
    names = [name for name, text in documents.items() if 1000 < len(text) <= longest]
    generator.shuffle(names)
    taken: list[str] = []
    while sum(len(documents[name]) for name in taken) < size:
        taken.append(names.pop())
    return sorted(taken)


def split_documents(seed: int) -> tuple[str, str, list[str]]:
    """Return the held-out text, the calibration text and the training documents, the calibration's among them."""
    generator = random.Random(seed)
    heldout, calibration, training = [], [], []
    kinds = read_documents()
    for documents in kinds:
        heldout += [documents.pop(name) for name in take(documents, 40_000, 15_000, generator)]
    # Topics quote each other, so a paragraph that is held out, or was seen before, must not be trained on.
    seen = {paragraph for text in heldout for paragraph in text.split("\n\n")}
    for documents in kinds:
        unique = {name: drop_seen_paragraphs(text, seen) for name, text in documents.items()}
        calibration += [unique[name] for name in take(unique, 40_000, 15_000, generator)]
        training += unique.values()
    return "\n\n".join(heldout) + "\n", "\n\n".join(calibration) + "\n", training


def drop_seen_paragraphs(text: str, seen: set[str]) -> str:
    """Return `text` without the paragraphs in `seen`, and add its own to them; short ones are always kept."""
    paragraphs = [part for part in text.split("\n\n") if len(part) < 80 or part not in seen]
    seen.update(paragraphs)
    return "\n\n".join(paragraphs)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which needs no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=512
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Every matrix has sides divisible by 128, so that block-wise FP8 formats fit it too."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(tokens: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield batches of windows for ever: each pass cuts the text at another offset, in another order."""
    while True:
        start = int(torch.randint(WINDOW, ()))
        windows = tokens[start : start + (len(tokens) - start) // WINDOW * WINDOW].view(-1, WINDOW)
        yield from (windows[rows] for rows in torch.randperm(len(windows)).split(batch_size) if len(rows) == batch_size)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int, batch_size: int, peak: float) -> None:
    """Run AdamW with a warm-up and a cosine decay to a fiftieth of the peak learning rate."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    progress = tqdm(zip(range(steps), batches(tokens, batch_size), strict=False), total=steps, mininterval=2)
    for step, batch in progress:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Return the perplexity per token over windows that do not overlap."""
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = [model(input_ids=part, labels=part).loss.double() * len(part) for part in windows.split(8)]
    return math.exp(sum(losses) / len(windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny_lm")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    heldout, calibration, training = split_documents(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "heldout.txt").write_text(heldout, encoding="utf-8")
    (args.output / "calibration.txt").write_text(calibration, encoding="utf-8")

    tokenizer = train_tokenizer(training, args.vocab_size)
    ids = [token for row in tokenizer(training)["input_ids"] for token in (*row, tokenizer.eos_token_id)]
    print(f"{len(training)} training documents, {sum(map(len, training))} characters, {len(ids)} tokens")
    model = build_model(tokenizer)
    train(model, torch.tensor(ids), args.steps, args.batch_size, args.learning_rate)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    saved = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.bfloat16)
    tokens = AutoTokenizer.from_pretrained(args.output)(heldout, return_tensors="pt", verbose=False).input_ids[0]
    print(f"held-out perplexity {perplexity(saved, tokens):.2f} over {len(tokens)} tokens ({len(heldout)} characters)")


if __name__ == "__main__":
    main()
