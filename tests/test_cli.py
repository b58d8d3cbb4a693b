"""The command line: help, one-line errors, exit codes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdraft import __version__, cli
from fastdraft.pipeline import STAGES
from fastdraft.stages import SUMMARIES

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]

VERBS = ("run", "check", "inspect", "preview", "generate", "recipes", *SUMMARIES)


def test_the_verbs_of_the_stages_are_the_stages() -> None:
    assert [stage.name for stage in STAGES] == list(SUMMARIES)


def test_help_of_every_verb_fits_80_columns(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in ([], *([verb] for verb in VERBS)):
        assert cli.main([*arguments, "--help"]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_help_answers_in_under_a_third_of_a_second_and_loads_nothing_heavy() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fastdraft", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5  # 0.18 on an idle machine
    code = "import sys, fastdraft.cli as c; c.main(['--help']); sys.exit(bool({'pydantic', 'yaml', 'rich', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_an_error_is_one_line_on_stderr_and_exit_code_2(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["run", str(tmp_path / "none.yaml")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastdraft: ")
    assert captured.err.count("\n") == 1


def test_no_verb_prints_help_and_fails(capsys: Capture) -> None:
    assert cli.main([]) == 2
    assert "fastdraft run demo" in capsys.readouterr().out


def test_the_version_is_printed(capsys: Capture) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_recipes_are_listed_and_copied_but_never_over_a_file(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes"]) == 0
    assert "demo" in capsys.readouterr().out
    assert cli.main(["recipes", "--copy", "demo"]) == 0
    assert cli.main(["recipes", "--copy", "demo"]) == 2
    assert "File exists" in capsys.readouterr().err
    assert cli.main(["recipes", "--copy", "nothing"]) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rn", "demo"], "Did you mean 'run'"),
        (["run"], "Missing argument 'RECIPE'; see fastdraft --help"),
        (["run", "starter", "--redo", "algin"], "algin"),
        (["run", "demo", "--qiet"], "--quiet"),
        (["preview", "runs/x", "--count", "many"], "--count"),
        (["inspect", "x", "y=1"], "y=1"),
        (["generate", "--prompt", "x"], "--target and --draft"),
        (["generate", "/nowhere", "--prompt", "x"], "recipe.yaml"),
        (["preview", "/nowhere"], "must be the folder of a run"),
    ],
)
def test_a_wrong_argument_is_one_line_with_a_remedy(
    arguments: list[str], expected: str, capsys: Capture
) -> None:
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("fastdraft: ")
    assert expected in told
    assert told.count("\n") == 1


def test_overrides_may_stand_before_and_after_options(capsys: Capture) -> None:
    for arguments in (
        ["--quiet", "demo", "align.tokens=x"],
        ["demo", "run.seed=1", "--quiet", "align.tokens=x"],
    ):
        assert cli.main(["check", *arguments]) == 2
        assert "align.tokens: 'x': must be a whole count" in capsys.readouterr().err
