"""`fewstep export onnx --precision int8-dynamic`: an fp32 folder and `quantize` on it, in one."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from fewstep.errors import ExportError
from fewstep.export.onnx_command import TRACED, OnnxOptions, export_into, load, progress_on
from fewstep.export.quantizing import command as quantizing


def run_quantized(options: OnnxOptions, console: Console) -> None:
    """Export in fp32 beside --out, write that in fewer bits into --out, leave nothing else.

    Both gates have their say: the fp32 folder is held against the pipeline, and the folder in fewer
    bits against it. --report shows the second.

    Raises:
        FewstepError: The request cannot be served, or either folder is refused.
    """
    check_precision(options)
    with float_place(options.out) as folder:
        export_float(options, folder, console)
        quantizing.run(quantize_options(options, folder), console)


def check_precision(options: OnnxOptions) -> None:
    """Refuse what the second half would refuse, before the first is made.

    Raises:
        ExportError: No fused graph is made in this precision.
        MissingExtraError: nvidia-modelopt is wanted and not installed.
    """
    from fewstep.export.quantizing.fused_form import check_fusable

    wanted = quantize_options(options, options.out)
    if options.fused:
        check_fusable(wanted.precision, wanted.activations)
    quantizing.scheme_of(wanted)


def quantize_options(options: OnnxOptions, source: Path) -> quantizing.QuantizeOptions:
    """What `quantize` is asked for."""
    assert options.precision not in TRACED
    return quantizing.QuantizeOptions(
        folder=source,
        out=options.out,
        precision=options.precision,
        fused=options.fused,
        prompts=options.prompts,
        report=options.report,
        overwrite=options.overwrite,
        force=options.force,
    )


def export_float(options: OnnxOptions, folder: Path, console: Console) -> None:
    """The fp32 folder.

    Raises:
        FewstepError: The pipeline cannot be loaded or exported, or the folder is refused.
    """
    with progress_on(console) as tell:
        merged = load(dataclasses.replace(options, precision="fp32"))
        plain = dataclasses.replace(
            options,
            precision="fp32",
            # its step count is where the fused graph in fewer bits takes its own from
            fused=options.fused_steps is not None,
            report=None,
        )
        try:
            folder.mkdir()
            export_into(folder, merged, plain, tell)
        except OSError as error:
            raise ExportError(
                f"{options.out} could not be written ({error.strerror or error}); make room or "
                "choose another place, nothing was left behind"
            ) from error


@contextmanager
def float_place(out: Path) -> Iterator[Path]:
    """Where the fp32 folder may lie for a while: on the disk of --out, which has room for it."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        yield Path(place) / "float"
