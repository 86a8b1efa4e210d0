"""NVIDIA's own bindings, loaded over empty libraries: what can be tried of them without a GPU.

Needs gcc and the package index: python -m pytest -m network tests/export/tensorrt
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.tensorrt import surface as tool
from tests.export.tensorrt.fake_library import surface

pytestmark = pytest.mark.network

TRY = """
import sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt

import numpy as np
from rich.progress import Progress
from fewstep.errors import RuntimeSettingError
from fewstep.export.tensorrt.monitor import BuildProgress, make_monitor
from fewstep.runtime.tensorrt.engine import ELEMENT_TYPES, make_log, started
from fewstep.runtime.tensorrt.preflight import require_tensorrt

assert require_tensorrt() == sys.argv[2]
log = make_log()
log.log(trt.ILogger.Severity.ERROR, "first")
log.log(trt.ILogger.Severity.INFO, "not kept")
assert log.errors == ["first"]
monitor = make_monitor(BuildProgress(Progress(disable=True), lambda: True))
monitor.phase_start("Building Engine", None, 3)
assert monitor.step_complete("Building Engine", 0) is False
monitor.phase_finish("Building Engine")
values = np.ones((4, 4), np.float32)
weights = trt.Weights(trt.DataType.FLOAT, values.ctypes.data, values.size)
assert (weights.size, weights.nbytes) == (16, 64)
assert tuple(trt.Dims([1, -1, 3])) == (1, -1, 3)
assert ELEMENT_TYPES[trt.DataType.HALF.name] == "float16"
for factory in (trt.Builder, trt.Runtime):
    try:
        started(factory, make_log())
    except RuntimeSettingError as error:
        assert "did not start" in str(error)
    else:
        raise AssertionError("an empty library cannot have started")
"""


@pytest.mark.parametrize("version", tool.VERSIONS)
def test_names_and_calls(version: str, tmp_path: Path) -> None:
    unpacked = tool.wheel(tmp_path, tool.VERSIONS[version], version)
    stubs = tool.empty_libraries(tmp_path / "stubs", major=version.partition(".")[0])
    names = json.loads(tool.dump(unpacked, "tensorrt_bindings", version, stubs))
    assert names == surface("tensorrt", version)
    subprocess.run(
        [sys.executable, "-c", TRY, str(unpacked), version],
        check=True,
        env=os.environ | {"LD_LIBRARY_PATH": str(stubs)},
    )
