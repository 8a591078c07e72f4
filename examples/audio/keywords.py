"""Classify sounds with a model in FP8, the encoder of Whisper with a head: calibrated on sounds.

python examples/audio/keywords.py                  # the embedded model, on synthetic sounds in eight classes
python examples/audio/keywords.py --model MIT/ast-finetuned-speech-commands-v2 --folder sounds/   # CLASS/*.wav
"""

from __future__ import annotations

import argparse
import sys
import wave
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, PreTrainedModel

from optimum_fp8 import FP8Config, quantization_report

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from tones import RATE, sounds  # noqa: E402

TINY_WHISPER = HERE / "tiny_whisper"


def features(extractor: Any, waves: list) -> torch.Tensor:
    """What the model takes of sounds of one length, `[n, …]`."""
    return extractor(waves, sampling_rate=RATE, return_tensors="pt")[extractor.model_input_names[0]]


def read_folder(folder: Path, model: PreTrainedModel) -> tuple[list, list[int]]:
    """The WAV files (16 bits, one channel) in folders named as the model's classes, cut or repeated to a second."""
    waves, kinds = [], []
    for path in sorted(folder.glob("*/*.wav")):
        with wave.open(str(path)) as file:
            if (file.getframerate(), file.getsampwidth(), file.getnchannels()) != (RATE, 2, 1):
                raise SystemExit(f"{path}: expected one channel of 16 bits at {RATE} Hz, as sox or ffmpeg make it")
            samples = numpy.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        if path.parent.name not in model.config.label2id:
            raise SystemExit(f"{path}: the model has no class {path.parent.name!r}: {sorted(model.config.label2id)}")
        waves.append(numpy.resize(samples, RATE).astype(numpy.float32))
        kinds.append(model.config.label2id[path.parent.name])
    return waves, kinds


@torch.no_grad()
def predictions(model: PreTrainedModel, inputs: torch.Tensor) -> torch.Tensor:
    """The class of each sound, `[n]`."""
    return torch.cat([model(part.to(model.dtype)).logits.argmax(-1) for part in inputs.split(32)])


def main(arguments: list[str] | None = None) -> dict[str, torch.Tensor]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_WHISPER))
    parser.add_argument("--folder", type=Path, help="sounds of your own; a fifth of them is calibrated on")
    parser.add_argument("--sounds", type=int, default=512, help="how many synthetic ones are compared on")
    options = parser.parse_args(arguments)

    extractor = AutoFeatureExtractor.from_pretrained(options.model)
    original = AutoModelForAudioClassification.from_pretrained(options.model, dtype=torch.bfloat16)
    if options.folder:
        waves, kinds = read_folder(options.folder, original)
        calibration = waves[::5]
        waves, kinds = ([each for number, each in enumerate(both) if number % 5] for both in (waves, kinds))
    else:
        (waves, kinds), calibration = sounds(options.sounds, seed=2), sounds(64, seed=3)[0]
    rows = [{"audio": {"array": samples, "sampling_rate": RATE}} for samples in calibration]
    config = FP8Config(dataset=rows, batch_size=16)  # the feature extractor is the one beside the model
    quantized = AutoModelForAudioClassification.from_pretrained(
        options.model, dtype=torch.bfloat16, quantization_config=config
    )

    inputs, truth = features(extractor, waves), torch.tensor(kinds)
    found = {"bfloat16": predictions(original, inputs), "FP8": predictions(quantized, inputs)}
    print(f"\n{len(truth)} sounds\n{'model':10} {'accuracy':>9} {'agree':>8}")
    for name, classes in found.items():
        agree = (classes == found["bfloat16"]).float().mean()
        print(f"{name:10} {(classes == truth).float().mean():9.2%} {agree:8.2%}")
    print(f"\n{str(quantization_report(quantized)).splitlines()[0]}")
    return found | {"truth": truth}


if __name__ == "__main__":
    main()
