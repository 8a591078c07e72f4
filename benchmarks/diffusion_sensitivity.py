"""What FP8 in one part of the tiny diffusion model alone does to the noise it predicts, by timestep.

    python -m benchmarks.diffusion_sensitivity

Each row is the embedded U-Net with the layers that match a pattern in FP8, calibrated with the images of digits at
timesteps from all over, and compared with itself in float32 on 64 held-out images: the norm of the difference over that
of the predicted noise.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

VISION = Path(__file__).parents[1] / "examples" / "vision"
TIMESTEPS = (20, 150, 500, 900)
DEFAULT = "the default, without both ends"
PARTS = {
    "every layer": "",
    "`conv_in` alone, which reads the sample": "^conv_in",
    "`conv_out` alone, which writes the prediction": "^conv_out",
    "convolutions of the residual blocks alone": r"resnets\.\d\.conv",
    "embedding of the timestep alone": "^time_embedding",
    "its projections into the blocks alone": "time_emb_proj",
    "attention's layers alone": "attentions",
    "the last block alone": r"^up_blocks\.1",
}


def noisy(part: str, count: int, timesteps: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    """Digits with noise, a batch of `count` for each timestep, from the same noise each time."""
    sys.path.insert(0, str(VISION))
    from train_tiny_diffusion import digits, scheduler

    images, noising = digits(part)[0][:count], scheduler()
    found = []
    for number, timestep in enumerate(timesteps):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(number))
        times = torch.full((len(images),), timestep)
        found.append({"sample": noising.add_noise(images, noise, times), "timestep": times})
    return found


def load() -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel.from_pretrained(VISION / "tiny_diffusion", subfolder="unet").eval()


@torch.no_grad()
def predicted(model: Any, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The noise, `[timesteps, images, …]`."""
    return torch.stack([model(**batch).sample for batch in batches])


def quantized(pattern: str | None) -> Any:
    """The model with the layers that match in FP8; None: those of the default."""
    from optimum_fp8 import FP8Config, calibrate, convert, prepare

    rows = noisy("train", 16, tuple(range(0, 1000, 100)))
    if pattern is None:
        return convert(calibrate(prepare(load(), FP8Config(dataset=rows))))
    model = load()
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    others = [f"^{re.escape(name)}$" for name in names if not re.search(pattern, name)]
    config = FP8Config(dataset=rows, quantize_lm_head=True, blocklist={"names": others})
    return convert(calibrate(prepare(model, config)))


def errors(found: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """Of all timesteps together, then of each: the norm of the difference over that of what is expected."""
    pairs = [(found, expected), *zip(found, expected, strict=True)]
    return [float((one - other).norm() / other.norm()) for one, other in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    heldout = noisy("heldout", 64, TIMESTEPS)
    expected = predicted(load(), heldout)
    print(f"| in FP8 | all | {' | '.join(f't = {timestep}' for timestep in TIMESTEPS)} |")
    print(f"|---|{'---|' * (len(TIMESTEPS) + 1)}")
    for name, pattern in {**PARTS, DEFAULT: None}.items():
        row = errors(predicted(quantized(pattern), heldout), expected)
        print(f"| {name} | {' | '.join(f'{error:.3f}' for error in row)} |", flush=True)


if __name__ == "__main__":
    main()
