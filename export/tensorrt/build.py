"""Builds one engine with TensorRT 10.12 or newer, or 11.

The network is strongly typed: precisions are those of the ONNX file, which is the only way TensorRT
11 knows and one of the ways of 10. Engine build is not verified on this release (docs/tensorrt.md).
"""

import datetime
import logging
import time
from pathlib import Path
from typing import Any

from rich.progress import Progress

from fewstep.errors import ExportError
from fewstep.export.tensorrt.monitor import BuildProgress, make_monitor, stopped_by_ctrl_c
from fewstep.export.tensorrt.plan import EnginePlan, sha256_of
from fewstep.runtime.tensorrt.cache import locked, write_whole
from fewstep.runtime.tensorrt.engine import make_log, started
from fewstep.runtime.tensorrt.identity import FORMAT, Engine, Profile
from fewstep.runtime.tensorrt.library import library

logger = logging.getLogger(__name__)


def build_engine(plan: EnginePlan, bars: Progress) -> Engine:
    """Build, unless an engine with this identity is there already.

    Args:
        plan: What to build.
        bars: Shows the phases.

    Returns:
        The engine's sidecar; plan and sidecar are written, both or none.

    Raises:
        ExportError: The graph is not legal, or TensorRT refused it.
        KeyboardInterrupt: Ctrl-C; nothing was written.
    """
    plan.report.require()
    with locked(plan.folder):
        stored = plan.cache.stored(plan.component, plan.identity)
        if stored is not None:
            return stored
        started = time.monotonic()
        log = make_log()
        with stopped_by_ctrl_c() as stop:
            data = _serialized(plan, log, BuildProgress(bars, stop.is_set))
            if stop.is_set():
                raise KeyboardInterrupt
        if data is None:
            raise ExportError(_refusal(plan, log))
        engine = Engine(
            format=FORMAT,
            component=plan.component,
            identity=plan.identity,
            inputs=plan.graph.inputs,
            outputs=plan.graph.outputs,
            plan_bytes=len(data),
            plan_sha256=sha256_of(data),
            seconds=round(time.monotonic() - started, 1),
            log_sha256=sha256_of("\n".join(log.errors).encode()),
            needs_weights="STRIP_PLAN" in plan.identity.flags,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        plan.cache.publish(engine, data)
        return engine


def _serialized(plan: EnginePlan, log: Any, progress: BuildProgress) -> bytes | None:
    """The plan's bytes; None where TensorRT gave none."""
    trt = library()
    builder = started(trt.Builder, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(plan, network, log)
    for name in plan.identity.refittable:
        if not network.mark_weights_refittable(name):
            raise ExportError(f"TensorRT has no weight {name} to keep replaceable; {_again(plan)}")
    config = builder.create_builder_config()
    _configure(plan, config)
    for profile in plan.identity.profiles:
        _add_profile(builder, config, profile)
    timing = plan.cache.timing_file(plan.identity.tensorrt, plan.identity.sm)
    _use_timings(config, timing)
    config.progress_monitor = make_monitor(progress)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        return None
    _save_timings(config, timing)
    return bytes(memoryview(serialized))


def _parse(plan: EnginePlan, network: Any, log: Any) -> None:
    trt = library()
    parser = trt.OnnxParser(network, log)
    parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
    # From the path, not from bytes: external data is looked for beside the file.
    if not parser.parse_from_file(str(plan.onnx)):
        errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise ExportError(
            f"TensorRT's parser refused {plan.onnx}: {'; '.join(errors[:3]) or 'no reason given'}"
        )
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    wanted = {tensor.name for tensor in plan.graph.inputs}
    if names != wanted:
        raise ExportError(
            f"TensorRT reads the inputs {', '.join(sorted(names))} and the manifest says "
            f"{', '.join(sorted(wanted))}; {_again(plan)}"
        )


def _configure(plan: EnginePlan, config: Any) -> None:
    trt = library()
    flags = {  # spelled out, so that each name is checked against both majors
        "TF32": trt.BuilderFlag.TF32,
        "WEIGHT_STREAMING": trt.BuilderFlag.WEIGHT_STREAMING,
        "STRIP_PLAN": trt.BuilderFlag.STRIP_PLAN,
        "REFIT_IDENTICAL": trt.BuilderFlag.REFIT_IDENTICAL,
        "VERSION_COMPATIBLE": trt.BuilderFlag.VERSION_COMPATIBLE,
        "REFIT_INDIVIDUAL": trt.BuilderFlag.REFIT_INDIVIDUAL,
    }
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, which changes float32 pictures
    for name in plan.identity.flags:
        config.set_flag(flags[name])
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.identity.workspace_bytes)
    config.builder_optimization_level = plan.identity.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def _add_profile(builder: Any, config: Any, profile: Profile) -> None:
    made = builder.create_optimization_profile()
    for entry in profile.ranges:
        made.set_shape(entry.name, entry.min, entry.opt, entry.max)
    if config.add_optimization_profile(made) < 0:
        raise ExportError("TensorRT refused the profile; its sizes contradict the graph")


def _use_timings(config: Any, file: Path) -> None:
    known = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(known)
    if not config.set_timing_cache(cache, ignore_mismatch=False) and known:
        logger.info("%s is of another machine; kernels are timed again", file)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _save_timings(config: Any, file: Path) -> None:
    cache = config.get_timing_cache()
    if cache is not None:
        write_whole(file, bytes(memoryview(cache.serialize())))


def _refusal(plan: EnginePlan, log: Any) -> str:
    reasons = "; ".join(log.errors[-2:]) or "it gave no reason"
    return (
        f"TensorRT {plan.identity.tensorrt} could not build {plan.component} ({reasons}); try "
        "smaller sizes, a larger --workspace-gib, or --optimization-level 2"
    )


def _again(plan: EnginePlan) -> str:
    return f"export {plan.onnx.parent.parent} again with this release"
