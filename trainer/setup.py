"""From a config to a run: load the base, cast the roles, encode the prompts."""

import dataclasses
from pathlib import Path

import torch

from fewstep.errors import ConfigError
from fewstep.trainer.agreement import agree_on_settings
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.base import load_base
from fewstep.trainer.components.grids import StudentPath, even_path, listed_path
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.context import Setting
from fewstep.trainer.data.images import read_images
from fewstep.trainer.data.latent_book import LatentBook, build_latent_book, digits_latents
from fewstep.trainer.data.prompt_book import PromptBook, build_prompt_book
from fewstep.trainer.data.prompt_files import PromptList, read_prompts
from fewstep.trainer.evaluation import EVALUATION_SEED, DigitsEvaluator
from fewstep.trainer.generate import generate, one_speaker
from fewstep.trainer.meters import ChannelStatistics
from fewstep.trainer.methods.method import Frame
from fewstep.trainer.methods.players import critic_policy, student_policy
from fewstep.trainer.methods.smaller import with_imitation
from fewstep.trainer.parallel import Processes
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.roles import Role, role_checkpoint
from fewstep.trainer.run import NUM_METER_IMAGES, Run
from fewstep.trainer.run_folder import RunFolder
from fewstep.trainer.stages import Stage
from fewstep.trainer.validator import validate
from fewstep.trainer.warm_init import start_from

VIDEO_FRAMES = 81
"""Frames of a clip where the config names none: Wan's own."""
TEACHER_STEPS = 20
"""Steps of the teacher samples that drift is measured against."""


def build_run(config: TrainConfig, processes: Processes = Processes()) -> Run:  # noqa: B008 frozen
    """Everything a run needs, at step 0.

    Raises:
        ConfigError: The model cannot be loaded or a setting does not fit it.
        CheckpointError: The folder holds a run with other settings.
    """
    if config.batch_size % (processes.size * config.accumulation):
        raise ConfigError(
            f"batch-size {config.batch_size} cannot be cut into {config.accumulation} parts on "
            f"each of {processes.size} processes; choose a multiple of "
            f"{processes.size * config.accumulation}"
        )
    agree_on_settings(config, processes)
    folder = RunFolder(config.out)
    if processes.is_main:
        folder.open(config)
    source, device = model_source(config.model), pick_device(config.device)
    backbone = load_base(source, config, processes, device)
    prompts = prompts_of(config)
    cache = Path(config.data.cache) if config.data.cache else None
    book = build_prompt_book(backbone, prompts, cache=cache)
    return assemble(config, backbone, book, processes)


def assemble(
    config: TrainConfig, backbone: Backbone, book: PromptBook, processes: Processes
) -> Run:
    """A run at step 0 on a loaded base with encoded prompts.

    Raises:
        ConfigError: A setting does not fit the model.
    """
    frame = build_frame(config, backbone, book)
    stages = with_imitation(frame, frame.config.method.stages(frame))
    route = config.method.route(frame)
    latents = latents_of(frame, stages)
    cast = Cast(backbone.denoiser, backbone.own_networks)
    shapes = (shape_of(config, backbone),)
    setting = Setting(backbone, cast, book, latents, shapes, route, processes)
    validate(frame, stages, setting)
    fill_cast(setting, frame, stages)
    if config.init:
        source = Path(model_source(config.model))
        start_from(Path(config.init), setting, frame, source if source.is_dir() else None)
    is_judged = config.is_digits and config.evaluation.every > 0
    labels = [int(group) for group in book.groups] if is_judged else []
    return Run(
        config=config,
        folder=RunFolder(config.out),
        setting=setting,
        frame=frame,
        stages=stages,
        evaluator=DigitsEvaluator(config.evaluation.num_images, labels) if is_judged else None,
        teacher_statistics=teacher_statistics(setting, frame),
    )


def build_frame(config: TrainConfig, backbone: Backbone, book: PromptBook) -> Frame:
    """The grids of a config on a base."""
    paths = tuple(path_of(config, backbone, count) for count in config.grid.all_steps)
    main = next(path for path in paths if path.num_steps == config.grid.num_steps)
    return Frame(config, backbone, book, paths, main)


def path_of(config: TrainConfig, backbone: Backbone, num_steps: int) -> StudentPath:
    """The student's grid of one step count."""
    grid = config.grid
    is_main = num_steps == grid.num_steps
    if grid.timesteps and is_main:
        if len(grid.timesteps) != num_steps:
            raise ConfigError(
                f"grid.timesteps has {len(grid.timesteps)} values and grid.num-steps is "
                f"{num_steps}; make them equal"
            )
        path = listed_path(backbone.schedule, grid.timesteps, stochasticity=grid.stochasticity)
    else:
        path = even_path(
            backbone.schedule, num_steps, shift=grid.shift, stochasticity=grid.stochasticity
        )
    return dataclasses.replace(path, sizes=grid.sizes) if is_main else path


