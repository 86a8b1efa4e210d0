"""What a probe saw: network calls and scheduler steps of one run, as plain numbers. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SeenCall:
    """One network call.

    Attributes:
        component: Which network: "unet", "transformer", "transformer_2".
        told: The timestep it was told, in its own units.
        rows: Batch rows of the sample.
        noise: Standard deviation of the sample; its sigma, where the probe's data is all zeros.
        is_finite: Whether what it answered was without NaN and infinity.
    """

    component: str
    told: float
    rows: int
    noise: float
    is_finite: bool


@dataclass(frozen=True, slots=True)
class SeenStep:
    """One call of the scheduler's `step` and the network calls before it.

    Attributes:
        calls: The network calls whose output it got.
        timestep: What `step` was told, on the scheduler's own clock.
        is_in_table: Whether that is, to the bit, one of the scheduler's timesteps.
        sample_noise: Standard deviation of the sample it got.
        values: Numbers in that sample.
        kept: Correlation of the sample before and after: 1 where no fresh noise was added, 0 where
            all of it is fresh; None where the result is clean.
    """

    calls: tuple[SeenCall, ...]
    timestep: float
    is_in_table: bool
    sample_noise: float
    values: int
    kept: float | None


@dataclass(frozen=True, slots=True)
class SeenRun:
    """One run of a pipeline with a network that answers as if all data were zeros.

    Attributes:
        scheduler: Class name.
        num_images: Images (or videos) asked for.
        steps: In order.
        is_complete: False where the probe stopped before the last step.
        leftover: Standard deviation of the result: its noise. None if the run is not complete.
        is_repeatable: Whether a second run with the same seed was the same; None if not tried.
        starts_from_image: Whether the first sample holds an image beside noise.
        error: What the pipeline said when it failed; None if it did not.
        is_adapters_fault: Whether that was about the adapter: no effect, or none but NaN.
        said: Warnings the pipeline gave.
    """

    scheduler: str
    num_images: int
    steps: tuple[SeenStep, ...] = ()
    is_complete: bool = True
    leftover: float | None = None
    is_repeatable: bool | None = None
    starts_from_image: bool = False
    error: str | None = None
    is_adapters_fault: bool = False
    said: tuple[str, ...] = ()

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Where each step is, on the scheduler's clock."""
        return tuple(step.timestep for step in self.steps)

    @property
    def passes(self) -> float:
        """Network rows per image and step: 2 with classifier-free guidance. 0 without steps."""
        rows = sum(call.rows for step in self.steps for call in step.calls)
        return rows / (len(self.steps) * self.num_images) if self.steps else 0.0

    @property
    def spread(self) -> float:
        """What a measured sigma may be off by: five deviations of a fresh draw's own deviation."""
        is_fresh = any(step.kept is not None and step.kept < 0.99 for step in self.steps)
        return 5.0 / (2.0 * self.steps[0].values) ** 0.5 if is_fresh else 0.0

    @property
    def nfe(self) -> int:
        """Network evaluations per image seen."""
        return round(self.passes * len(self.steps))

    def told(self, index: int, total: float) -> float:
        """What the network was told at a step, on the clock 0 to `total`.

        Networks are told t, t / 1000 or 1 - t / 1000; which one shows when all steps are compared.
        """
        forms = (lambda t: t, lambda t: total * t, lambda t: total * (1.0 - t))

        def distance(form: int) -> float:
            seen = (step for step in self.steps if step.calls)
            return sum(abs(forms[form](s.calls[0].told) - s.timestep) for s in seen)

        best = forms[min(range(len(forms)), key=distance)]
        return best(self.steps[index].calls[0].told)
