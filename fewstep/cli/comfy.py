"""`fewstep comfy`: puts the Few-Step nodes into a ComfyUI. No torch, and no ComfyUI to import."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import (
    OmitArgPrefixes,
    OmitSubcommandPrefixes,
    arg,
    create_mutex_group,
    subcommand,
)

from fewstep.cli.output import Output, OutputOptions

if TYPE_CHECKING:
    from fewstep.comfy_install import ComfyUI, Report

HELP = """\
Put the Few-Step nodes into a ComfyUI, as custom_nodes/fewstep-nodes. The copy carries what it needs
of fewstep, so ComfyUI's own Python needs nothing more. Only what this verb put there is ever
replaced or removed, and a new copy takes the place of the old one whole or not at all.

Exit status of --check: 0 the pack is this fewstep's and nothing it needs is known to be missing,
3 otherwise. Both actions take --json and --quiet.

Examples:
  fewstep comfy install --comfyui path/of/ComfyUI
  fewstep comfy install --comfyui path/of/ComfyUI_windows_portable
  fewstep comfy install --comfyui path/of/ComfyUI --link     from a checkout: changes are seen
  fewstep comfy install --comfyui path/of/ComfyUI --check
  fewstep comfy install --comfyui path/of/ComfyUI --uninstall
  fewstep comfy pack --out fewstep-nodes                     the folder alone, to publish it"""

NOT_READY = 3
"""Exit status of --check where the pack is absent, another release's, or cannot run there."""
ONE_OF = create_mutex_group(required=False, title="what to do")


@dataclass(frozen=True, kw_only=True, slots=True)
class Install:
    """Put the nodes into a ComfyUI, look at them, or take them out."""

    comfyui: Annotated[Path, arg(metavar="PATH")]
    """The folder with main.py and custom_nodes/, the Windows portable folder that holds it, or the
    data folder of the desktop app."""
    copy: Annotated[bool, ONE_OF] = False
    """Copy the nodes; the default, works everywhere."""
    link: Annotated[bool, ONE_OF] = False
    """Link the node folder of this checkout, for work on the nodes."""
    check: Annotated[bool, ONE_OF] = False
    """Change nothing: say what is installed and whether it is this fewstep's."""
    uninstall: Annotated[bool, ONE_OF] = False
    """Remove the copy or link that this verb made."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """Write the node folder somewhere else: for the Comfy Registry, or to copy by hand."""

    out: Annotated[Path, arg(metavar="DIR")]
    """A new or an empty folder."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()


Action = Annotated[Install, subcommand("install")] | Annotated[Pack, subcommand("pack")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comfy:
    """Put the nodes into ComfyUI: install, pack."""

    action: OmitSubcommandPrefixes[OmitArgPrefixes[Action]]

    @property
    def output(self) -> OutputOptions:
        """How to report; each action has these options itself."""
        return self.action.output


def run(options: Comfy, output: Output) -> None:
    """Do it, and say what was done."""
    action = options.action
    if isinstance(action, Pack):
        _pack(action, output)
        return
    from fewstep.comfy_install import find_comfyui

    comfyui = find_comfyui(action.comfyui)
    if action.check:
        _check(comfyui, output)
    elif action.uninstall:
        _uninstall(comfyui, output)
    else:
        _install(comfyui, output, is_linked=action.link)


def _install(comfyui: "ComfyUI", output: Output, *, is_linked: bool) -> None:
    from fewstep.comfy_install import check, find_source, install, link

    source = find_source()
    if is_linked:
        link(comfyui, source)
    else:
        install(comfyui, source)
    report = check(comfyui, source)
    done = "linked" if is_linked else "installed"
    text = f"{_text(report)}\n{done}; restart ComfyUI, and look for few-step in the node menu"
    output.result({**report.to_dict(), "done": done}, text)


def _uninstall(comfyui: "ComfyUI", output: Output) -> None:
    from fewstep.comfy_install import uninstall

    removed = uninstall(comfyui)
    data = {"pack": str(removed.path), "removed": removed.kind}
    nothing = removed.kind == "nothing"
    text = "there is nothing to remove" if nothing else f"removed the {removed.kind}"
    output.result(data, f"{removed.path}: {text}")


def _check(comfyui: "ComfyUI", output: Output) -> None:
    from fewstep.comfy_install import check, find_source

    report = check(comfyui, find_source())
    output.result(report.to_dict(), _text(report))
    if not report.is_ready:
        sys.exit(NOT_READY)


def _pack(options: Pack, output: Output) -> None:
    from fewstep.comfy_install import find_source, pack_files, write_new_pack

    files = pack_files(find_source())
    write_new_pack(files, options.out)
    num_bytes = sum(file.stat().st_size for file in files.values())
    data: dict[str, Any] = {"folder": str(options.out), "files": len(files), "bytes": num_bytes}
    text = (
        f"{options.out}: {len(files)} files, {num_bytes / 1024:.0f} KiB; "
        'to publish, run "comfy node publish" in it'
    )
    output.result(data, text)


def _text(report: "Report") -> str:
    where = "" if report.comfyui.kind == "program" else " (data folder)"
    rows = [("ComfyUI", f"{report.comfyui.folder}{where}")]
    for one in report.requirements:
        advice = {True: "", False: ", which is too old", None: ""}[one.is_met]
        found = one.found or "not told by this folder"
        rows.append((f"{one.name} >= {one.wanted}", f"{found}{advice}"))
    rows.append(("pack", str(report.installed.path)))
    rows.append(("state", _state(report)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _state(report: "Report") -> str:
    installed = report.installed
    if installed.kind == "nothing":
        return "not installed"
    if installed.kind == "foreign":
        return 'there, but not made by "fewstep comfy install"'
    if installed.kind == "link":
        whose = "this checkout" if report.is_current else "another checkout than this"
        return f"linked to {installed.target}, {whose}"
    others = f"; {len(report.others)} files in it are not of the pack" if report.others else ""
    if report.is_current:
        return f"copy of this fewstep, {installed.version}{others}"
    shown = ", ".join(report.differing[:3]) + (", ..." if len(report.differing) > 3 else "")
    number = len(report.differing)
    what = f"{number} files differ" if number > 1 else "one file differs"
    return f"copy of fewstep {installed.version}: {what} from this one's ({shown}){others}"
