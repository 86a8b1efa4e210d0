"""What ComfyUI makes of LoRA files: run as a program, where ComfyUI can be imported.

    python tests/comfyui_key_map.py COMFYUI_PATH JOBS.json

JOBS is a list of {"name", "class", "config", "file", "expected"}: a class of comfy.supported_models
with its unet_config, a LoRA file, and a file of the weight deltas that it should make, by ComfyUI's
weight names. One JSON object per job is printed: how many tensors of the file the key map took, the
names it did not take, weights of another shape than expected, and the largest difference of a
delta relative to its largest value.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(comfyui: str, jobs_file: str) -> None:
    """Run every job."""
    sys.argv = ["fewstep", "--cpu"]
    sys.path.insert(0, comfyui)
    import logging

    logging.disable(logging.WARNING)
    import comfy.options  # pyright: ignore

    comfy.options.enable_args_parsing()
    for job in json.loads(Path(jobs_file).read_text(encoding="utf-8")):
        sys.stdout.write(f"{json.dumps(run(job))}\n")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load one file the way ComfyUI's LoraLoader does."""
    import comfy.lora  # pyright: ignore
    import comfy.lora_convert  # pyright: ignore
    import comfy.model_patcher  # pyright: ignore
    import comfy.supported_models  # pyright: ignore
    import torch
    from safetensors.torch import load_file

    kind = vars(comfy.supported_models)[job["class"]]
    config = kind({**kind.unet_config, **job["config"]})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="meta")
    lora = comfy.lora_convert.convert_lora(load_file(job["file"]))
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    loaded = comfy.lora.load_lora(lora, key_map, log_missing=False)
    taken = set()
    for adapter in loaded.values():
        taken |= set(getattr(adapter, "loaded_keys", ()))
    device = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, device, device)
    patched = patcher.add_patches(loaded)
    expected = load_file(job["expected"])
    shapes = {name: tuple(values.shape) for name, values in model.state_dict().items()}
    worst, other_shapes = 0.0, []
    for name, patches in patcher.patches.items():
        wanted = expected.pop(name)
        if shapes[name] != wanted.shape:
            other_shapes.append(name)
        delta = comfy.lora.calculate_weight(patches, torch.zeros_like(wanted), name)
        worst = max(worst, float((delta - wanted).abs().max() / wanted.abs().max()))
    return {
        "name": job["name"],
        "tensors": len(lora),
        "taken": len(taken),
        "not_taken": sorted(set(lora) - taken)[:5],
        "weights": len(patched),
        "not_patched": sorted(expected)[:5],
        "other_shapes": other_shapes,
        "error": worst,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
