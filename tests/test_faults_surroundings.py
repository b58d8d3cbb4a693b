"""Faults 59 to 70, what a program finds around it: odd folders, closed streams, other character sets, no home, no room for temporaries.

And text of every kind in what is asked of a target: prompts, tasks, logs, the terminal.
"""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from bad_input_fixture import refused
from conftest import write_recipe
from fastdraft import cli
from fastdraft.data.chat import Conversation
from fastdraft.data.logs import TranscriptLog, read_entries
from fastdraft.errors import DataError, FastDraftError
from fastdraft.recipe.data import JsonlPrompts
from fastdraft.target import Target
from fastdraft.evaluation.tasks import read_prompts
from faults_fixture import Run, failing, os_error
from test_damaged_data import ODD

HALVES = {"half a pair": ("one \ud83d two", "one \ufffd two"), "the other half": ("\udc00", "\ufffd")}
TEXTS = (
    {name: (text, text) for name, text in ODD.items()}
    | HALVES
    | {"an emoji in two escapes": ("\U0001f98a", "\U0001f98a")}
)
ENDS = {"plain": (b"", b"\n"), "a mark and Windows line ends": (b"\xef\xbb\xbf", b"\r\n")}


def written(path: Path, ends: str, *rows: dict[str, Any]) -> Path:
    """JSON lines in ASCII, as most programs write them, behind a mark or not."""
    mark, end = ENDS[ends]
    path.write_bytes(mark + b"".join(json.dumps(row).encode() + end for row in rows))
    return path


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("name", TEXTS)
def test_every_kind_of_text_is_asked_as_it_stands(tmp_path: Path, name: str, ends: str) -> None:
    text, wanted = TEXTS[name]
    messages = [{"role": "user", "content": text}]
    path = written(
        tmp_path / "a.jsonl",
        ends,
        {"id": text, "prompt": text, "messages": messages, "temperature": 0, "response": text},
    )
    assert list(JsonlPrompts(kind="jsonl", name="own", path=str(path)).prompts()) == [wanted]
    assert list(JsonlPrompts(kind="jsonl", name="own", path=str(path), field="messages").prompts()) == [
        Conversation((wanted,))
    ]
    (entry,) = read_entries(TranscriptLog(kind="transcripts", name="log", path=str(path)))
    assert (entry.texts, entry.choices[0].text) == (
        [text],
        text,
    )  # half a pair is counted and left out there: test_transcripts.py
    for row in ({"id": text, "prompt": text}, {"id": text, "messages": messages}):
        (task,) = read_prompts(written(tmp_path / "tasks.jsonl", ends, row))
        assert (task.id, task.text) == (wanted, wanted)


def test_a_run_works_in_folders_of_odd_names(tmp_path: Path, tiny_target: Path) -> None:
    folder = tmp_path / "größe 模型 \U0001f98a it's [1] $HOME %s"
    folder.mkdir()
    recipe = str(write_recipe(folder, tiny_target))
    for stage in ("design", "prepare"):
        assert cli.main([stage, recipe, "--quiet"]) == 0
    assert (folder / "runs" / "tiny" / "prepare" / "manifest.json").is_file()


def test_a_name_that_the_systems_character_set_has_not_is_one_line(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under LC_ALL=C without coercion, where file names are ASCII."""
    monkeypatch.setattr(
        os,
        "mkdir",
        failing(os.mkdir, 1, lambda: UnicodeEncodeError("ascii", "/runs/größe", 8, 9, "not in range")),
    )
    assert "LC_ALL=C.UTF-8" in refused(capsys, "design", tiny_recipe)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_no_room_for_temporary_files_is_one_line(
    short_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run = Run(short_run, f"temporary-{number}", "design")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", failing(tempfile.mkdtemp, 1, os_error(number)))
        run.fails(capsys)
    run.ends_alike()


def test_streams_that_were_closed_before_the_start_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `>&- 2>&-`, where Python has None in their places."""
    for arguments, code in ((["recipes"], 0), (["check", str(tmp_path / "nowhere.yaml")], 2)):
        for name in ("stdin", "stdout", "stderr"):
            monkeypatch.setattr(sys, name, None)
        assert cli.main(arguments) == code


@pytest.mark.parametrize(
    ("stdin", "prompt", "said"),
    [
        (None, None, "--prompt: empty"),
        (io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"), None, "stdin: byte 1 is not utf-8"),
        (
            io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="ascii", errors="surrogateescape"),
            None,
            "--prompt: bytes that are no text",
        ),
        (None, "a\udcff", "--prompt: bytes that are no text"),
        (io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf \n"), encoding="utf-8"), None, "--prompt: empty"),
    ],
)
def test_a_prompt_that_is_no_text_is_one_line(  # noqa: PLR0917
    tiny_target: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stdin: Any,
    prompt: str | None,
    said: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    given = ["--prompt", prompt] if prompt else []
    assert said in refused(capsys, "generate", "--target", tiny_target, "--draft", tiny_target, *given)


def test_no_home_and_no_caches_that_can_be_written(tmp_path: Path, tiny_recipe: Path) -> None:
    """In a plain C locale too; a process of its own, since libraries look for these places when they are imported."""
    nowhere = tmp_path / "a file"
    nowhere.touch()
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HOME", "USERPROFILE", "PYTHONUTF8", "LANG")
    }
    caches = dict.fromkeys(("HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_HOME"), str(nowhere / "x"))
    command = [sys.executable, "-m", "fastdraft", "design", str(tiny_recipe)]
    ended = subprocess.run(
        command, env=kept | caches | {"LC_ALL": "C"}, capture_output=True, check=False, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    assert (tiny_recipe.parent / "runs" / "tiny" / "design" / "manifest.json").is_file()


def test_a_cache_that_cannot_be_written_is_not_taken_for_a_damaged_model(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    refuses = failing(len, 1, lambda: PermissionError(errno.EACCES, "Permission denied", "/caches/hub"))
    monkeypatch.setattr(AutoConfig, "from_pretrained", refuses)
    with pytest.raises(FastDraftError, match="/caches/hub: cannot be read or written"):
        Target.at(tiny_target).config


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("Wed, 21 Oct 2099 07:28:00 GMT", 600),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("1e999", 0),
        ("nan", 0),
        ("-5", 0),
        ("soon", 0),
        ("2", 2),
    ],
)
def test_a_server_whose_clock_is_another_is_waited_for_ten_minutes_at_most(
    header: str, seconds: float
) -> None:
    from fastdraft.runtimes.openai_requests import _retry_after

    assert _retry_after(header) == seconds


LOGS = [
    "synthesize.prompts=[{kind: transcripts, name: log, path: '%s'}]",
    "evaluate.texts={kind: transcripts, name: log, path: '%s'}",
]


@pytest.mark.parametrize("override", LOGS)
def test_a_log_that_cannot_be_understood_is_refused_by_check(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    log = written(
        tiny_recipe.parent / "log.jsonl", "plain", {"prompt": "x", "temperature": -1, "response": "y"}
    )
    assert "log.jsonl line 1: temperature -1" in refused(
        capsys, "check", tiny_recipe, override % log.as_posix()
    )
    log.write_bytes(b"\n")
    assert "no line in it" in refused(capsys, "check", tiny_recipe, override % log.as_posix())


def test_what_an_error_repeats_is_short_and_steers_no_terminal() -> None:
    line = str(DataError("a\nb", "\x1b[2J\u202e" + "x" * 5000 + "end", "must be text", "mend it"))
    assert line.startswith("a b: \\x1b[2J\\u202exxx")
    assert line.endswith("xend: must be text; mend it")
    assert len(line) < 500
