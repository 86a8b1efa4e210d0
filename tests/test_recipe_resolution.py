"""Which recipe wins, where adapters are found, and what is said when nothing is."""

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.adapters import AdapterHeader
from fewstep.cli.main import main
from fewstep.errors import AdapterError, RecipeError, RecipeNotFoundError, command_message
from fewstep.model_files import find_adapter, find_base_sidecar
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import METADATA_KEY, SIDECAR_NAME, FewStepRecipe
from fewstep.recipe_resolution import recipe_sources, resolve_recipe
from tests.tiny_pipelines import flow_recipe


def recipe_of(timestep: float) -> FewStepRecipe:
    """Recipes told apart by their second timestep."""
    return flow_recipe("sd3", (1000.0, timestep))


def header(path: Path, recipe: FewStepRecipe | str | None) -> AdapterHeader:
    text = recipe.to_json() if isinstance(recipe, FewStepRecipe) else recipe
    return AdapterHeader(path, 0, {} if text is None else {METADATA_KEY: text}, {})


def sidecar(folder: Path, recipe: FewStepRecipe) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SIDECAR_NAME).write_text(recipe.to_json())
    return folder / SIDECAR_NAME


def test_the_order_is_argument_file_sidecar_base_scheduler(tmp_path: Path) -> None:
    everything = {
        "argument": recipe_of(100.0),
        "adapter": header(tmp_path / "a.safetensors", recipe_of(200.0)),
        "adapter_sidecar": sidecar(tmp_path / "adapter", recipe_of(300.0)),
        "base": tmp_path / "base",
        "base_sidecar": sidecar(tmp_path / "base", recipe_of(400.0)),
        "installed": recipe_of(500.0),
    }
    found = []
    for gone in ("argument", "adapter", "adapter_sidecar", "base_sidecar", "installed"):
        found.append(resolve_recipe(recipe_sources(**everything)).recipe.grids[0].timesteps[1])
        everything[gone] = None
        if gone == "adapter":  # the file stays, its metadata goes
            everything[gone] = header(tmp_path / "a.safetensors", None)
    assert found == [100.0, 200.0, 300.0, 400.0, 500.0]


def test_finding_nothing_names_what_was_looked_at(tmp_path: Path) -> None:
    sources = recipe_sources(adapter=header(tmp_path / "a.safetensors", None), base="some/base")
    with pytest.raises(RecipeNotFoundError, match="nothing says how") as caught:
        resolve_recipe(sources)
    message = str(caught.value)
    assert f"{METADATA_KEY!r} in the metadata of {tmp_path / 'a.safetensors'}" in message
    assert str(tmp_path / SIDECAR_NAME) in message
    assert f"some/base/{SIDECAR_NAME}" in message
    assert "pass recipe=" in message


def test_a_broken_recipe_is_an_error_not_skipped(tmp_path: Path) -> None:
    sources = recipe_sources(
        adapter=header(tmp_path / "a.safetensors", "{}"),
        base="b",
        base_sidecar=sidecar(tmp_path, recipe_of(1.0)),
    )
    with pytest.raises(RecipeError, match=r"a\.safetensors"):
        resolve_recipe(sources)


def test_the_argument_may_be_a_file(tmp_path: Path) -> None:
    path = sidecar(tmp_path, recipe_of(250.0))
    assert resolve_recipe(recipe_sources(argument=str(path))).recipe == recipe_of(250.0)
    with pytest.raises(RecipeError, match="there is no such recipe file"):
        resolve_recipe(recipe_sources(argument=tmp_path / "none.json"))


