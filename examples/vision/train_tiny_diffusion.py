"""Train the tiny diffusion pipeline, `tiny_diffusion/`, on scikit-learn's handwritten digits.

python examples/vision/train_tiny_diffusion.py --output examples/vision/tiny_diffusion
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from digits import load_split
from torch import nn
from tqdm import tqdm

SIDE = 8
# Predicts the noise in images, with the labels as its condition: (model, images, timesteps, labels) -> noise.
Predict = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def build_unet() -> UNet2DModel:
    """Return a U-Net of two resolutions, the lower with attention."""
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(24, 48),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", clip_sample=True)


def unconditional(
    model: nn.Module, images: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    return model(images, timesteps).sample


def digits(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images of one part, `[n, 1, 8, 8]` between -1 and 1, and their labels."""
    images, labels = load_split(part)
    pixels = numpy.stack([numpy.asarray(image.convert("L")) for image in images])
    return torch.from_numpy(pixels).float()[:, None] / 127.5 - 1, torch.tensor(labels)


def train(model: nn.Module, predict: Predict, steps: int, batch_size: int) -> nn.Module:
    """Run AdamW with a warm-up and a cosine decay, and return a moving average of the weights."""
    images, labels = digits("train")
    noising = scheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
    )
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    model.train()
    progress = tqdm(range(steps), desc=type(model).__name__, mininterval=5)
    for step in progress:
        rows = torch.randint(len(images), (batch_size,))
        noise, timesteps = torch.randn(batch_size, 1, SIDE, SIDE), torch.randint(1000, (batch_size,))
        noisy = noising.add_noise(images[rows], noise, timesteps)
        loss = (predict(model, noisy, timesteps, labels[rows]) - noise).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(model)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return average.module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny_diffusion")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = train(build_unet(), unconditional, args.steps, args.batch_size)
    DDIMPipeline(model.to(torch.bfloat16), scheduler()).save_pretrained(args.output)


if __name__ == "__main__":
    main()
