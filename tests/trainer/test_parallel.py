"""Two processes are one: same global batch, same adapters, whether the base is whole or cut."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.digits.models import build_autoencoder
from fewstep.digits.teachers import build_sd3
from fewstep.errors import ConfigError
from fewstep.trainer import checkpoint, parallel
from fewstep.trainer.__main__ import main
from fewstep.trainer.backbones.loading import wrap_pipeline
from fewstep.trainer.config import LoraConfig, TrainConfig
from fewstep.trainer.launch import is_on_cpu, is_one_of_several, join
from fewstep.trainer.loop import train
from fewstep.trainer.parallel import Processes, buckets
from fewstep.trainer.parameters.policies import matching_layers
from fewstep.trainer.recipes import RECIPES
from fewstep.trainer.run_folder import RunFolder, flat_settings
from fewstep.trainer.setup import build_run
from fewstep.trainer.sharding import blocks_of
from tests.trainer import parallel_cases as cases
from tests.trainer.backbone_cases import (
    FLUX_DEV,
    PIXART,
    QWEN_IMAGE,
    SANA,
    SD3,
    SDXL_V,
    WAN21,
    WAN22,
    Z_IMAGE,
    Case,
)

TOLERANCE = 1e-5
"""Of the norm: sums in another order, then AdamW."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained digits pipeline with a narrow denoiser on disk, and a prompts file beside it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    pipe: Any = build_sd3(build_autoencoder())
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
    network = type(pipe.transformer).from_config({**pipe.transformer.config, **sizes})
    pipe.register_modules(transformer=network)
    pipe.save_pretrained(folder / "sd3")
    (folder / "prompts.txt").write_text("seven\nthree\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, and what one made of the half run they left it."""
    folder = tmp_path_factory.mktemp("out")
    cases.half_a_run(cases.config_for(model, folder / "one-then-two"))
    cases.spawn(model, folder)
    train(cases.config_for(model, folder / "two-then-one"))
    return folder


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    train(cases.config_for(model, folder))
    return folder


@pytest.fixture(scope="module")
def halves(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process that computes the two halves of each batch in turn."""
    folder = tmp_path_factory.mktemp("halves") / "run"
    train(cases.config_for(model, folder, accumulation=2))
    return folder


def last(run: Path) -> checkpoint.Checkpoint:
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    return found


def numbers(run: Path, role: str, half: str) -> Tensor:
    """All of a role's downs (lora_A) or ups (lora_B, 0 at the start) at the end of a run."""
    tensors = checkpoint.take(last(run).tensors, f"role/{role}")
    return torch.cat([tensors[key].flatten() for key in sorted(tensors) if half in key])


@pytest.mark.parametrize("name", [*cases.RUNS, "two-then-one", "one-then-two"])
def test_two_processes_train_what_one_does(out: Path, single: Path, name: str) -> None:
    mine, its = last(out / name), last(single)
    assert mine.step == its.step >= 3
    assert mine.state["evaluations"] == its.state["evaluations"]
    for role in ("student", "critic", "average"):
        for half in ("lora_A", "lora_B"):
            found, expected = numbers(out / name, role, half), numbers(single, role, half)
            assert expected.abs().max() > 1e-4
            assert (found - expected).norm() < TOLERANCE * expected.norm(), (role, half)


@pytest.mark.parametrize("name", [*cases.RUNS, "resumed"])
def test_cutting_checkpointing_and_resuming_change_no_bit(
    out: Path, halves: Path, name: str
) -> None:
    """Nor does it matter whether the halves of a batch are two processes' or one's."""
    expected, found = last(halves).tensors, last(out / name).tensors
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_metrics_are_those_of_the_whole_batch(out: Path, single: Path) -> None:
    rows, expected = (RunFolder(run).read_metrics() for run in (out / "sharded", single))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert any("health/mean_drift" in row for row in rows)
    for row, its in zip(rows, expected, strict=True):
        assert row.keys() == its.keys()
        for name in row.keys() - {"time/step_s", "memory/peak_gib"}:
            assert row[name] == pytest.approx(its[name], rel=1e-4, abs=1e-5), name


def test_the_product_is_written_once_and_is_the_same(out: Path) -> None:
    files = [out / name / "adapter" / f"{name}.safetensors" for name in ("sharded", "resumed")]
    one, other = (load_file(file) for file in files)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name])


def test_pictures_do_not_depend_on_the_number_of_processes(model: Path, out: Path) -> None:
    mine, other = (load_file(out / f"pictures-{rank}.safetensors") for rank in range(2))
    run = cases.finished(cases.config_for(model, out / "sharded"))
    for name, arguments in (("five", cases.PICTURES), ("one", ([1], 5))):
        assert torch.equal(mine[name], other[name])
        expected = run.sample(*arguments)
        torch.testing.assert_close(mine[name], expected, rtol=1e-5, atol=1e-5)


def facts(out: Path) -> list[dict[str, Any]]:
    return [json.loads((out / f"facts-{rank}.json").read_text()) for rank in range(2)]


def test_gradients_are_reduced_once_per_optimizer_step(out: Path) -> None:
    for fact in facts(out):
        assert fact["reductions"] == {"critic": 1, "student": 1}


def test_each_process_holds_its_share_of_a_cut_base(out: Path) -> None:
    """After training and sampling: blocks are cut again when they have run."""
    shares = [fact["share"] for fact in facts(out)]
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares) < 0.51


