"""`fewstep grid search` and `fewstep solver fit`: a recipe in one command, and its use."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewstep.cli.fitting import CAPTIONS, FitOptions, read_prompts, write_recipe
from fewstep.cli.main import main
from fewstep.recipe import FewStepRecipe
from tests.tiny_pipelines import flow_recipe

SMALL = ("--num-images", "2", "--teacher-steps", "6", "--device", "cpu")


@pytest.fixture(autouse=True)
def teachers_laid_out_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The shipped teachers are unpacked into a folder of the test run, not the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.getbasetemp() / "teachers"))
        yield


@pytest.mark.parametrize("base", ["digits-sd3", "digits-sd15"])
def test_a_searched_recipe_draws(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two commands from a base to a picture; the second obeys what the first found."""
    out = tmp_path / "grids.json"
    status = main(
        ["grid", "search", "--base", base, "--steps", "2", "3", "--out", str(out), "--json", *SMALL]
    )
    assert status == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["calls"] for row in said["rows"]] == [2, 3]
    assert all(row["error"] <= row["plain_error"] for row in said["rows"])
    assert Path(said["plot"]).read_bytes().startswith(b"\x89PNG")
    recipe = FewStepRecipe.from_file(out)
    assert recipe.guidance.scale == {"digits-sd3": 1.2, "digits-sd15": 2.0}[base]
    assert recipe.provenance.teacher == f"{base}, guidance {recipe.guidance.scale:g}"

    drawn = main(
        ["generate", "--base", base, "--recipe", str(out), "--prompt", "a handwritten seven"]
        + ["--steps", "2", "--out", str(tmp_path / "pictures"), "--device", "cpu", "--json"]
    )
    assert drawn == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["nfe"]) == (2, 4)
    assert Path(report["pictures"][0]["file"]).exists()


def test_a_solver_is_fitted_on_a_searched_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grids, out = tmp_path / "grids.json", tmp_path / "solver.json"
    base = ["--base", "digits-sd3", "--steps", "2", *SMALL]
    assert main(["grid", "search", *base, "--out", str(grids)]) == 0
    assert "plain_error" in capsys.readouterr().out
    fit = ["solver", "fit", "--kind", "d-ode", "--grid", str(grids), *base, "--out", str(out)]
    assert main([*fit, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    fitted, found = FewStepRecipe.from_file(out), FewStepRecipe.from_file(grids)
    assert fitted.grids[0].sigmas == found.grids[0].sigmas
    assert fitted.grids[0].solver[1].previous_x0 != 0.0
    assert not list(tmp_path.glob(".*partial"))


def test_a_bespoke_solver_is_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "solver.json"
    command = ["solver", "fit", "--kind", "bespoke-rk2", "--base", "digits-sd3", "--steps", "2"]
    assert main([*command, "--rounds", "1", "--out", str(out), "--json", *SMALL]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["error"] < row["plain_error"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["grid", "search", "--steps", "0"], "--steps and --num-images must be >= 1"),
        (["grid", "search", "--steps", "9"], "step counts must be 1 to the teacher's 6"),
        (["grid", "search", "--size", "big"], "--size must be HEIGHTxWIDTH"),
        (["grid", "search", "--prompts", "nowhere.txt"], "one prompt per line"),
        (["grid", "search", "--teacher-steps", "1"], "teacher_steps >= 2"),
        (["solver", "fit", "--kind", "bespoke-rk2", "--steps", "3"], "even number of calls, got 3"),
        (["solver", "fit", "--kind", "bespoke-rk1", "--rounds", "0"], "--rounds must be >= 1"),
        (["solver", "fit", "--kind", "d-ode", "--grid", "no.json"], "no such recipe file"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "recipe.json"
    given = [*argv[:2], *SMALL, "--base", "digits-sd3", "--out", str(out), *argv[2:]]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert words in " ".join(said.replace("│", " ").split())  # tyro boxes wrong options
    assert "Traceback" not in said
    assert not out.exists()


def test_a_recipe_file_ends_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grid", "search", "--base", "digits-sd3", "--out", "recipe.txt"]) == 2
    assert "ending in .json" in capsys.readouterr().err


def test_prompts_are_lines_of_a_file_used_in_turn(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa cat\n\n  a dog \n", encoding="utf-8")
    options = FitOptions(base="x", out=tmp_path / "r.json", prompts=file, num_images=3)
    assert read_prompts(options) == ("a cat", "a dog", "a cat")
    built_in = FitOptions(base="x", out=tmp_path / "r.json", num_images=9)
    assert read_prompts(built_in) == (*CAPTIONS, CAPTIONS[0])
    shipped = FitOptions(base="digits-sd3", out=tmp_path / "r.json", num_images=2)
    assert read_prompts(shipped) == ("a handwritten zero", "a handwritten one")


def test_a_recipe_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "recipe.json"
    write_recipe(file, flow_recipe("sd3"))
    assert FewStepRecipe.from_file(file) == flow_recipe("sd3")
    blocked = tmp_path / "folder.json"
    blocked.mkdir()
    with pytest.raises(OSError, match=r"folder\.json"):
        write_recipe(blocked, flow_recipe("sd3"))
    assert not list(tmp_path.glob(".*partial"))
