"""Checks of LoRA files: whether a host loads all of one, and what it must be told. No torch."""

from fewstep.adapters.kinds import adapter_parts
from fewstep.adapters.modules import LORA_METADATA_KEY, lora_metadata
from fewstep.doctor.finding import Finding
from fewstep.doctor.subject import Check, Subject

PLAIN_FIELDS = frozenset(
    (
        *("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "bias"),
        *("lora_dropout", "fan_in_fan_out", "modules_to_save", "init_lora_weights", "peft_type"),
        *("layers_to_transform", "layers_pattern", "task_type", "inference_mode", "revision"),
        *("base_model_name_or_path", "auto_mapping", "use_rslora", "use_dora"),
    )
)
"""LoraConfig fields that are old enough to be everywhere."""


class DoesNotFit(Check):
    """A file that does not fit this base, or does nothing on it."""

    def examine(self, subject: Subject) -> Finding | None:
        if subject.unfit is None:
            return None
        ran = subject.with_fewstep is not None
        return Finding(
            "adapter/no-effect" if ran else "adapter/does-not-fit",
            "error",
            subject.unfit,
            "keep the LoRA beside 16-bit weights" if ran else "use the file made for this base",
            {"files": [str(file.header.path) for file in subject.files]},
        )


class NotPlainLora(Check):
    """A kind of adapter that no other program applies."""

    def examine(self, subject: Subject) -> Finding | None:
        for file in subject.files:
            parts = adapter_parts(file.header)
            if parts.kind == "lora":
                continue
            fix = "sample it with FewStepPipeline"
            if parts.kind == "lorad":
                fix += ", or make a LoRA of it (fewstep convert --base BASE --rank R)"
            return Finding(
                "adapter/not-plain-lora",
                "warning",
                f"{file.header.path.name} is {parts.kind_text}: stock diffusers and ComfyUI refuse "
                "it, or apply a part of it",
                fix,
                {"kind": parts.kind},
            )
        return None


class StockLoadsLess(Check):
    """A file of which stock diffusers loads nothing, or a part, and goes on."""

    def examine(self, subject: Subject) -> Finding | None:
        for file in subject.files:
            stock, wanted = file.stock, len(file.modules)
            if stock is None or stock.error is not None or stock.loaded >= wanted or not wanted:
                continue
            return Finding(
                "adapter/stock-loads-less",
                "error" if stock.loaded == 0 else "warning",
                f"{file.header.path.name} has {wanted} LoRA modules; load_lora_weights takes "
                f"{stock.loaded} of them and raises no error",
                "load it with FewStepPipeline, which converts names and counts what arrives",
                {"modules": wanted, "loaded": stock.loaded},
            )
        return None


class StockRefuses(Check):
    """A file that stock diffusers cannot load at all."""

    def examine(self, subject: Subject) -> Finding | None:
        for file in subject.files:
            is_plain = adapter_parts(file.header).kind == "lora"
            if file.stock is None or file.stock.error is None or not is_plain:
                continue
            return Finding(
                "adapter/stock-refuses",
                "error" if subject.unfit is not None else "warning",
                f"load_lora_weights of {file.header.path.name} fails: {file.stock.error}",
                "use the file made for this base"
                if subject.unfit is not None
                else "load it with FewStepPipeline, or convert it (fewstep convert)",
                {"error": file.stock.error},
            )
        return None


class AlphaTwice(Check):
    """Alphas in tensors and in metadata: diffusers refuses the file."""

    def examine(self, subject: Subject) -> Finding | None:
        for file in subject.files:
            if file.has_alpha_tensors and lora_metadata(file.header):
                return Finding(
                    "adapter/alpha-twice",
                    "error",
                    f"{file.header.path.name} holds .alpha tensors and {LORA_METADATA_KEY}: "
                    "diffusers raises ValueError (it wants one of the two)",
                    f"write it again without {LORA_METADATA_KEY} (fewstep convert)",
                )
        return None


class MetadataFields(Check):
    """Metadata that other versions of peft cannot read."""

    def examine(self, subject: Subject) -> Finding | None:
        for file in subject.files:
            fields = {key.rpartition(".")[2] for key in lora_metadata(file.header)}
            unknown = sorted(fields - PLAIN_FIELDS)
            if unknown:
                return Finding(
                    "adapter/metadata-fields",
                    "warning",
                    f"{LORA_METADATA_KEY} has {len(unknown)} fields beside the plain ones (first: "
                    f"{unknown[0]}): where peft does not know one, loading is a TypeError",
                    "write it again with the few fields that matter (fewstep convert)",
                    {"fields": unknown},
                )
        return None


class ScaleOutside(Check):
    """A scale that is not in the file's alphas, so that other hosts must be told."""

    def examine(self, subject: Subject) -> Finding | None:
        recipe = subject.recipe
        if not subject.files or recipe is None or recipe.lora.scale == 1.0:
            return None
        return Finding(
            "adapter/scale-not-in-file",
            "warning",
            f"this LoRA is right at weight {recipe.lora.scale:g}; hosts that do not read recipes "
            "apply 1",
            f"set the weight to {recipe.lora.scale:g} there",
            {"scale": recipe.lora.scale},
        )


LORA_FILE_CHECKS: tuple[Check, ...] = (
    DoesNotFit(),
    NotPlainLora(),
    StockLoadsLess(),
    StockRefuses(),
    AlphaTwice(),
    MetadataFields(),
    ScaleOutside(),
)
