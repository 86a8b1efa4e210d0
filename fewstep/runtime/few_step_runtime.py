"""FewStepRuntime: an export folder drawn by its recipe, without torch.

    runtime = FewStepRuntime.load("exported/")
    runtime("a handwritten seven", seed=7).images[0].save("seven.png")

The same seed gives FewStepPipeline's picture: same plan, same noise, same rounding.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fewstep.errors import RuntimeSettingError
from fewstep.noise import NoiseBatch
from fewstep.recipe import FewStepRecipe
from fewstep.recipe_plan import first_noise_scale, plan_steps
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.hosts.host import Host, Parts, Size
from fewstep.runtime.output import RuntimeOutput
from fewstep.runtime.pictures import Picture, read_picture, to_pil, to_uint8
from fewstep.runtime.prompt_cache import PromptCache
from fewstep.runtime.request import Request, StepEvent, make_request
from fewstep.runtime.sampling_loop import Guided, Loop, is_guided
from fewstep.runtime.session import Loader, Session
from fewstep.sampling import add_noise
from fewstep.start_rules import snap_start
from fewstep.trajectory import PlannedStep

Callback = Callable[[StepEvent], None]


class FewStepRuntime:
    """A few-step model in an export folder; made by `load`. Calls are safe from several threads.

    Attributes:
        recipe: How it is sampled.
        folder: Where it lies.
    """

    def __init__(self, folder: ExportFolder, loader: Loader, host: type[Host]) -> None:
        self.folder, self._loader = folder, loader
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._cache = PromptCache()
        parts = Parts(self._session, folder.tokenizer)
        self._host = host(folder.manifest, folder.recipe, parts)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        provider: str = "auto",
        threads: int = 0,
        has_cache: bool = True,
        verify: bool = False,
    ) -> "FewStepRuntime":
        """Open an export folder.

        Args:
            folder: What `fewstep export onnx --out` made.
            provider: "cpu", "cuda", "tensorrt", "coreml", "directml", "openvino"; "auto" measures
                those that are there once, and remembers the fastest for this model and machine.
                "openvino-bf16" is far quicker where the processor has AMX; its pictures are near
                the others', not equal, so it is used only where it is named.
            threads: Of one network call; 0 takes the engine's choice.
            has_cache: Whether optimised graphs are kept for the next start.
            verify: Whether every file's checksum is compared first (reads all of it).

        Raises:
            ExportFolderError: The folder is damaged or of another release.
            RuntimeSettingError: The family or provider is not there. A provider that is there and
                cannot start is refused when the first graph is loaded.
        """
        from fewstep.runtime.hosts.registry import host_of
        from fewstep.runtime.providers import make_loader

        opened = ExportFolder.open(folder, verify=verify)
        host = host_of(opened.manifest.family)
        loader = make_loader(opened, provider, threads=threads, has_cache=has_cache)
        return cls(opened, loader, host)

    @property
    def recipe(self) -> FewStepRecipe:
        """The recipe in force."""
        return self.folder.recipe

    @property
    def provider(self) -> str:
        """The engine that runs the graphs."""
        return self._loader.name

    def warm_up(self, size: tuple[int, int] | None = None) -> "FewStepRuntime":
        """Load every graph and draw one picture, so that the first real one is not slower.

        Of a model that makes clips it is a clip of one picture.
        """
        frames = 1 if self.folder.manifest.makes_clips else None
        self("", seed=0, size=size, frames=frames)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        num_images: int = 1,
        image: Picture | None = None,
        strength: float = 0.6,
        callback: Callback | None = None,
        stop: threading.Event | None = None,
    ) -> RuntimeOutput:
        """Draw.

        Args:
            prompt: A text, or several.
            negative_prompt: Looked at only by recipes with guidance; one, or one per prompt.
            seed: Of the first picture, the next has seed + 1; or one per picture.
            steps: Step count; None takes the recipe's.
            size: (height, width) in pixels; None takes what the model was trained at.
            frames: Pictures of a clip, for models that make clips; None takes the model's own.
            num_images: Pictures of each prompt.
            image: A picture to start from (image to image).
            strength: Where image to image starts, 0 to 1; snaps to the trained level nearest.
            callback: Told of every step.
            stop: Set it from another thread to stop between two steps, or before the decoding.

        Raises:
            RuntimeSettingError: A size or count the model cannot make.
            RecipeError: A step count it was not made for.
            GenerationStopped: `stop` was set.
        """
        host = self._host
        start = None if image is None else read_picture(image, _size(size))
        chosen = _size(size) or (host.default_size if start is None else Size(*start.shape[2:]))
        asked = host.default_size.frames if frames is None else frames
        chosen = Size(chosen.height, chosen.width, asked)
        host.check_size(chosen)
        request = make_request(
            prompt, negative_prompt, seed=seed, steps=steps, size=chosen, num_images=num_images
        )
        latents = self._latents(request, start, strength, callback, stop)
        rate = self.folder.manifest.settings.get("frames_per_second")
        return RuntimeOutput(to_uint8(host.decode(latents)), request.seeds, rate)

    def _latents(
        self,
        request: Request,
        start: np.ndarray | None,
        strength: float,
        callback: Callback | None,
        stop: threading.Event | None,
    ) -> np.ndarray:
        host, recipe = self._host, self.recipe
        plan = plan_steps(recipe, request.steps, mu=host.shift(request.size, request.steps))
        noise = NoiseBatch(request.seeds)
        shape = host.latent_shape(request.size)
        if start is None:
            sample = noise.draw(shape) * np.float32(first_noise_scale(recipe, plan[0].level))
        else:
            plan, sample = self._from_picture(plan, start, strength, noise, shape, request)
        loop = Loop(
            host=host,
            denoisers=tuple(self._session(name) for name in host.denoisers),
            plan=plan,
            guided=self._guided(request),
            size=request.size,
            noise=noise,
            told=self._teller(callback),
            stop=stop,
        )
        return loop.run(sample)

    def _from_picture(
        self,
        plan: tuple[PlannedStep, ...],
        start: np.ndarray,
        strength: float,
        noise: NoiseBatch,
        shape: tuple[int, ...],
        request: Request,
    ) -> tuple[tuple[PlannedStep, ...], np.ndarray]:
        begun = snap_start(self.recipe, plan, strength)
        rest = begun.plan[begun.index :]
        pictures = np.repeat(start, len(request.seeds), axis=0)
        clean = self._host.encode_image(pictures, noise.draw)
        return rest, add_noise(clean, noise.draw(shape), rest[0].level)

    def _guided(self, request: Request) -> Guided:
        host, guidance = self._host, self.recipe.guidance
        condition = self._cache.conditions("prompt", request.prompts, host.encode)
        if not is_guided(self.recipe):
            if request.negative and any(request.negative):
                warnings.warn(
                    "the negative prompt has no effect: this model runs with guidance "
                    f"{guidance.mode!r}",
                    stacklevel=4,
                )
            return Guided(condition, None, 1.0)
        texts = request.negative or tuple(host.no_negative for _ in request.prompts)
        other = self._cache.conditions("negative", texts, host.unconditional)
        return Guided(condition, other, guidance.scale)

    def _teller(self, callback: Callback | None) -> Callable[[int, int, np.ndarray], None]:
        def tell(index: int, count: int, x0: np.ndarray) -> None:
            if callback is not None:
                preview = lambda: to_pil(to_uint8(self._host.preview(x0)))  # noqa: E731
                callback(StepEvent(index, count, x0, preview))

        return tell

    def _session(self, name: str) -> Session:
        with self._lock:
            if name not in self._sessions:
                graph = self.folder.manifest.graphs.get(name)
                if graph is None:
                    raise RuntimeSettingError(
                        f"this folder has no {name}; export the pipeline again with it"
                    )
                self._sessions[name] = self._loader.load(graph)
            return self._sessions[name]


def _size(size: tuple[int, int] | None) -> Size | None:
    return None if size is None else Size(*size)
