"""One run's moving parts, and what happens to them at each step; the order is in loop.py."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fewstep.trainer.adapter import write_product
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.context import Setting, StepContext
from fewstep.trainer.draws import Draws
from fewstep.trainer.evaluation import EVALUATION_SEED, Evaluator
from fewstep.trainer.generate import generate, student_speaker
from fewstep.trainer.guards import Guard
from fewstep.trainer.learner import Learner, warm_cosine
from fewstep.trainer.meters import ChannelStatistics, channel_drift
from fewstep.trainer.methods.method import Frame
from fewstep.trainer.parallel import Processes
from fewstep.trainer.roles import Role
from fewstep.trainer.run_folder import RunFolder
from fewstep.trainer.stages import Stage

Metrics = dict[str, float]
NUM_METER_IMAGES = 100


@dataclass(slots=True)
class Run:
    """The state of a run.

    Attributes:
        config: Its settings.
        folder: Where it writes.
        setting: Base, cast, prompts, data.
        frame: What the method was built on.
        stages: The method's.
        evaluator: Scores, or None where the teacher has no evaluation.
        teacher_statistics: What drift is measured against.
        step: Updates of the student (or of the critic alone, in a recording stage) done.
        stage_index: Stage of the next step; `len(stages)` when all are done.
        stage_step: Steps done in it.
        stage_start: Evaluations spent when it began.
        best: Best score so far; infinity before the first.
        best_scores: The scores of that evaluation.
        student: Optimizer of the current stage's student.
        critic: Optimizer of its critic.
        elsewhere: Evaluations that the other processes have spent, as of the last count.
        guard: What watches it.
    """

    config: TrainConfig
    folder: RunFolder
    setting: Setting
    frame: Frame
    stages: tuple[Stage, ...]
    evaluator: Evaluator | None
    teacher_statistics: ChannelStatistics
    step: int = 0
    stage_index: int = 0
    stage_step: int = 0
    stage_start: int = 0
    best: float = float("inf")
    best_scores: dict[str, float] = field(default_factory=dict)
    student: Learner | None = field(init=False, default=None)
    critic: Learner | None = field(init=False, default=None)
    elsewhere: int = field(init=False, default=0)
    guard: Guard = field(init=False)

    def __post_init__(self) -> None:
        self.guard = Guard(self.config.guard)
        for preparation in dict.fromkeys(p for stage in self.stages for p in stage.preparations):
            preparation.prepare(self.setting)  # before a checkpoint restores what was spent
        self.count_evaluations()
        self.make_learners()

    @property
    def backbone(self) -> Backbone:
        """The base."""
        return self.setting.backbone

    @property
    def processes(self) -> Processes:
        """This one among its peers."""
        return self.setting.processes

    @property
    def stage(self) -> Stage:
        """The stage of the next step."""
        return self.stages[self.stage_index]

    @property
    def is_done(self) -> bool:
        """Whether all stages are."""
        return self.stage_index >= len(self.stages)

    @property
    def evaluations(self) -> int:
        """Network evaluations of the run so far, all processes; meters and scores do not count."""
        return self.elsewhere + sum(self.backbone.evaluations.values())

    def count_evaluations(self) -> None:
        """Ask the other processes what they have spent: progress must be the same for all."""
        mine = sum(self.backbone.evaluations.values())
        self.elsewhere = sum(self.processes.gathered(mine)) - mine

    @property
    def progress(self) -> float:
        """Share of the current stage that is done, 0 to 1."""
        if not self.config.budget:
            return self.stage_step / self.stage.num_steps
        return min(1.0, (self.evaluations - self.stage_start) / self.stage_budget)

    @property
    def stage_budget(self) -> float:
        """Evaluations of the current stage, where the run has a budget."""
        return self.config.budget * self.stage.share / sum(s.share for s in self.stages)

    @property
    def total_progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        if self.is_done:
            return 1.0
        if self.config.budget:
            return min(1.0, self.evaluations / self.config.budget)
        total = sum(stage.num_steps for stage in self.stages)
        done = sum(stage.num_steps for stage in self.stages[: self.stage_index])
        return (done + self.stage_step) / total

    def student_roles(self) -> tuple[Role, ...]:
        """Who is trained in the current stage."""
        roles = self.setting.route.roles(Role.STUDENT)
        return roles if self.stage.expert is None else (roles[self.stage.expert],)

    def critic_roles(self) -> tuple[Role, ...]:
        """The critics of the current stage: one, or one per group of conditions."""
        critic = self.stage.critic
        assert critic is not None
        if not self.stage.rotates_experts:
            return (critic.role,)
        return self.setting.route.roles(critic.role)

    def make_learners(self) -> None:
        """Fresh optimizers for the stage the next step belongs to."""
        if self.is_done:
            self.student = self.critic = None
            return
        stage, cast = self.stage, self.setting.cast
        trained = [p for role in self.student_roles() for p in cast.parameters(role)]
        trained += [p for name in stage.modules for p in cast.modules[name].parameters()]
        self.student = self._learner(trained, stage.learning_rate, stage)
        self.critic = None
        if stage.critic is not None:
            follows = [p for role in self.critic_roles() for p in cast.parameters(role)]
            heads = [cast.modules[name] for name in stage.critic.modules]
            follows += [p for head in heads for p in head.parameters()]
            self.critic = self._learner(follows, stage.critic.learning_rate, stage)

    def _learner(self, parameters: list[nn.Parameter], rate: float, stage: Stage) -> Learner:
        return Learner(
            parameters,
            learning_rate=rate,
            betas=stage.betas,
            grad_clip=self.config.grad_clip,
            scale_loss=self.config.precision == "fp16",
            reduce=self.processes.average_gradients,
        )

    def contexts(self, update: int, *, with_grad: bool) -> list[StepContext]:
        """The parts of one update: this process's samples, cut into `accumulation` parts."""
        whole = range(self.config.batch_size)
        draws = Draws(self.config.seed, self.step, update, whole, self.backbone.device)
        mine = draws.split(self.processes.size)[self.processes.rank]
        return [
            StepContext(
                self.setting,
                part,
                progress=self.progress,
                expert=self.expert_of_update(draws),
                with_grad=with_grad,
                uses_data=self.stage.uses_data,
            )
            for part in mine.split(self.config.accumulation)
        ]

    def expert_of_update(self, draws: Draws) -> int | None:
        """Which expert an update trains: the stage's, or one drawn for a condition route."""
        if not self.stage.rotates_experts:
            return self.stage.expert
        return draws.shared_integer("expert", 0, len(self.setting.route.experts()))

    def update_student(self) -> Metrics:
        """One optimizer step of the student, and of its average."""
        stage, progress = self.stage, self.progress
        assert self.student is not None

        def loss(context: StepContext) -> tuple[Tensor, Metrics]:
            total, metrics = torch.zeros((), device=self.backbone.device), Metrics()
            for part in stage.terms:
                weight = part.weight_at(progress)
                if weight == 0.0:
                    continue
                value, more = part.term.loss(context)
                total = total + weight * value
                metrics |= more
            return total, metrics

        parts = [lambda c=c: loss(c) for c in self.contexts(0, with_grad=True)]
        factor = warm_cosine(progress, 1.0 / stage.num_steps)
        metrics = self.student.update(parts, factor * self.guard.slow)
        self.count_evaluations()
        keep = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for role in self.student_roles():
            average = Role(role.name.replace(Role.STUDENT.name, Role.AVERAGE.name))
            self.setting.cast.blend(average, role, keep)
        return metrics

    def update_critic(self, update: int) -> Metrics:
        """One optimizer step of the critic; `update` is 1, 2, ... within the student's step."""
        critic = self.stage.critic
        assert critic is not None
        assert self.critic is not None

        def loss(context: StepContext) -> tuple[Tensor, Metrics]:
            role = critic.role
            if self.stage.rotates_experts:
                assert context.expert is not None
                role = role.expert(context.expert)
            return critic.loss(context, role)

        parts = [lambda c=c: loss(c) for c in self.contexts(update, with_grad=False)]
        metrics = self.critic.update(parts, 1.0)
        self.count_evaluations()
        metrics["health/critic_grad_norm"] = metrics.pop("health/grad_norm")
        return metrics

    def sample(self, prompts: list[int], first_seed: int, num_steps: int | None = None) -> Tensor:
        """Latents of the averaged student on fixed seeds; the budget does not see them.

        All processes draw a part and get the whole.
        """
        counted = Counter(self.backbone.evaluations)
        path = self.frame.path
        if num_steps is not None:
            path = next(p for p in self.frame.paths if p.num_steps == num_steps)
        latents = generate(
            self.setting,
            path,
            speaker=student_speaker(self.setting.route, Role.AVERAGE),
            guidance_scale=1.0,
            prompts=prompts,
            seeds=range(first_seed, first_seed + len(prompts)),
        )
        self.backbone.evaluations = counted
        return latents

    def meters(self) -> Metrics:
        """Latent drift of the averaged student against the teacher."""
        prompts = [i % len(self.setting.book.prompts) for i in range(NUM_METER_IMAGES)]
        latents = self.sample(prompts, EVALUATION_SEED)
        return self.processes.from_main(
            lambda: channel_drift(ChannelStatistics.of(latents), self.teacher_statistics)
        )

    def evaluate(self) -> Metrics:
        """Scores of the averaged student; the best so far is exported at once.

        Where no score exists, every healthy state is: the last one stays the product.
        """
        if self.evaluator is None:
            if self.guard.is_healthy:
                self.export({})
            return {}
        judge, latents = self.evaluator, self.sample(self.evaluator.prompts(), EVALUATION_SEED)

        def score() -> dict[str, float]:
            images = torch.cat([self.backbone.decode(part) for part in latents.split(100)])
            return judge.score(images.numpy())

        scores = self.processes.from_main(score)
        if scores[self.evaluator.key] < self.best:
            self.best, self.best_scores = scores[self.evaluator.key], scores
            self.export(scores)
        return scores

    def export(self, scores: dict[str, float]) -> None:
        """Write the averaged student as the run's product."""
        if self.processes.is_main:
            write_product(self.folder, self.setting, self.frame, scores, self.step)
