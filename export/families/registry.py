"""Every family that is exported, by the class of its stock pipeline."""

from fewstep.errors import ExportError
from fewstep.export.families.family import ExportFamily
from fewstep.export.families.flux import Flux
from fewstep.export.families.pixart import PixArt
from fewstep.export.families.qwen_image import QwenImage
from fewstep.export.families.sana import Sana
from fewstep.export.families.stable_diffusion import StableDiffusion, StableDiffusionXl
from fewstep.export.families.stable_diffusion_3 import StableDiffusion3
from fewstep.export.families.wan import Wan
from fewstep.export.families.z_image import ZImage

FAMILIES: tuple[ExportFamily, ...] = (
    StableDiffusion(),
    StableDiffusionXl(),
    StableDiffusion3(),
    Flux(),
    PixArt(),
    Sana(),
    QwenImage(),
    ZImage(),
    Wan(),
)


def family_of(class_name: str) -> ExportFamily:
    """The family a stock pipeline class is exported as.

    Raises:
        ExportError: This release cannot export it.
    """
    for family in FAMILIES:
        if class_name in family.pipelines:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise ExportError(f"{class_name} cannot be exported by this release; it exports {known}")