def shape_of(config: TrainConfig, backbone: Backbone) -> tuple[int, ...]:
    """Latent shape of the run's pictures."""
    frames = (config.num_frames or VIDEO_FRAMES) if backbone.layout.frames else 0
    return backbone.latent_shape(config.size_px, config.size_px, frames)


def fill_cast(setting: Setting, frame: Frame, stages: tuple[Stage, ...]) -> None:
    """Student, critic, average and the method's own roles, seeded by the run's seed."""
    config, cast = frame.config, setting.cast
    generator = torch.Generator("cpu").manual_seed(config.seed)
    student = student_policy(frame)
    for role in setting.route.roles(Role.STUDENT):
        average = Role(role.name.replace(Role.STUDENT.name, Role.AVERAGE.name))
        cast.add(role, student, generator)
        cast.add(average, student, generator)
        cast.copy(average, role)
        for parameter in cast.parameters(average):
            parameter.requires_grad_(False)  # never trained: decided here, before any optimizer
    critics = [stage.critic for stage in stages if stage.critic is not None]
    rotates = any(stage.rotates_experts for stage in stages)
    for role in dict.fromkeys(critic.role for critic in critics):
        for one in setting.route.roles(role) if rotates else (role,):
            cast.add(one, critic_policy(frame), generator)
    for role, policy in config.method.roles(frame):
        cast.add(role, policy, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for name, module in config.method.modules(frame).items():
            cast.modules[name] = module.to(setting.backbone.device)
    if config.gradient_checkpointing:
        for network in (setting.backbone.denoiser, *setting.backbone.own_networks.values()):
            denoiser: object = network
            denoiser.enable_gradient_checkpointing(role_checkpoint)  # pyright: ignore
            network.train()


def prompts_of(config: TrainConfig) -> PromptList:
    """The run's prompts, with the digit each asks for where the teacher is a digits one.

    Raises:
        ConfigError: Another model than digits, and no prompts file.
    """
    if config.data.prompts:
        if config.is_digits and config.evaluation.every > 0:
            raise ConfigError(
                "digits teachers are evaluated on their own prompts; leave --data.prompts out, or "
                "set --evaluation.every 0"
            )
        return read_prompts(
            config.data.prompts, column=config.data.column, skip_bad=config.data.skip_bad
        )
    if config.is_digits:
        from fewstep.digits.data import all_prompts

        pairs = all_prompts()
        return PromptList(
            prompts=tuple(prompt for prompt, _ in pairs),
            groups=tuple(str(label) for _, label in pairs),
            skipped=0,
            source=config.model,
        )
    if config.data.images:  # the pictures' own captions
        return read_images(config.data.images, skip_bad=config.data.skip_bad).captions()
    raise ConfigError(f"{config.model} needs prompts; pass --data.prompts FILE, one per line")


def latents_of(frame: Frame, stages: tuple[Stage, ...]) -> LatentBook | None:
    """Real latents, where a stage asks for them.

    Raises:
        ConfigError: It does and there are none.
    """
    config, backbone, book = frame.config, frame.backbone, frame.book
    if not any(stage.uses_data for stage in stages):
        return None
    if config.data.images:
        cache = Path(config.data.cache) if config.data.cache else None
        return build_latent_book(
            backbone,
            config.data.images,
            book,
            area_px=config.data.area_px,
            cache=cache,
            skip_bad=config.data.skip_bad,
        )
    if config.is_digits:
        return config.method.latents(frame) or digits_latents(backbone, book)
    raise ConfigError(
        f"method {config.method.facts.name} compares with real pictures; pass --data.images "
        "FOLDER, or choose a method that needs prompts only (--list)"
    )


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


def teacher_statistics(setting: Setting, frame: Frame) -> ChannelStatistics:
    """Channel means and deviations of guided teacher samples; no part of the budget."""
    path = even_path(frame.schedule, TEACHER_STEPS, shift=frame.config.grid.shift)
    latents = generate(
        setting,
        path,
        speaker=one_speaker(Role.TEACHER),
        guidance_scale=frame.guidance_scale,
        prompts=[i % len(setting.book.prompts) for i in range(NUM_METER_IMAGES)],
        seeds=range(EVALUATION_SEED, EVALUATION_SEED + NUM_METER_IMAGES),
    )
    setting.backbone.evaluations.clear()
    return ChannelStatistics.of(latents)
