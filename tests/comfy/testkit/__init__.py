"""Nodes that only tests use: conditioning without a text encoder, and a way to get values out.

ComfyUI loads this folder like any node pack; tests import it as `tests.comfy.testkit`. The classes
are in ComfyUI's older style, which needs no import of ComfyUI.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

CAUGHT: dict[str, Any] = {}
"""What the capture nodes of the running graph got, by name."""

SEEN: dict[str, list[dict[str, Any]]] = {}
"""What the spied networks were called with, by the spy's name."""


def conditioning(seed: int, tokens: int, width: int, pooled: int = 0) -> dict[str, Tensor]:
    """The embeddings that FewStepTestConditioning gives for these numbers.

    Returns:
        "cond" (1, tokens, width), and "pooled" (1, pooled) unless that is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {"cond": torch.randn((1, tokens, width), generator=generator)}
    if pooled:
        made["pooled"] = torch.randn((1, pooled), generator=generator)
    return made


def latents(seed: int, *shape: int) -> Tensor:
    """The latents that FewStepTestLatent gives for this seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def left_half(height: int, width: int) -> Tensor:
    """The mask of FewStepTestMask: 1 on the left, which is drawn, 0 on the right. (1, h, w)."""
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1.0
    return mask


def _input_file(name: str) -> dict[str, Tensor]:
    import folder_paths  # pyright: ignore[reportMissingImports]

    return load_file(Path(folder_paths.get_input_directory()) / name)


class FewStepTestConditioning:
    """Random prompt embeddings, or those of a safetensors file in ComfyUI's input folder."""

    CATEGORY = "few-step tests"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 0, "min": 0, "max": 1 << 20}
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "tokens": ("INT", {**size, "default": 4}),
                "width": ("INT", {**size, "default": 128}),
                "pooled": ("INT", size),
            },
            "optional": {"file": ("STRING", {"default": ""})},
        }

    def make(
        self, seed: int, tokens: int, width: int, pooled: int, file: str = ""
    ) -> tuple[list[Any]]:
        made = _input_file(file) if file else conditioning(seed, tokens, width, pooled)
        cond = made["cond"]
        extra: dict[str, Any] = {"attention_mask": torch.ones(cond.shape[:2])}
        if "pooled" in made:
            extra["pooled_output"] = made["pooled"]
        return ([[cond, extra]],)


class FewStepTestLatent:
    """Random latents with this shape ("1,16,8,8"), or those of a safetensors file ("latent")."""

    CATEGORY = "few-step tests"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "shape": ("STRING", {"default": "1,16,8,8"}),
            },
            "optional": {"file": ("STRING", {"default": ""})},
        }

    def make(self, seed: int, shape: str, file: str = "") -> tuple[dict[str, Tensor]]:
        if file:
            return ({"samples": _input_file(file)["latent"]},)
        return ({"samples": latents(seed, *(int(size) for size in shape.split(",")))},)


class FewStepTestMask:
    """A mask of this size: the left half is drawn, the right half kept."""

    CATEGORY = "few-step tests"
    RETURN_TYPES = ("MASK",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = ("INT", {"default": 64, "min": 1, "max": 4096})
        return {"required": {"height": size, "width": size}}

    def make(self, height: int, width: int) -> tuple[Tensor]:
        return (left_half(height, width),)


class FewStepTestRecipe:
    """A recipe from its JSON, for sampling a base without an adapter."""

    CATEGORY = "few-step tests"
    RETURN_TYPES = ("FEWSTEP_RECIPE",)
    FUNCTION = "read"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "json": ("STRING", {"default": "", "multiline": True}),
                "name": ("STRING", {"default": "test"}),
            }
        }

    def read(self, json: str, name: str) -> tuple[Any]:
        from fewstep.comfy_nodes.sockets import NamedRecipe
        from fewstep.recipe import FewStepRecipe

        return (NamedRecipe(FewStepRecipe.from_json(json), name),)


class FewStepTestOrigin:
    """Which fewstep the nodes run on: the path of its first file."""

    CATEGORY = "few-step tests"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "tell"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def tell(self) -> tuple[str]:
        import fewstep

        return (str(fewstep.__file__),)


class FewStepTestSpy:
    """A MODEL whose network notes the timesteps and samples it is called with, in SEEN[name]."""

    CATEGORY = "few-step tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "watch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "name": ("STRING", {"default": "network"})}}

    def watch(self, model: Any, name: str) -> tuple[Any]:
        def note(module: Any, arguments: tuple[Any, ...]) -> None:
            sample, timestep = arguments[:2]
            call = {"timestep": timestep.clone(), "sample": sample.clone()}
            SEEN.setdefault(name, []).append(call)

        def noted(execute: Any, *args: Any, **kwargs: Any) -> Any:
            hook = execute.class_obj.diffusion_model.register_forward_pre_hook(note)
            try:
                return execute(*args, **kwargs)
            finally:
                hook.remove()

        watched = model.clone()
        watched.add_wrapper_with_key("apply_model", f"few-step test {name}", noted)
        return (watched,)


class _Anything(str):
    """A socket type that goes with every other."""

    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False


class FewStepTestCapture:
    """The end of a graph: keeps what it is given in CAUGHT[name]."""

    CATEGORY = "few-step tests"
    RETURN_TYPES = ()
    FUNCTION = "keep"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"value": (_Anything("*"), {}), "name": ("STRING", {"default": "value"})}
        }

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict[str, str]) -> bool:
        return True

    def keep(self, value: Any, name: str) -> dict[str, Any]:
        CAUGHT[name] = value
        return {"ui": {"text": (type(value).__name__,)}}


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (
        FewStepTestConditioning,
        FewStepTestLatent,
        FewStepTestMask,
        FewStepTestOrigin,
        FewStepTestRecipe,
        FewStepTestSpy,
        FewStepTestCapture,
    )
}
