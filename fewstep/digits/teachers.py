"""How the two digits teachers are trained: an SD3-style flow and an SD1.5-style epsilon model.

Text encoders are trained along with the denoiser, through the pipelines' own `encode_prompt`, so
that what is trained is what every later call sees. The pipelines' default schedulers are the stock
ones users know (FlowMatchEuler with shift 3; DDIM, scaled_linear, trailing).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModelWithProjection

from fewstep.digits.data import all_prompts
from fewstep.digits.models import (
    build_projected_text_encoder,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_unet,
)

NULL_PROMPT_SHARE = 0.1
SHIFT = 3.0
"""Flow time shift of the SD3 teacher, in training and in its scheduler (SD3's own value)."""
MAX_WEIGHT = 50.0
"""Bound of the epsilon teacher's loss weight."""
T5_LENGTH = 1
"""Length of the zero block SD3 pipelines put in place of an absent T5 encoder."""
T5_LENGTH_DEFAULT = 256
"""diffusers' default for that length; one batch in eight is trained with it."""


@dataclass(frozen=True, slots=True)
class Condition:
    """Embeddings of a list of prompts.

    Attributes:
        sequence: Shape (N, tokens, width).
        pooled: Shape (N, width), or None where the denoiser takes none.
    """

    sequence: Tensor
    pooled: Tensor | None

    def take(self, index: Tensor) -> "Condition":
        """The embeddings at `index`, shape (B,) of integers."""
        return Condition(self.sequence[index], None if self.pooled is None else self.pooled[index])


def build_sd3(vae: AutoencoderTiny) -> StableDiffusion3Pipeline:
    """An untrained StableDiffusion3Pipeline around the digits autoencoder, without T5."""
    tokenizer = build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,  # pyright: ignore[reportArgumentType]
        text_encoder=build_projected_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_projected_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,  # pyright: ignore[reportArgumentType]
        tokenizer_3=None,
    )


