"""Checks of LoRAs that are on the networks: on all experts, at the right scale. No torch."""

from fewstep.doctor.finding import Finding
from fewstep.doctor.subject import AppliedLora, Check, Subject

SAME_SCALE = 0.02
"""Relative; text boxes round."""


class OtherScale(Check):
    """A LoRA applied at another weight than it was made for."""

    def examine(self, subject: Subject) -> Finding | None:
        recipe = subject.recipe
        active = {lora.name: lora for lora in subject.loras if lora.is_active}
        if recipe is None or len(active) != 1:  # of several, which is the few-step one?
            return None
        lora, wanted = next(iter(active.values())), recipe.lora.scale
        off = [w for w in lora.weights if abs(w - wanted) > SAME_SCALE * abs(wanted)]
        if not off:
            return None
        effective = ", ".join(f"{scale:g}" for scale in lora.scales)
        return Finding(
            "adapter/other-scale",
            "error",
            f"LoRA {lora.name!r} is applied with weight {off[0]:g} (alpha / rank x weight = "
            f"{effective}), but it was made for {wanted:g}",
            f"pipe.set_adapters({lora.name!r}, {wanted:g}), or load it with FewStepPipeline",
            {"weights": list(lora.weights), "scales": list(lora.scales), "wanted": wanted},
        )


class Inactive(Check):
    """A LoRA that is attached and switched off."""

    def examine(self, subject: Subject) -> Finding | None:
        names = sorted({lora.name for lora in subject.loras if not lora.is_active})
        if not names or any(lora.is_active for lora in subject.loras if lora.name in names):
            return None
        return Finding(
            "adapter/inactive",
            "warning",
            f"LoRA {names[0]!r} is attached but switched off: it has no effect",
            f"pipe.set_adapters({names[0]!r}), or delete it",
            {"names": names},
        )


class OneOfTwoExperts(Check):
    """Wan 2.2: two networks, a LoRA on one of them."""

    def examine(self, subject: Subject) -> Finding | None:
        networks = subject.networks
        if len(networks) != 2:
            return None
        for used in (_is_merged, _is_attached):
            having = [n.component for n in networks if any(used(lora) for lora in n.loras)]
            if len(having) == 1:
                lacking = next(n.component for n in networks if n.component not in having)
                how = "merged into" if used is _is_merged else "on"
                return Finding(
                    "adapter/one-of-two-experts",
                    "error",
                    f"the LoRA is {how} {having[0]} only; {lacking}, which makes the other steps, "
                    "runs without (fuse_lora() knows one component, and unload_lora_weights() then "
                    "drops the other's)",
                    "load both files with FewStepPipeline and fuse() there, or call "
                    f"pipe.fuse_lora(components={[n.component for n in networks]})",
                    {"having": having, "lacking": lacking},
                )
        if subject.fused and not subject.loras and not subject.is_wrapped:
            return Finding(
                "adapter/fused-without-trace",
                "warning",
                f"LoRA {subject.fused[0]!r} was fused and unloaded; where fuse_lora() was called "
                f"without components, {networks[1].component} lost it",
                f"load the base again and fuse both: {[n.component for n in networks]}",
                {"fused": list(subject.fused)},
            )
        return None


class QuantisedBase(Check):
    """LoRA and weights of few bits: a merge rounds the change away."""

    def examine(self, subject: Subject) -> Finding | None:
        for network in subject.networks:
            merged = any(lora.is_merged for lora in network.loras)
            if network.quantised is None or not (network.loras or subject.files or subject.fused):
                continue
            merged = merged or bool(subject.fused)
            return Finding(
                "adapter/merged-into-quantised" if merged else "adapter/quantised-base",
                "error" if merged else "note",
                f"{network.component} is stored as {network.quantised}"
                + (
                    " and a LoRA was merged into it: changes smaller than its spacing are lost"
                    if merged
                    else ": a LoRA works beside it, and is rounded away when merged into it"
                ),
                "keep the LoRA attached (never fuse), or merge into 16-bit weights first",
                {"component": network.component, "quantised": network.quantised},
            )
        return None


class StoredInFewBits(Check):
    """A LoRA whose own matrices went to eight bits with the base."""

    def examine(self, subject: Subject) -> Finding | None:
        for network in subject.networks:
            for lora in network.loras:
                if lora.dtype.startswith(("float8", "int", "uint")):
                    return Finding(
                        "adapter/stored-in-few-bits",
                        "error",
                        f"LoRA {lora.name!r} on {network.component} is stored as {lora.dtype}: it "
                        "was loaded after the base was cast, and lost its small values",
                        "load the LoRA first, then cast the base (enable_layerwise_casting)",
                        {"component": network.component, "dtype": lora.dtype},
                    )
        return None


class CompiledWithLora(Check):
    """LoRA layers under torch.compile."""

    def examine(self, subject: Subject) -> Finding | None:
        for network in subject.networks:
            if not network.is_compiled:
                continue
            if any(not lora.is_merged for lora in network.loras):
                what = f"LoRA layers are attached to the compiled {network.component}"
            elif subject.files:
                what = f"{network.component} is compiled before its LoRA is loaded"
            else:
                continue
            return Finding(
                "adapter/compiled",
                "warning",
                f"{what}: every change of adapters or scales compiles it again, and each call pays "
                "for the extra layers",
                "fuse the LoRA first, then compile",
                {"component": network.component},
            )
        return None


ADAPTER_CHECKS: tuple[Check, ...] = (
    OneOfTwoExperts(),
    OtherScale(),
    Inactive(),
    QuantisedBase(),
    StoredInFewBits(),
    CompiledWithLora(),
)


def _is_merged(lora: AppliedLora) -> bool:
    return lora.is_merged


def _is_attached(lora: AppliedLora) -> bool:
    return lora.is_active
