"""The Few-Step nodes as a folder: put together from this fewstep, and put into a ComfyUI.

Needs neither ComfyUI nor torch, and imports no node: files are read, never run.
"""

from fewstep.comfy_install.assembly import pack_files, write_new_pack, write_pack
from fewstep.comfy_install.checking import Report, check
from fewstep.comfy_install.installing import install, link, uninstall
from fewstep.comfy_install.places import ComfyUI, find_comfyui
from fewstep.comfy_install.source import Source, find_source

__all__ = [
    "ComfyUI",
    "Report",
    "Source",
    "check",
    "find_comfyui",
    "find_source",
    "install",
    "link",
    "pack_files",
    "uninstall",
    "write_new_pack",
    "write_pack",
]
