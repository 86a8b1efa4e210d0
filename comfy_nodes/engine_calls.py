"""One call of an exported network, as ComfyUI makes it. numpy; no ComfyUI.

ComfyUI gives latents, a timestep per picture and conditioning; the family's host in
`fewstep.runtime` turns them into the graph's inputs, as it does for `FewStepRuntime`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fewstep.comfy_nodes.engine_runtime import Engine
from fewstep.errors import RuntimeSettingError
from fewstep.runtime.hosts.host import Condition, Size, cast
from fewstep.runtime.hosts.stable_diffusion import guidance_embedding

STATES = "encoder_hidden_states"
MASK = "encoder_attention_mask"


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What ComfyUI passes to a network.

    Attributes:
        sample: Latents, shape (B, C, h, w), float32, in the network's own scale.
        timesteps: In ComfyUI's units, shape (B,).
        states: Of the prompts' tokens, shape (B, L, D); None where CONDITIONING has none.
        pooled: Shape (B, D); None where CONDITIONING has none.
        mask: 1 where a token counts, shape (B, L); None where all do.
        told: Inputs of the graph that CONDITIONING sets itself: sizes, a guidance scale.
    """

    sample: np.ndarray
    timesteps: np.ndarray
    states: np.ndarray | None
    pooled: np.ndarray | None = None
    mask: np.ndarray | None = None
    told: Mapping[str, np.ndarray] = field(default_factory=dict)

    def at(self, rows: np.ndarray) -> "Call":
        """Some of its pictures."""
        kept = {
            name: None if value is None else value[rows]
            for name, value in (
                ("states", self.states),
                ("pooled", self.pooled),
                ("mask", self.mask),
            )
        }
        told = {name: value[rows] for name, value in self.told.items()}
        return Call(sample=self.sample[rows], timesteps=self.timesteps[rows], told=told, **kept)


def predict(engine: Engine, call: Call) -> np.ndarray:
    """What the network predicts, shape and sign as ComfyUI's own network of the family.

    Graphs take one timestep for all pictures; pictures at different ones are run after each other.

    Raises:
        RuntimeSettingError: A size it cannot make, or conditioning of another model.
    """
    timesteps, owners = np.unique(call.timesteps, return_inverse=True)
    if len(timesteps) == 1:
        return _at_one_timestep(engine, call)
    parts = [np.flatnonzero(owners == index) for index in range(len(timesteps))]
    found = np.empty_like(call.sample)
    for rows in parts:
        found[rows] = _at_one_timestep(engine, call.at(rows))
    return found


def size_of(engine: Engine, latents: tuple[int, ...]) -> Size:
    """The picture that latents (..., h, w) become.

    Raises:
        RuntimeSettingError: The network cannot make it; the message lists the sizes it can.
    """
    host = engine.host
    size = Size(latents[-2] * host.factor, latents[-1] * host.factor)
    step, most = host.size_multiple, engine.largest_side
    sides = (size.height, size.width)
    if all(side % step == 0 for side in sides) and (most is None or max(sides) <= most):
        return size
    up_to = "" if most is None else f" up to {most}"
    raise RuntimeSettingError(
        f"'{engine.name}' cannot make {size.width}x{size.height}: width and height must be "
        f"multiples of {step}{up_to} (trained at {host.default_size.width}x"
        f"{host.default_size.height}); set the empty latent to such a size."
    )


def _at_one_timestep(engine: Engine, call: Call) -> np.ndarray:
    host = engine.host
    size = size_of(engine, call.sample.shape)
    timestep = float(call.timesteps[0]) * engine.family.timestep_scale
    feeds = host.feeds(call.sample, timestep, _condition(engine, call), size)
    feeds |= {name: value for name, value in call.told.items() if name in feeds}
    if "timestep_cond" in feeds and "guidance" in call.told:
        feeds["timestep_cond"] = _embedded(call.told["guidance"], feeds["timestep_cond"].shape[1])
    session = engine.session(host.denoiser)
    typed = {name: cast(value, session, name) for name, value in feeds.items()}
    output = session.run(typed, [host.denoiser_output])[host.denoiser_output]
    return host.answer(output.astype(np.float32, copy=False), size)


def _embedded(guidance: np.ndarray, width: int) -> np.ndarray:
    """Guidance scales, shape (B,), as latent consistency models are told them: (B, width)."""
    return np.concatenate([guidance_embedding(float(one) - 1.0, width) for one in guidance])


def _condition(engine: Engine, call: Call) -> Condition:
    """Inputs that come from the prompt, checked against what the graph reads."""
    found: dict[str, np.ndarray | None] = {STATES: call.states}
    if engine.family.pooled is not None:
        found[engine.family.pooled] = call.pooled
    for tensor in engine.folder.manifest.graphs[engine.host.denoiser].inputs:
        if tensor.name == MASK and call.states is not None:
            every = np.ones(call.states.shape[:2], np.int64)
            found[MASK] = every if call.mask is None else call.mask
        elif tensor.name in found:
            _check_width(engine, tensor.name, found[tensor.name], tensor.dims[-1])
    return {name: value for name, value in found.items() if value is not None}


def _check_width(engine: Engine, name: str, value: np.ndarray | None, wanted: str) -> None:
    if value is not None and str(value.shape[-1]) == wanted:
        return
    what = "text" if name == STATES else "pooled output"
    got = "none" if value is None else f"{what} {value.shape[-1]} wide"
    raise RuntimeSettingError(
        f"'{engine.name}' reads {what} {wanted} wide, and this CONDITIONING has {got}; encode the "
        'prompt with the CLIP of the same "Few-Step Engine Loader".'
    )
