"""Train the tiny diffusion pipeline, `tiny_diffusion/`, on scikit-learn's handwritten digits.

python examples/vision/train_tiny_diffusion.py --output examples/vision/tiny_diffusion
"""

import argparse
import sys
from pathlib import Path

import numpy
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from digits import load_split
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from training import fit

SIDE = 8


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


def digits(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images of one part, `[n, 1, 8, 8]` between -1 and 1, and their labels."""
    images, labels = load_split(part)
    pixels = numpy.stack([numpy.asarray(image.convert("L")) for image in images])
    return torch.from_numpy(pixels).float()[:, None] / 127.5 - 1, torch.tensor(labels)


def train(model: UNet2DModel, steps: int, batch_size: int) -> nn.Module:
    """Train to predict noise, and return a moving average of the weights."""
    images, _ = digits("train")
    noising = scheduler()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))

    def loss() -> torch.Tensor:
        rows = torch.randint(len(images), (batch_size,))
        noise, timesteps = torch.randn(batch_size, 1, SIDE, SIDE), torch.randint(1000, (batch_size,))
        noisy = noising.add_noise(images[rows], noise, timesteps)
        return (model(noisy, timesteps).sample - noise).square().mean()

    options = {"warmup": 100, "learning_rate": 2e-3, "weight_decay": 0.01}
    fit(model, loss, steps, **options, after_step=lambda: average.update_parameters(model))
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
    model = train(build_unet(), args.steps, args.batch_size)
    DDIMPipeline(model.to(torch.bfloat16), scheduler()).save_pretrained(args.output)


if __name__ == "__main__":
    main()
