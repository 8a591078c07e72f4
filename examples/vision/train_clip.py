"""Train the tiny CLIP, `tiny_clip/`, on scikit-learn's handwritten digits and sentences that name them.

python examples/vision/train_clip.py --output examples/vision/tiny_clip
"""

import argparse
import sys
from pathlib import Path

import torch
from digits import load_split
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from train_digits import SIDE, augment
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
from training import fit

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SENTENCES = ("a photo of the digit {}", "the number {}", "{}", "a handwritten {}", "a drawing of a {}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of the sentences, each as a token."""
    words = sorted({word for sentence in SENTENCES for word in sentence.replace("{}", "").split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<start>", "<end>", *words, *NUMBERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, vocabulary[word]) for word in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names)


def build(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    layers = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = CLIPConfig(
        text_config=layers | text, vision_config=layers | {"image_size": SIDE, "patch_size": 8}, projection_dim=64
    )
    return CLIPModel(config)


def train(model: CLIPModel, processor: CLIPProcessor, steps: int) -> None:
    """Train on batches of every digit in equal parts; those of one digit are no rivals of each other."""
    images, labels = load_split("train")
    digit_of = torch.tensor(labels)
    rows_of = [(digit_of == digit).nonzero().flatten() for digit in range(10)]

    def loss() -> torch.Tensor:
        rows = torch.cat([own[torch.randint(len(own), (4,))] for own in rows_of])
        sentence = SENTENCES[int(torch.randint(len(SENTENCES), ()))]
        batch = processor(
            text=[sentence.format(number) for number in NUMBERS],
            images=[augment(images[row]) for row in rows],
            padding=True,
            return_tensors="pt",
        )
        return torch.nn.functional.cross_entropy(model(**batch).logits_per_image, digit_of[rows])

    fit(model, loss, steps, warmup=50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny_clip")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    size = {"height": SIDE, "width": SIDE}
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=half, image_std=half)
    processor = CLIPProcessor(images, build_tokenizer())
    model = build(processor.tokenizer)
    train(model, processor, args.steps)
    model.to(torch.bfloat16).save_pretrained(args.output)
    processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
