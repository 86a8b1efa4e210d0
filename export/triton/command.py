"""`fewstep export triton DIR --out REPO`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import Positional

from fewstep.export.triton.configs import Device, Serving

HELP = """\
Write a model repository for NVIDIA Triton Inference Server.

Clients call one model with prompts and get pictures; it batches them, runs the recipe's loop and
calls the component models, which run on Triton's ONNX Runtime backend. fewstep must be installed in
Triton's Python: pip install fewstep.

Examples:
  fewstep export triton exported --out repository
  fewstep export triton exported --out repository --device gpu --max-batch 8
  tritonserver --model-repository repository"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonOptions:
    """Write a model repository for Triton."""

    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR")]
    """The folder `fewstep export onnx` made."""
    out: Path
    """Repository to write; appears when everything in it is whole."""
    name: str = "fewstep"
    """Clients call NAME_pipeline, which calls NAME_transformer and the others."""
    device: Device = "cpu"
    """Where the components run."""
    fused: bool = False
    """Serve the one fused graph in place of the components."""
    instances: int = 1
    """Copies of each component."""
    max_batch: int = 4
    """Pictures drawn together."""
    queue_delay_us: int = 20_000
    """How long the first request of a batch waits for others, in microseconds."""
    max_queue: int = 64
    """Requests that may wait; more are refused at once."""
    overwrite: bool = False
    """Replace what is in --out."""


def run(options: TritonOptions, console: Console) -> None:
    """Write the repository and say what is in it.

    Raises:
        FewstepError: The request cannot be served; one sentence.
    """
    from fewstep.export.triton.repository import write_repository

    models = write_repository(
        options.folder,
        options.out,
        name=options.name,
        serving=Serving(
            device=options.device,
            instances=options.instances,
            max_batch=options.max_batch,
            queue_delay_us=options.queue_delay_us,
            max_queue=options.max_queue,
        ),
        is_fused=options.fused,
        overwrite=options.overwrite,
    )
    console.print(f"wrote {options.out}: {', '.join(models)}", highlight=False)
