"""The run's product: the averaged student with its recipe, in the form its parameters need."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

import fewstep
from fewstep.adapters import (
    Component,
    RouteWeights,
    save_adapter,
    save_lorad_adapter,
    save_routed_adapter,
    save_two_time_adapter,
)
from fewstep.adapters.expert_tags import PHASE_KEY
from fewstep.recipe import Expert, FewStepRecipe, Grid, Lora, Provenance, Sampler
from fewstep.recipe_checks import expert_at
from fewstep.trainer.component_product import write_component
from fewstep.trainer.components.grids import StudentPath
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.context import Setting
from fewstep.trainer.data.prompt_groups import centroids_of
from fewstep.trainer.methods.method import Frame
from fewstep.trainer.parameters.two_time import PREFIX
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import ConditionRoute, PhaseRoute
from fewstep.trainer.run_folder import RunFolder


def product_file(config: TrainConfig) -> Path:
    """Where a run's adapter is written; experts of phases are beside it, with their names added."""
    return config.out / "adapter" / f"{config.out.name}.safetensors"


def build_recipe(frame: Frame, scores: dict[str, float], step: int) -> FewStepRecipe:
    """The recipe of what was trained: its grids, its steps, no guidance; the method's last word."""
    config, backbone, main = frame.config, frame.backbone, frame.path
    recipe = FewStepRecipe(
        base=backbone.base(config.model),
        grids=tuple(grid_of(path, backbone.experts) for path in frame.paths),
        experts=backbone.experts,
        default_steps=main.num_steps,
        sampler=Sampler(
            kind="flow_map" if config.lora.student == "two-time" else "step",
            stochasticity=main.stochasticity,
        ),
        guidance=backbone.guidance,
        lora=Lora(alpha="baked"),
        provenance=Provenance(
            objective=f"{config.method.facts.name}, {step} steps",
            teacher=f"{config.model}, guidance {config.guidance_scale:g}",
            config_hash=config.digest(),
            scores=scores or None,
            created_by=f"fewstep {fewstep.__version__}",
        ),
    )
    return config.method.recipe(recipe, frame)


def grid_of(path: StudentPath, experts: tuple[Expert, ...] = ()) -> Grid:
    """A path as the recipe stores it."""
    sigmas = tuple(level.sigma for level in path.levels)
    return Grid(
        timesteps=tuple(level.timestep for level in path.levels[:-1]),
        sigmas=sigmas,
        experts=tuple(expert_at(experts, sigma) for sigma in sigmas[:-1]) if experts else (),
        sizes=path.sizes,
    )


def write_product(
    folder: RunFolder, setting: Setting, frame: Frame, scores: dict[str, float], step: int
) -> Path:
    """Save the averaged student, or all of them, after `step` steps.

    Returns:
        The file; of experts for phases of noise, of a pipeline's two networks and of a student
        that is a network of its own the folder that has them.
    """
    file = product_file(frame.config)
    file = folder.root / file.parent.name / file.name
    recipe = build_recipe(frame, scores, step)
    if isinstance(setting.route, PhaseRoute):
        return _write_phases(file, setting, frame, recipe)
    if isinstance(setting.route, ConditionRoute):
        return _write_routes(file, setting, frame, recipe)
    own = setting.cast.own_networks.get(Role.AVERAGE.name)
    if own is not None:
        return write_component(file.with_suffix(""), own, frame.backbone.component, recipe)
    tensors = setting.cast.tensors(Role.AVERAGE)
    if frame.backbone.experts:
        return _write_networks(file, tensors, frame, recipe)
    return _write_one(file, tensors, frame, recipe)


def product_of(config: TrainConfig) -> Path | None:
    """The file or folder that `write_product` wrote, if it did."""
    file = product_file(config)
    for one in (file, file.with_suffix("")):
        if one.exists():
            return one
    return file.parent if any(file.parent.glob("*.safetensors")) else None


def _write_one(
    file: Path,
    tensors: Mapping[str, Tensor],
    frame: Frame,
    recipe: FewStepRecipe,
    metadata: Mapping[str, str] | None = None,
    component: Component | None = None,
) -> Path:
    """One LoRA, alone or with a two-time head, or one set of rotations."""
    component = component or frame.backbone.component
    lora, (title, description) = frame.config.lora, _texts(frame, recipe)
    if lora.student == "lorad":
        return save_lorad_adapter(
            file,
            tensors,
            recipe=recipe,
            title=title,
            component=component,
            description=description,
            metadata=metadata,
        )
    if lora.student == "two-time":
        head = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
        return save_two_time_adapter(
            file,
            {name: t for name, t in tensors.items() if not name.startswith(PREFIX)},
            head,
            recipe=recipe,
            rank=lora.rank,
            alpha=lora.alpha,
            title=title,
            component=component,
            description=description,
            metadata=metadata,
        )
    return save_adapter(
        file,
        tensors,
        recipe=recipe,
        rank=lora.rank,
        alpha=lora.alpha,
        title=title,
        component=component,
        description=description,
        metadata=metadata,
    )


def _write_phases(file: Path, setting: Setting, frame: Frame, recipe: FewStepRecipe) -> Path:
    """One file per expert, each with the whole recipe and its own name in the metadata.

    Files of different moments carry different recipes, which is an error when they are loaded: a
    run that dies between two of them leaves no pair that looks right.
    """
    for role, expert in zip(setting.route.roles(Role.AVERAGE), recipe.experts, strict=True):
        one = file.with_name(f"{file.stem}-{expert.adapter}{file.suffix}")
        _write_one(one, setting.cast.tensors(role), frame, recipe, {PHASE_KEY: expert.adapter})
    return file.parent


def _write_networks(
    file: Path, tensors: Mapping[str, Tensor], frame: Frame, recipe: FewStepRecipe
) -> Path:
    """One file per network of a pipeline that has one for each part of the noise (Wan 2.2)."""
    phases = {expert.component: expert.adapter for expert in recipe.experts}
    for component, part in frame.backbone.by_component(tensors).items():
        name = phases[component]
        one = file.with_name(f"{file.stem}-{name}{file.suffix}")
        _write_one(one, part, frame, recipe, {PHASE_KEY: name}, component)
    return file.parent


def _write_routes(file: Path, setting: Setting, frame: Frame, recipe: FewStepRecipe) -> Path:
    """All experts in one file, each with the mean embedding of its prompts."""
    assert isinstance(setting.route, ConditionRoute)
    roles = setting.route.roles(Role.AVERAGE)
    centroids = centroids_of(setting.book, setting.route.groups)
    names = [route.adapter for route in recipe.routes]
    title, description = _texts(frame, recipe)
    return save_routed_adapter(
        file,
        {
            name: RouteWeights(setting.cast.tensors(role), centroid)
            for name, role, centroid in zip(names, roles, centroids, strict=True)
        },
        recipe=recipe,
        rank=frame.config.lora.rank,
        alpha=frame.config.lora.alpha,
        title=title,
        component=frame.backbone.component,
        description=description,
    )


def _texts(frame: Frame, recipe: FewStepRecipe) -> tuple[str, str]:
    """Title and description for people."""
    config = frame.config
    steps = ", ".join(str(path.num_steps) for path in frame.paths)
    return (
        f"{config.out.name}: {config.model} in {steps} steps",
        f"Distilled with fewstep: {recipe.provenance.objective}.",
    )
