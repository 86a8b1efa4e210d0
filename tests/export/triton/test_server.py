"""Pictures through a real tritonserver equal those of FewStepRuntime, batched or not.

Needs the environment that `make triton` makes; skipped without it. The server is real, its Python
backend and the pipeline model are; the ONNX Runtime backend is played by onnxruntime_shim.py.
"""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.export.triton.repository import write_repository
from fewstep.runtime.few_step_runtime import FewStepRuntime
from tests.export.triton.server import ROOT, infer, metrics, running, with_shim

ENVIRONMENT = Path(os.environ.get("FEWSTEP_TRITON", str(ROOT / "build" / "triton")))
EXPORTS = os.environ.get("FEWSTEP_EXPORTS")
"""A folder with finished exports sd3 and sd15; without it they are made."""
PORT = 18400
PROMPTS = ["a handwritten seven", "a handwritten two"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(ENVIRONMENT.glob("lib/python3*/site-packages/pytriton")),
        reason="no tritonserver; run `make triton`",
    ),
]


def exported(teacher: Any) -> Path:
    """The export of a digits pipeline."""
    if EXPORTS is not None:
        return Path(EXPORTS) / teacher
    from tests import digits_exports

    return digits_exports.exported(teacher, 1.0).folder


def pictures(folder: Path, prompts: list[str], seeds: list[int], **arguments: Any) -> np.ndarray:
    runtime = FewStepRuntime.load(folder, provider="cpu", threads=1, has_cache=False)
    return runtime(prompts, seed=seeds, **arguments).pixels


@pytest.mark.parametrize("teacher", ["sd15", "sd3"])
def test_components(teacher: str, tmp_path: Path) -> None:
    folder = exported(teacher)
    repository = tmp_path / "repository"
    write_repository(folder, repository)
    with_shim(repository)
    with running(ENVIRONMENT, repository, tmp_path / "log", PORT) as address:
        found = infer(address, prompt=PROMPTS, seed=[7, 8])
        np.testing.assert_array_equal(found["image"], pictures(folder, PROMPTS, [7, 8]))
        np.testing.assert_array_equal(found["seed"], [[7], [8]])

        two = infer(address, prompt=PROMPTS[:1], seed=[3], steps=[2])
        np.testing.assert_array_equal(two["image"], pictures(folder, PROMPTS[:1], [3], steps=2))

        together = at_once(address, seeds=[1, 2, 3, 4])
        apart = pictures(folder, PROMPTS[:1] * 4, [1, 2, 3, 4])
        np.testing.assert_array_equal(np.concatenate(together), apart)

        mixed = at_once(address, seeds=[1, -1, 3, -2])
        np.testing.assert_array_equal(np.concatenate([mixed[0], mixed[2]]), apart[[0, 2]])
        assert "got -1" in str(mixed[1])
        assert "got -2" in str(mixed[3])

        with pytest.raises(RuntimeError, match="7"):
            infer(address, prompt=PROMPTS[:1], steps=[7])
        with pytest.raises(RuntimeError, match="size|multiple|pixels"):
            infer(address, prompt=PROMPTS[:1], size=[[63, 64]])
        drawn = infer(address, prompt=PROMPTS[:1])  # a seed is chosen, and told
        again = infer(address, prompt=PROMPTS[:1], seed=[int(drawn["seed"][0, 0])])
        np.testing.assert_array_equal(drawn["image"], again["image"])

        counted = counts(metrics(PORT), "fewstep_pipeline")
    assert counted["nv_inference_count"] >= 9
    assert counted["nv_inference_exec_count"] < counted["nv_inference_count"]  # batches were made


def test_the_fused_graph(tmp_path: Path) -> None:
    folder = exported("sd3")
    repository = tmp_path / "repository"
    write_repository(folder, repository, is_fused=True)
    with_shim(repository)
    with running(ENVIRONMENT, repository, tmp_path / "log", PORT + 10) as address:
        found = infer(address, prompt=PROMPTS, seed=[7, 8])["image"]
        wanted = pictures(folder, PROMPTS, [7, 8])
        assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
        with pytest.raises(RuntimeError, match="built in; leave them out"):
            infer(address, prompt=PROMPTS[:1], steps=[2])


def at_once(address: str, seeds: list[int]) -> list[Any]:
    """One request per seed, all sent at the same time: pictures, or the errors."""
    found: dict[int, Any] = {}

    def ask(seed: int) -> None:
        try:
            found[seed] = infer(address, prompt=PROMPTS[:1], seed=[seed])["image"]
        except RuntimeError as error:
            found[seed] = error

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[seed] for seed in seeds]


def counts(text: str, model: str) -> dict[str, float]:
    """Triton's counters of one model."""
    found = {}
    for line in text.splitlines():
        if f'model="{model}"' in line:
            found[line.partition("{")[0]] = float(line.rpartition(" ")[2])
    return found
