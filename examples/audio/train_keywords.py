"""Train the tiny classifier of sounds, `tiny_whisper/`: the encoder of Whisper with a head.

python examples/audio/train_keywords.py --output examples/audio/tiny_whisper
"""

import argparse
import sys
from pathlib import Path

import torch
from tones import NAMES, RATE, sounds
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification

sys.path.insert(0, str(Path(__file__).parents[1]))
from training import fit


def build() -> WhisperForAudioClassification:
    config = WhisperConfig(
        d_model=96,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=96,
        num_mel_bins=32,
        max_source_positions=50,
        max_target_positions=8,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        classifier_proj_size=64,
        id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
    )
    return WhisperForAudioClassification(config)


def train(model: WhisperForAudioClassification, extractor: WhisperFeatureExtractor, steps: int, count: int) -> None:
    """Train on so many sounds."""
    waves, kinds = sounds(count, seed=1)
    features = extractor(waves, sampling_rate=RATE, return_tensors="pt").input_features
    targets = torch.tensor(kinds)

    def loss() -> torch.Tensor:
        rows = torch.randint(count, (24,))
        return model(input_features=features[rows], labels=targets[rows]).loss

    fit(model, loss, steps, warmup=50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny_whisper")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--sounds", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    extractor = WhisperFeatureExtractor(feature_size=32, chunk_length=1)
    model = build()
    train(model, extractor, args.steps, args.sounds)
    model.to(torch.bfloat16).save_pretrained(args.output)
    extractor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
