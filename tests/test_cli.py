"""The command line: help, one-line errors, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastdraft import __version__, cli
from fastdraft.pipeline import STAGES


def test_the_verbs_of_the_stages_are_the_stages() -> None:
    assert {stage.name: stage.summary for stage in STAGES} == cli._STAGES


def test_help_of_every_verb_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    verbs = ("run", "check", "inspect", "preview", "generate", "recipes", *cli._STAGES)
    for arguments in ([], *([verb] for verb in verbs)):
        with pytest.raises(SystemExit) as caught:
            cli.main([*arguments, "--help"])
        assert caught.value.code == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, fastdraft.cli as c; c.build_parser().format_help(); sys.exit('pydantic' in sys.modules or 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_error_is_one_line_on_stderr_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(tmp_path / "none.yaml")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastdraft: ")
    assert captured.err.count("\n") == 1


def test_no_verb_prints_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "verbs:" in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_recipes_are_listed_and_copied_but_never_over_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes"]) == 0
    assert "demo" in capsys.readouterr().out
    assert cli.main(["recipes", "--copy", "demo"]) == 0
    assert cli.main(["recipes", "--copy", "demo"]) == 2
    assert "never overwrites" in capsys.readouterr().err
    assert cli.main(["recipes", "--copy", "nothing"]) == 2


def test_generate_without_a_pair_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--prompt", "x"]) == 2
    assert "--target and --draft" in capsys.readouterr().err


def test_generate_from_a_folder_that_is_no_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "recipe.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rn", "demo"], "did you mean 'run'"),
        (["run"], "required: RECIPE; see fastdraft run --help"),
        (["run", "demo", "--redo", "algin"], "did you mean 'align'"),
        (["run", "demo", "--qiet"], "did you mean --quiet"),
        (["preview", "runs/x", "--count", "many"], "--count: invalid int value: 'many'"),
        (["inspect", "x", "y=1"], "y: no such argument"),
    ],
)
def test_a_wrong_argument_is_one_line_with_a_remedy(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    told = capsys.readouterr().err
    assert caught.value.code == 2
    assert told.startswith("fastdraft: ")
    assert expected in told
    assert told.count("\n") == 1


def test_overrides_may_stand_before_and_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--quiet", "demo", "align.tokens=x"],
        ["demo", "run.seed=1", "--quiet", "align.tokens=x"],
    ):
        assert cli.main(["check", *arguments]) == 2
        assert "align.tokens: 'x': must be a count" in capsys.readouterr().err


def test_the_list_of_recipes_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80


def test_preview_of_a_folder_that_is_no_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["preview", str(tmp_path / "none")]) == 2
    assert "must be the folder of a run" in capsys.readouterr().err
