"""Loading a stock diffusers pipeline from a folder or the hub, with its traps taken care of.

diffusers (0.42) refuses to reload a pipeline that was saved without one of its components, such as
SD3 without T5: the folder's model_index.json says null, but the component must be passed again.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging as transformers_logging

from fewstep.model_files import HUB_OPTIONS

INDEX = "model_index.json"
LOGS = (diffusers_logging, transformers_logging)


def load_stock_pipeline(
    source: str | Path, *, pipeline_class: type[DiffusionPipeline] | None = None, **kwargs: Any
) -> DiffusionPipeline:
    """`from_pretrained`, passing the components a pipeline was saved without as None.

    Args:
        source: Local folder or hub id.
        pipeline_class: Class to load; None lets model_index.json decide.
        **kwargs: For diffusers' `from_pretrained`; without a dtype every part is float32.

    Raises:
        OSError: Nothing loadable at `source`, or its model_index.json is damaged.
        ValueError: diffusers could not assemble the pipeline.
    """
    _check_name(source)
    if "dtype" not in kwargs and "torch_dtype" not in kwargs:
        kwargs["dtype"] = torch.float32  # diffusers' default; transformers 5 takes the file's own
    absent = {name: None for name in _absent_components(source, kwargs) if name not in kwargs}
    with without_progress_bars():
        return (pipeline_class or DiffusionPipeline).from_pretrained(source, **absent, **kwargs)


def check_source(source: str | Path, hub_options: Mapping[str, Any]) -> None:
    """See that a pipeline is there, without loading it.

    Args:
        source: Local folder or hub id.
        hub_options: Those of `HUB_OPTIONS` that apply.

    Raises:
        OSError: There is none.
    """
    _check_name(source)
    if Path(source).is_dir():
        if not (Path(source) / INDEX).is_file():
            raise OSError(f"{source} has no {INDEX}; use the folder of a diffusers pipeline")
    elif _hub_index(str(source), hub_options) is None:
        raise OSError(
            f"{source} is neither a folder here nor a pipeline on the hub that can be reached now"
        )


def _check_name(source: str | Path) -> None:
    if Path(source).is_dir():
        return
    try:
        validate_repo_id(str(source))
    except HFValidationError as error:  # a ValueError, for a path that does not exist
        raise OSError(f"{source} is neither a folder here nor a name on the hub") from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Inside, loading draws no bars; afterwards it does where it did before."""
    drawn = [log for log in LOGS if log.is_progress_bar_enabled()]
    for log in drawn:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in drawn:
            log.enable_progress_bar()


def _absent_components(source: str | Path, kwargs: Mapping[str, Any]) -> list[str]:
    index = Path(source) / INDEX
    if not index.is_file():
        found = _hub_index(str(source), kwargs)
        if found is None:
            return []
        index = found
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(
            f"{index} is not valid JSON ({error}); download the pipeline again"
        ) from error
    if not isinstance(entries, dict) or "_class_name" not in entries:
        raise OSError(f"{index} names no pipeline class; use the folder of a diffusers pipeline")
    return [name for name, entry in entries.items() if entry == [None, None]]


def _hub_index(repository: str, kwargs: Mapping[str, Any]) -> Path | None:
    """The index of a hub repository; what is wrong with it is told by diffusers."""
    options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    try:
        return Path(hf_hub_download(repository, INDEX, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None
