"""What is wrong with this pipeline or adapter, in sentences. `fewstep doctor` on the command line.

    from fewstep.doctor import examine

    for finding in examine(pipe, adapter="adapter.safetensors").findings:
        ...

Importing this needs no torch: only `examine`, which runs a pipeline, does when it is called.
"""

from typing import TYPE_CHECKING, Any

from fewstep.doctor.adapter_file import examine_adapter
from fewstep.doctor.finding import Diagnosis, Finding, Severity

if TYPE_CHECKING:
    from fewstep.doctor.examination import examine as examine

__all__ = ["Diagnosis", "Finding", "Severity", "examine", "examine_adapter"]


def __getattr__(name: str) -> Any:
    """`examine`, imported when it is first asked for (PEP 562)."""
    if name != "examine":
        raise AttributeError(f"module 'fewstep.doctor' has no attribute {name!r}")
    from fewstep.doctor.examination import examine

    return examine
