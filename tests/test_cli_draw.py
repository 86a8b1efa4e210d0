"""`fewstep draw`: where pictures may go."""

from pathlib import Path

import pytest

from fewstep.cli.main import main
from fewstep.cli.picture_folder import PictureFolder
from fewstep.errors import ConfigError


@pytest.mark.parametrize("below", ["", "pictures", "a/b"])
def test_a_file_in_the_way_is_one_sentence_before_anything_is_loaded(
    below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "seven.png"
    file.write_text("kept")
    argv = ["draw", str(tmp_path / "no-such-export"), "--prompt", "a seven"]
    assert main([*argv, "--out", str(file / below)]) == 2
    wanted = f"--out must be a folder, and {file} is a file; name another place, it is made if"
    assert capsys.readouterr().err == f"fewstep: {wanted} missing\n"
    assert file.read_text() == "kept"


def test_a_place_that_cannot_be_a_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(ConfigError, match=r"--out .*link cannot be made \(.+\); name another"):
        PictureFolder(tmp_path / "link", "{}")
