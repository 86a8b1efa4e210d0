"""One run's moving parts, and what happens to them at each step; the order is in loop.py."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.trainer import checkpoint as ckpt
from fewstep.trainer.adapter import write_adapter
from fewstep.trainer.backbone import Backbone
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.evaluation import EVALUATION_SEED, Evaluator
from fewstep.trainer.generate import generate
from fewstep.trainer.learner import Learner, warm_cosine
from fewstep.trainer.lora import LoraBank
from fewstep.trainer.meters import ChannelStatistics, channel_drift
from fewstep.trainer.roles import Role
from fewstep.trainer.rollout import Draws, TauLaw, draw
from fewstep.trainer.run_folder import RunFolder
from fewstep.trainer.stages import DmdStage, Metrics, Setting, Stage, TrajectoryStage

NUM_METER_IMAGES = 100


@dataclass(slots=True)
class Run:
    """The state of a run.

    Attributes:
        config: Its settings.
        folder: Where it writes.
        setting: Base, prompts, grid.
        bank: The adapters.
        generator: Source of all randomness, on the CPU.
        shape: Latent shape (C, h, w).
        evaluator: Scores, or None where the teacher has no evaluation.
        teacher_statistics: What drift is measured against.
        step: Optimizer steps of the student done.
        best: Best score so far; infinity before the first.
        best_scores: The scores of that evaluation.
        student: Optimizer of the current stage.
        critic: Optimizer of the critic, in the second stage.
    """

    config: TrainConfig
    folder: RunFolder
    setting: Setting
    bank: LoraBank
    generator: torch.Generator
    shape: tuple[int, int, int]
    evaluator: Evaluator | None
    teacher_statistics: ChannelStatistics
    step: int = 0
    best: float = float("inf")
    best_scores: dict[str, float] = field(default_factory=dict)
    student: Learner = field(init=False)
    critic: Learner | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.start_stage()

    @property
    def backbone(self) -> Backbone:
        """The base."""
        return self.setting.backbone

    @property
    def in_warm_start(self) -> bool:
        """Whether the next step belongs to the first stage."""
        return self.step < self.config.warm_start.num_steps

    def start_stage(self) -> None:
        """Fresh optimizers for the stage the next step belongs to."""
        config = self.config
        half = config.precision == "fp16"
        if self.in_warm_start:
            rate, betas = config.warm_start.learning_rate, (0.9, 0.999)
            self.critic = None
        else:
            rate, betas = config.dmd.learning_rate, (config.dmd.beta1, 0.999)
            self.critic = Learner(
                self.bank.parameters(Role.CRITIC),
                learning_rate=config.dmd.critic_learning_rate,
                betas=betas,
                grad_clip=config.grad_clip,
                scale_loss=half,
            )
        self.student = Learner(
            self.bank.parameters(Role.STUDENT),
            learning_rate=rate,
            betas=betas,
            grad_clip=config.grad_clip,
            scale_loss=half,
        )

    def stage(self) -> Stage:
        """The losses of the next step."""
        if self.in_warm_start:
            return TrajectoryStage(self.setting, self.config.warm_start.teacher_substeps)
        return DmdStage(self.setting, self.config.dmd.normaliser_floor)

    def draw(self) -> list[Draws]:
        """The randomness of one update, cut into `accumulation` parts."""
        config = self.config
        draws = draw(
            self.setting.book,
            self.setting.path,
            self.shape,
            config.batch_size,
            tau=TauLaw(config.dmd.tau_min, config.dmd.tau_max, config.dmd.tau_shift),
            is_last_exit=config.dmd.exit == "last" and not self.in_warm_start,
            generator=self.generator,
            device=self.backbone.device,
        )
        return draws.split(config.accumulation)

    def update_student(self, stage: Stage) -> Metrics:
        """One optimizer step of the student, and of its average."""
        parts = [lambda part=part: stage.student_loss(part) for part in self.draw()]
        config = self.config
        if self.in_warm_start:
            factor = warm_cosine(self.step, config.warm_start.num_steps)
        else:
            factor = warm_cosine(self.step - config.warm_start.num_steps, config.dmd.num_steps)
        metrics = self.student.update(parts, factor)
        keep = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        self.bank.blend(Role.AVERAGE, Role.STUDENT, keep)
        return metrics

    def update_critic(self, stage: DmdStage) -> Metrics:
        """One optimizer step of the critic."""
        assert self.critic is not None
        parts = [lambda part=part: stage.critic_loss(part) for part in self.draw()]
        return self.critic.update(parts, 1.0)

    def sample(self, prompts: list[int], first_seed: int) -> Tensor:
        """Latents of the averaged student on fixed seeds."""
        return generate(
            self.backbone,
            self.setting.book,
            self.setting.path,
            role=Role.AVERAGE,
            guidance_scale=1.0,
            prompts=prompts,
            seeds=range(first_seed, first_seed + len(prompts)),
            shape=self.shape,
        )

    def meters(self) -> Metrics:
        """Latent drift of the averaged student against the teacher."""
        prompts = [i % len(self.setting.book.prompts) for i in range(NUM_METER_IMAGES)]
        latents = self.sample(prompts, EVALUATION_SEED)
        return channel_drift(ChannelStatistics.of(latents), self.teacher_statistics)

    def evaluate(self) -> Metrics:
        """Scores of the averaged student; the best so far is exported at once."""
        if self.evaluator is None:
            return {}
        latents = self.sample(self.evaluator.prompts(), EVALUATION_SEED)
        images = torch.cat([self.backbone.decode(part) for part in latents.split(100)])
        scores = self.evaluator.score(images.numpy())
        if scores[self.evaluator.key] < self.best:
            self.best, self.best_scores = scores[self.evaluator.key], scores
            self.export(scores)
        return scores

    def export(self, scores: dict[str, float]) -> None:
        """Write the averaged adapter as the run's product."""
        file = self.folder.root / "adapter" / f"{self.config.out.name}.safetensors"
        path = self.setting.path
        write_adapter(file, self.config, self.backbone, self.bank, path, scores, self.step)

    def save(self) -> None:
        """Write a checkpoint of everything the next step depends on."""
        tensors = {"generator": self.generator.get_state()}
        for role in (Role.STUDENT, Role.CRITIC, Role.AVERAGE):
            tensors |= ckpt.under(role.value, self.bank.tensors(role))
        tensors |= ckpt.under("student_optimizer", self.student.tensors())
        if self.critic is not None:
            tensors |= ckpt.under("critic_optimizer", self.critic.tensors())
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        state = {
            "config": self.config.digest(),
            "best": self.best if self.best_scores else None,
            "best_scores": self.best_scores,
        }
        ckpt.save(self.folder.checkpoints, ckpt.Checkpoint(self.step, tensors, state))

    def restore(self, checkpoint: ckpt.Checkpoint) -> None:
        """Continue where a checkpoint was written."""
        tensors, state = checkpoint.tensors, checkpoint.state
        self.step = checkpoint.step
        for role in (Role.STUDENT, Role.CRITIC, Role.AVERAGE):
            self.bank.load(role, ckpt.take(tensors, role.value))
        self.start_stage()
        self.student.load_tensors(ckpt.take(tensors, "student_optimizer"))
        if self.critic is not None:
            self.critic.load_tensors(ckpt.take(tensors, "critic_optimizer"))
        self.generator.set_state(tensors["generator"])
        self.best_scores = state["best_scores"]
        self.best = float("inf") if state["best"] is None else state["best"]
        self.folder.rewind_metrics(self.step)
