"""An exported network in the place of ComfyUI's own, and what cannot be done to it."""

from typing import Any

import comfy.model_patcher  # pyright: ignore[reportMissingImports]
import comfy.patcher_extension  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from torch import Tensor

from fewstep.comfy_nodes.engine_calls import Call, predict
from fewstep.comfy_nodes.engine_runtime import Engine
from fewstep.errors import RuntimeSettingError

TOLD = ("guidance", "time_ids", "resolution", "aspect_ratio")
"""Inputs of graphs that CONDITIONING may set itself."""


class EngineNetwork(torch.nn.Module):
    """Takes the calls that ComfyUI makes to a network; has no parameters.

    Args:
        engine: What answers them.
    """

    dtype = torch.float32

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **told: Any,
    ) -> Tensor:
        """ComfyUI's signature; wrappers that other nodes put around networks are run."""
        options = transformer_options or {}
        refuse_patches(self.engine, control, options)
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrapped = comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward, self, comfy.patcher_extension.get_all_wrappers(kind, options)
        )
        return wrapped.execute(x, timesteps, context, y, control, options, **told)

    def _forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None,
        y: Tensor | None,
        control: Any,
        transformer_options: dict[str, Any],
        **told: Any,
    ) -> Tensor:
        mask = told.get("attention_mask")
        values = {name: _array(told[name]) for name in TOLD if told.get(name) is not None}
        call = Call(
            sample=_array(x),
            timesteps=np.broadcast_to(_array(timesteps).reshape(-1), (x.shape[0],)),
            states=None if context is None else _array(context),
            pooled=None if y is None else _array(y),
            mask=None if mask is None else _array(mask).astype(np.int64),
            told=values,
        )
        return torch.from_numpy(predict(self.engine, call)).to(x)


def refuse_patches(engine: Engine, control: Any, options: dict[str, Any]) -> None:
    """Refuse what works inside a network of torch.

    Raises:
        RuntimeSettingError: A ControlNet or patches are there.
    """
    patches = {**(options.get("patches") or {}), **(options.get("patches_replace") or {})}
    what = "A ControlNet" if control else f"A patch of {next(iter(patches))}" if patches else None
    if what is not None:
        raise RuntimeSettingError(
            f"{what} cannot reach into '{engine.name}', which runs outside torch; take that node "
            "out, or use the model itself."
        )


class EnginePatcher(comfy.model_patcher.ModelPatcher):
    """A MODEL that says so when it is given a LoRA, where others would pass it over in silence."""

    def add_patches(self, *given: Any, **options: Any) -> Any:
        """Refused."""
        raise self._fixed()

    def add_hook_patches(self, *given: Any, **options: Any) -> Any:
        """Refused."""
        raise self._fixed()

    def _fixed(self) -> RuntimeSettingError:
        return RuntimeSettingError(
            f"A LoRA cannot change '{self.model.engine.name}': the weights of an engine are fixed. "
            "Export the pipeline again with the LoRA merged, or use the model itself."
        )


def _array(value: Tensor) -> np.ndarray:
    return value.detach().float().cpu().numpy()
