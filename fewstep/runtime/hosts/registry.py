"""Every family the runtime drives."""

from fewstep.errors import RuntimeSettingError
from fewstep.runtime.hosts.flux import FluxHost
from fewstep.runtime.hosts.host import Host
from fewstep.runtime.hosts.pixart import PixArtHost
from fewstep.runtime.hosts.qwen_image import QwenImageHost
from fewstep.runtime.hosts.sana import SanaHost
from fewstep.runtime.hosts.stable_diffusion import StableDiffusionHost, StableDiffusionXlHost
from fewstep.runtime.hosts.stable_diffusion_3 import StableDiffusion3Host
from fewstep.runtime.hosts.wan import WanHost
from fewstep.runtime.hosts.z_image import ZImageHost

HOSTS: tuple[type[Host], ...] = (
    StableDiffusionHost,
    StableDiffusionXlHost,
    StableDiffusion3Host,
    FluxHost,
    PixArtHost,
    SanaHost,
    QwenImageHost,
    ZImageHost,
    WanHost,
)


def host_of(family: str) -> type[Host]:
    """The host of a family.

    Raises:
        RuntimeSettingError: This release does not drive it.
    """
    for host in HOSTS:
        if host.family == family:
            return host
    known = ", ".join(host.family for host in HOSTS)
    raise RuntimeSettingError(
        f"this folder holds a {family} model, and this release runs {known}; upgrade fewstep"
    )