def build_sd15(
    vae: AutoencoderTiny, words: CLIPTextModelWithProjection | None = None
) -> StableDiffusionPipeline:
    """An untrained epsilon-prediction StableDiffusionPipeline around the digits autoencoder.

    Args:
        vae: The autoencoder.
        words: A trained text encoder to start from; the SD3 teacher's first one has its shape.
    """
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(tokenizer)
    if words is not None:
        # Some releases of transformers put "text_model." before one of the two classes' names.
        learnt = {name.removeprefix("text_model."): v for name, v in words.state_dict().items()}
        text_encoder.load_state_dict(
            {name: learnt[name.removeprefix("text_model.")] for name in text_encoder.state_dict()}
        )
    return StableDiffusionPipeline(
        vae=vae,  # pyright: ignore[reportArgumentType]
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=DDIMScheduler(  # pyright: ignore[reportArgumentType]
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="trailing",
        ),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def encode_sd3(pipe: Any, prompts: list[str], t5_length: int) -> Condition:
    """SD3's condition of each prompt: sequence (N, 8 + t5_length, 128), pooled (N, 128)."""
    sequence, _, pooled, _ = pipe.encode_prompt(
        prompts,
        None,
        None,
        do_classifier_free_guidance=False,
        max_sequence_length=t5_length,
    )
    return Condition(sequence, pooled)


def encode_sd15(pipe: Any, prompts: list[str]) -> Condition:
    """SD1.5's condition of each prompt: sequence (N, 8, 64)."""
    sequence, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    return Condition(sequence, None)


def flow_loss(pipe: StableDiffusion3Pipeline, latents: Tensor, condition: Condition) -> Tensor:
    """Flow matching: `||v(x_t, sigma) - (epsilon - x0)||^2`, sigma logit-normal, then shifted.

    Sixteen channels describe what one grey value did, so noise hides a picture only near sigma 1;
    the shift puts training where the digit is decided (SD3, arXiv:2403.03206, sec. 5.3.2).
    """
    epsilon = torch.randn_like(latents)
    even = torch.sigmoid(torch.randn(len(latents), 1, 1, 1))
    sigma = SHIFT * even / (1.0 + (SHIFT - 1.0) * even)
    sample = (1.0 - sigma) * latents + sigma * epsilon
    velocity = pipe.transformer(
        sample,
        encoder_hidden_states=condition.sequence,
        pooled_projections=condition.pooled,
        timestep=1000.0 * sigma.flatten(),
    ).sample
    return functional.mse_loss(velocity, epsilon - latents)


def epsilon_loss(pipe: StableDiffusionPipeline, latents: Tensor, condition: Condition) -> Tensor:
    """Noise prediction at uniform timesteps (Ho et al. 2020, eq. 14), weighted 1 / alpha^2.

    The weight is that of v-prediction. Unweighted, errors at high noise hardly count, and that is
    where a prompt decides the digit: 4000 such steps gave digits that ignored their prompts.
    """
    epsilon = torch.randn_like(latents)
    timestep = torch.randint(1000, (len(latents),))
    sample = pipe.scheduler.add_noise(latents, epsilon, timestep)
    predicted = pipe.unet(sample, timestep, condition.sequence).sample
    weight = (1.0 / pipe.scheduler.alphas_cumprod[timestep]).clamp(max=MAX_WEIGHT)
    return (weight[:, None, None, None] * (predicted - epsilon).square()).mean()


def train_teacher(
    pipe: StableDiffusion3Pipeline | StableDiffusionPipeline,
    latents: Tensor,
    labels: Tensor,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    ema_decay: float,
    seed: int,
    report: Callable[[int, dict[str, float]], None],
) -> None:
    """Train denoiser and text encoders in place; the averaged weights are left in `pipe`.

    Args:
        pipe: From `build_sd3` or `build_sd15`.
        latents: All training latents, shape (N, 16, 8, 8).
        labels: Their classes, shape (N,).
        num_steps: Optimizer steps.
        batch_size: Pictures per step (an eighth of it with the long T5 block).
        learning_rate: Peak of a warm-up plus cosine schedule.
        ema_decay: Of the averaged weights.
        seed: Batches and noise; seed before building `pipe` for the initial weights.
        report: Called with (step, {name: value}) after each step.
    """
    torch.manual_seed(seed)
    prompts = [prompt for prompt, _ in all_prompts()]
    trained = nn.ModuleList(_trained_modules(pipe)).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(trained.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=num_steps, pct_start=0.05
    )
    average = torch.optim.swa_utils.AveragedModel(
        trained, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
    )
    for step in range(num_steps):
        is_long = isinstance(pipe, StableDiffusion3Pipeline) and step % 8 == 7
        chosen = torch.randint(len(labels), (batch_size // 8 if is_long else batch_size,))
        wanted = _prompt_index(labels[chosen], len(prompts))
        if isinstance(pipe, StableDiffusion3Pipeline):
            length = T5_LENGTH_DEFAULT if is_long else T5_LENGTH
            condition = encode_sd3(pipe, [*prompts, ""], length).take(wanted)
            loss = flow_loss(pipe, latents[chosen], condition)
        else:
            loss = epsilon_loss(
                pipe, latents[chosen], encode_sd15(pipe, [*prompts, ""]).take(wanted)
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(trained)
        report(step, {"teacher/loss": loss.item()})
    trained.load_state_dict(average.module.state_dict())
    trained.requires_grad_(False).eval()


def _trained_modules(
    pipe: StableDiffusion3Pipeline | StableDiffusionPipeline,
) -> Iterator[nn.Module]:
    if isinstance(pipe, StableDiffusion3Pipeline):
        yield from (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
    else:
        yield from (pipe.unet, pipe.text_encoder)


def _prompt_index(labels: Tensor, num_prompts: int) -> Tensor:
    """A random prompt of each picture's class; the last index, "", for a tenth of them."""
    template = torch.randint(num_prompts // 10, labels.shape)
    index = template * 10 + labels
    return torch.where(torch.rand(labels.shape) < NULL_PROMPT_SHARE, num_prompts, index)