def test_an_adapter_is_a_file_or_a_folder_with_one(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    file.touch()
    assert find_adapter(file).path == file
    assert find_adapter(str(tmp_path)).path == file
    assert find_adapter(file).sidecar is None
    beside = sidecar(tmp_path, recipe_of(1.0))
    assert find_adapter(tmp_path).sidecar == beside
    assert find_base_sidecar(tmp_path) == beside


def test_a_pickle_is_found_where_there_is_no_safetensors_file(tmp_path: Path) -> None:
    pickled = tmp_path / "pytorch_lora_weights.bin"
    pickled.touch()
    assert find_adapter(tmp_path).path == pickled
    (tmp_path / "other.pt").touch()
    with pytest.raises(AdapterError, match="2 pickle files here .other.pt, pytorch_lora_wei"):
        find_adapter(tmp_path)
    (tmp_path / "one.safetensors").touch()
    assert find_adapter(tmp_path).path == tmp_path / "one.safetensors"


def test_a_folder_with_none_or_several_adapters_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no .safetensors file here"):
        find_adapter(tmp_path)
    for name in ("high.safetensors", "low.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(AdapterError, match=r"2 .safetensors files here \(high.*low.*\); name"):
        find_adapter(tmp_path)


@pytest.mark.parametrize("name", ["nothing.pt", "a/b.bin", "a/b.safetensors", "/no/where", "./x/y"])
def test_a_local_path_that_is_not_there_is_never_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(AdapterError, match="there is no such file or folder"):
        find_adapter(name)


@pytest.fixture
def hub_cache(tmp_path: Path) -> dict[str, object]:
    """A hub cache as huggingface_hub lays it out, holding owner/name with one adapter."""
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (snapshot / "sub").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "lora.safetensors").write_bytes(b"top")
    (snapshot / "sub" / "other.safetensors").write_bytes(b"sub")
    (snapshot / SIDECAR_NAME).write_text(json.dumps({}))
    return {"cache_dir": tmp_path, "local_files_only": True}


def test_hub_names_are_found_through_the_hub_cache(hub_cache: dict[str, object]) -> None:
    whole = find_adapter("owner/name", hub_cache)
    assert whole.path.read_bytes() == b"top"
    assert whole.sidecar is not None
    one = find_adapter("owner/name/sub/other.safetensors", hub_cache)
    assert one.path.read_bytes() == b"sub"
    assert one.sidecar is None
    assert find_base_sidecar("owner/name", hub_cache) is not None
    assert find_base_sidecar("owner/other", hub_cache) is None


def test_pickles_are_found_on_the_hub_too(hub_cache: dict[str, object], tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    (snapshot / "lora.safetensors").rename(snapshot / "lora.pt")
    assert find_adapter("owner/name", hub_cache).path.read_bytes() == b"top"
    assert find_adapter("owner/name/lora.pt", hub_cache).path.read_bytes() == b"top"


def test_a_hub_name_that_is_not_there_is_one_sentence(hub_cache: dict[str, object]) -> None:
    with pytest.raises(AdapterError, match=r"owner/other/x.safetensors: not found on this machine"):
        find_adapter("owner/other/x.safetensors", hub_cache)


def test_a_command_is_told_its_own_option(tmp_path: Path) -> None:
    file = header(tmp_path / "a.safetensors", None)
    for sources, place in (
        (recipe_sources(adapter=file, base="some/base"), "beside the adapter"),
        (recipe_sources(base="some/base"), "beside the base"),
    ):
        with pytest.raises(RecipeNotFoundError) as caught:
            resolve_recipe(sources)
        assert str(caught.value).endswith(f"; pass recipe=, or put {SIDECAR_NAME} {place}")
        said = command_message(caught.value)
        assert said.endswith(f"; give --recipe, or put {SIDECAR_NAME} {place}")
        assert "recipe=" not in said


def test_a_command_is_told_which_entry_it_may_be(tmp_path: Path) -> None:
    with pytest.raises(RecipeNotFoundError) as caught:
        resolve_recipe(recipe_sources(base=tmp_path / "z-image-turbo"))
    assert str(caught.value).endswith("; if it is, pass recipe='zoo:z-image-turbo'")
    assert command_message(caught.value).endswith("; if it is, give --recipe 'zoo:z-image-turbo'")


def test_of_a_base_that_is_not_there_nothing_else_is_said(
    tmp_path: Path, hub_cache: dict[str, Any]
) -> None:
    with pytest.raises(OSError, match="nowhere is neither a folder here nor a name on the hub$"):
        FewStepPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(OSError, match="^owner/other is neither a folder here nor a pipeline on"):
        FewStepPipeline.from_pretrained("owner/other", **hub_cache)
    with pytest.raises(OSError, match=r"has no model_index\.json; use the folder of a diffusers"):
        FewStepPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("./nowhere", "./nowhere is neither a folder here nor a name on the hub"),
        ("digits-sd3", f"; give --recipe, or put {SIDECAR_NAME} beside the base"),
    ],
)
def test_commands_say_so_in_one_sentence(
    base: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {
        "generate": ["generate", "--base", base, "--prompt", "x", "--out"],
        "export": ["export", "onnx", "--base", base, "--out"],
    }
    for name, argv in commands.items():
        assert main([*argv, str(tmp_path / "out")]) == 2
        (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "fewstep" in line]
        assert said in sentence, name
        assert "recipe=" not in sentence
    assert list(tmp_path.iterdir()) == []
