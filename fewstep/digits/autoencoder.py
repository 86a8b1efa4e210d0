"""How the digits autoencoder (TAESD's layout, 16 channels) is trained.

Latents are kept near zero mean and unit deviation per channel, so scaling_factor is 1 and
shift_factor 0, and decoded under a little noise, so small errors of a sampler do not show.
"""

from collections.abc import Callable

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from fewstep.digits.classifier import to_tensor
from fewstep.digits.data import Digits
from fewstep.digits.models import build_autoencoder

LATENT_NOISE = 0.2
CROP_PX = 32


def train_autoencoder(
    digits: Digits, *, num_steps: int, seed: int, report: Callable[[int, dict[str, float]], None]
) -> AutoencoderTiny:
    """Train on 32 px crops (four times cheaper), the last fifth of the steps on whole pictures.

    Args:
        digits: All real digits.
        num_steps: Optimizer steps of 16 crops or 4 whole pictures.
        seed: Initial weights, crops and noise.
        report: Called with (step, {name: value}) after each step.
    """
    torch.manual_seed(seed)
    model = build_autoencoder()
    images = to_tensor(digits.images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=num_steps)
    for step in range(num_steps):
        whole = step >= 0.8 * num_steps
        batch = images[torch.randint(len(images), (4 if whole else 16,))]
        batch = batch if whole else _crop(batch)
        latents = model.encoder(batch)
        noisy = latents + LATENT_NOISE * torch.randn_like(latents)
        error = model.decoder(noisy) - batch
        loss = error.square().mean() + 0.1 * error.abs().mean()
        spread = _distance_from_unit(latents)
        optimizer.zero_grad()
        (loss + 0.01 * spread).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, {"autoencoder/loss": loss.item(), "autoencoder/spread": spread.item()})
    return model.eval()


def _crop(images: Tensor) -> Tensor:
    """One crop per batch, aligned to the 8 px cells a latent stands for."""
    top, left = (int(torch.randint(0, 5, ())) * 8 for _ in range(2))
    return images[:, :, top : top + CROP_PX, left : left + CROP_PX]


def _distance_from_unit(latents: Tensor) -> Tensor:
    """How far the channels are from zero mean and unit deviation."""
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    return mean.square().mean() + (std - 1.0).square().mean()


@torch.no_grad()
def encode_all(model: AutoencoderTiny, digits: Digits, batch_size: int = 64) -> Tensor:
    """Latents of all pictures, shape (N, 16, 8, 8), float32."""
    images = to_tensor(digits.images)
    return torch.cat([model.encoder(part) for part in images.split(batch_size)])
