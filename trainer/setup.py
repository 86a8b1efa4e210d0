"""From a config to a run: load the base, attach the adapters, encode the prompts."""

from pathlib import Path

import torch

from fewstep.errors import ConfigError
from fewstep.trainer.backbone import Backbone, load_backbone
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.evaluation import EVALUATION_SEED, DigitsEvaluator
from fewstep.trainer.generate import even_levels, generate
from fewstep.trainer.lora import LoraBank, attach
from fewstep.trainer.meters import ChannelStatistics
from fewstep.trainer.prompts import PromptBook, build_prompt_book, read_prompts
from fewstep.trainer.roles import Role, role_checkpoint
from fewstep.trainer.rollout import StudentPath
from fewstep.trainer.run import NUM_METER_IMAGES, Run
from fewstep.trainer.run_folder import RunFolder
from fewstep.trainer.stages import Setting

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEACHER_STEPS = 20
"""Steps of the teacher samples that drift is measured against."""


def build_run(config: TrainConfig) -> Run:
    """Everything a run needs, at step 0.

    Raises:
        ConfigError: The model cannot be loaded or a setting does not fit it.
        CheckpointError: The folder holds a run with other settings.
    """
    folder = RunFolder(config.out)
    folder.open(config)
    generator = torch.Generator("cpu").manual_seed(config.seed)
    backbone = load_backbone(
        model_source(config.model),
        precision=PRECISIONS[config.precision],
        device=pick_device(config.device),
        max_sequence_length=config.max_sequence_length,
    )
    bank = add_roles(config, backbone, generator)
    prompts, labels = prompts_of(config)
    book = build_prompt_book(backbone, prompts)
    grid = config.grid
    path = StudentPath(
        even_levels(backbone, grid.num_steps, grid.shift), backbone.schedule, grid.stochasticity
    )
    is_judged = config.is_digits and config.evaluation.every > 0
    shape = backbone.latent_shape(config.size_px)
    return Run(
        config=config,
        folder=folder,
        setting=Setting(backbone, book, path, config.guidance_scale),
        bank=bank,
        generator=generator,
        shape=shape,
        evaluator=DigitsEvaluator(config.evaluation.num_images, labels) if is_judged else None,
        teacher_statistics=_teacher_statistics(config, backbone, book, shape),
    )


def add_roles(config: TrainConfig, backbone: Backbone, generator: torch.Generator) -> LoraBank:
    """Attach student, critic and average to the frozen base."""
    lora = config.lora
    bank = attach(backbone.denoiser, lora.targets)
    bank.add(Role.STUDENT, rank=lora.rank, alpha=lora.alpha, generator=generator)
    bank.add(Role.AVERAGE, rank=lora.rank, alpha=lora.alpha, generator=generator)
    bank.load(Role.AVERAGE, bank.tensors(Role.STUDENT))
    critic_alpha = lora.alpha * lora.critic_rank / lora.rank
    bank.add(Role.CRITIC, rank=lora.critic_rank, alpha=critic_alpha, generator=generator)
    for parameter in bank.parameters(Role.AVERAGE):
        parameter.requires_grad_(False)  # never trained: decided here, before any optimizer
    if config.gradient_checkpointing:
        denoiser: object = backbone.denoiser
        denoiser.enable_gradient_checkpointing(role_checkpoint)  # pyright: ignore
        backbone.denoiser.train()
    return bank


def prompts_of(config: TrainConfig) -> tuple[list[str], list[int]]:
    """The run's prompts, and the digit each asks for (empty for other models).

    Raises:
        ConfigError: Another model than digits, and no prompts file.
    """
    if config.prompts:
        if config.is_digits and config.evaluation.every > 0:
            raise ConfigError(
                "digits teachers are evaluated on their own prompts; leave --prompts out, or set "
                "--evaluation.every 0"
            )
        return read_prompts(Path(config.prompts)), []
    if config.is_digits:
        from fewstep.digits.data import all_prompts

        pairs = all_prompts()
        return [prompt for prompt, _ in pairs], [label for _, label in pairs]
    raise ConfigError(f"{config.model} needs prompts; pass --prompts FILE with one per line")


def model_source(model: str) -> str:
    """A folder or hub id; the shipped teachers are unpacked once."""
    if not model.startswith("digits-"):
        return model
    from fewstep.digits.weights import teacher_folder

    return str(teacher_folder(model.removeprefix("digits-")))


def pick_device(name: str) -> torch.device:
    """The device by name; auto takes CUDA, then MPS, then the CPU."""
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ConfigError(f"device {name!r} is unknown; use auto, cpu, cuda or mps") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _teacher_statistics(
    config: TrainConfig, backbone: Backbone, book: PromptBook, shape: tuple[int, int, int]
) -> ChannelStatistics:
    path = StudentPath(
        even_levels(backbone, TEACHER_STEPS, config.grid.shift), backbone.schedule, 0.0
    )
    latents = generate(
        backbone,
        book,
        path,
        role=Role.TEACHER,
        guidance_scale=config.guidance_scale,
        prompts=[i % len(book.prompts) for i in range(NUM_METER_IMAGES)],
        seeds=range(EVALUATION_SEED, EVALUATION_SEED + NUM_METER_IMAGES),
        shape=shape,
    )
    return ChannelStatistics.of(latents)