def test_a_parameter_nobody_reached_stays_without_gradient(out: Path) -> None:
    """As in one process, where AdamW passes it over: rotating experts depend on it."""
    for fact in facts(out):
        assert fact["averages"] == [2.0, 2.0, None]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("seed", "process 1 of 2 has seed 1, process 0 has 0"),
        ("weights", "process 1 of 2 has weights of transformer_2 "),
        ("checkpoint", "process 1 of 2 has a run at step 1, process 0 has 0"),
    ],
)
def test_processes_that_were_started_differently_are_refused(
    out: Path, what: str, message: str
) -> None:
    for fact in facts(out):
        assert fact["refusals"][what].startswith(message)
        assert fact["refusals"][what].endswith("with the same command on the same files")


@pytest.mark.parametrize("per_machine", [1, 2])
def test_two_networks_stay_in_step_where_each_process_needs_another(
    out: Path, per_machine: int
) -> None:
    """Rank 0 has a noisy sample only, rank 1 a clean one: together they are the whole batch."""
    expected = cases.wan_gradients(wrap_pipeline(WAN22.build()), [0, 1])
    assert {name.partition(".")[0] for name in expected} == {"transformer", "transformer_2"}
    for rank in range(2):
        found = load_file(out / f"wan-{per_machine}-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_buckets_keep_order_kinds_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "BUCKET_NUMBERS", 10)
    sizes = [(4, torch.float32), (6, torch.float32), (1, torch.float32), (20, torch.float32)]
    sizes += [(2, torch.float64), (3, torch.float64)]
    parameters = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in sizes]
    found = list(buckets(parameters))
    assert [p for bucket in found for p in bucket] == parameters
    assert [[p.numel() for p in bucket] for bucket in found] == [[4, 6], [1], [20], [2, 3]]


CASES = [SD3, FLUX_DEV, PIXART, SANA, QWEN_IMAGE, Z_IMAGE, WAN21, WAN22, SDXL_V]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_has_blocks_to_cut(case: Case) -> None:
    """None is inside another, and every layer that gets an adapter is in one."""
    backbone = wrap_pipeline(case.build())
    blocks = list(blocks_of(backbone.denoiser))
    weights = [p for block in blocks for p in block.parameters()]
    assert len(weights) == len({id(p) for p in weights})
    inside = {id(module) for block in blocks for module in block.modules()}
    for path in matching_layers(backbone.denoiser, backbone.lora_targets):
        assert id(backbone.denoiser.get_submodule(path)) in inside, path


def test_a_cut_base_is_for_several_processes(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shard cuts the base over processes and there is one"):
        build_run(cases.config_for(model, tmp_path, shard=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": True, "quantise": "int8"}, "packs the weights that shard would cut"),
        ({"shard": True, "lora": LoraConfig(critic="full")}, "lora.critic full is a copy"),
        ({"quantise": "nf4", "lora": LoraConfig(student="lorad")}, "set lora.student to lora"),
    ],
)
def test_roles_that_need_a_plain_base_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


def test_the_batch_must_be_cut_evenly(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose a multiple of 3"):
        build_run(cases.config_for(model, tmp_path), Processes(0, 3, 3))


@pytest.mark.parametrize(
    ("device", "environment", "message"),
    [
        ("cuda:1", {}, "2 processes cannot share one"),
        ("cuda", {"LOCAL_RANK": "64"}, "each needs its own"),
        ("cpu", {"ACCELERATE_USE_DEEPSPEED": "true"}, "configured for DeepSpeed"),
        ("cpu", {"ACCELERATE_USE_FSDP": "true"}, "configured for FSDP"),
    ],
)
def test_launches_that_cannot_work_are_refused(
    device: str, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        join({"WORLD_SIZE": "2", **environment}, device)


def test_a_process_knows_from_its_environment_that_it_has_peers() -> None:
    assert is_one_of_several({"WORLD_SIZE": "2"})
    assert not is_one_of_several({"WORLD_SIZE": "1"})
    assert not is_one_of_several({})
    assert is_on_cpu("cpu", {"WORLD_SIZE": "2"})


def test_the_commands_of_the_page_name_recipes_and_settings() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/scale.md").read_text(encoding="utf-8")
    commands = re.findall(r"-m fewstep\.trainer (\S+) (.*)", page)
    assert len(commands) == 4
    for recipe, rest in commands:
        known = flat_settings(RECIPES[recipe].config.to_dict())
        for flag in re.findall(r"--(\S+)", rest):
            assert flag.replace("-", "_") in known, flag


LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_start_one_run(model: Path, tmp_path: Path, launcher: str) -> None:
    """The commands of the documentation; both leave what one process does."""
    settings = ["--model", str(model / "sd3"), "--data.prompts", str(model / "prompts.txt")]
    settings += ["--batch-size", "4", "--budget", "300", "--max-sequence-length", "1"]
    settings += ["--evaluation.every", "0", "--sample-every", "0", "--device", "cpu", "--quiet"]
    assert main(["dmd2", *settings, "--out", str(tmp_path / "single")]) == 0
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "fewstep.trainer", "dmd2"]
    command += [*settings, "--shard", "--out", str(tmp_path / "several")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("adapter: ") == 1  # one of them speaks
    for half in ("lora_A", "lora_B"):
        found = numbers(tmp_path / "several", "critic", half)
        expected = numbers(tmp_path / "single", "critic", half)
        assert (found - expected).norm() < TOLERANCE * expected.norm()
