"""Everything that can be wrong with the files that a recipe names: prompts, tasks, corpora; and with a run's folder. One line, code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from bad_input_fixture import everything, refused


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"{",
        b"[1]\n",
        b"3\n",
        b'{"prompt": 3}\n',
        b'{"other": "x"}\n',
        b"\xff\xfe\n",
        b"[" * 5000,
    ],
)
@pytest.mark.parametrize("name", ["tasks.jsonl", "prompts.jsonl"])
def test_prompts_and_tasks_that_hold_none_are_refused_by_check(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    (tiny_recipe.parent / name).write_bytes(content)
    assert name in refused(capsys, "check", tiny_recipe)
    assert not (tiny_recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    "content", [b"{\n", b"[1]\n", b'{"text": 3}\n', b'{"other": "x"}\n', b"\xff\xfe\n", b"\x1f\x8bnot gzip\n"]
)
def test_a_corpus_that_is_no_jsonl_is_refused_with_its_line(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tiny_recipe.parent / "text.jsonl"
    path.write_bytes(content + path.read_bytes())
    line = refused(capsys, "run", tiny_recipe)
    assert "text.jsonl" in line
    assert " 1" in line


def test_a_run_whose_place_is_a_file_is_refused_and_the_file_kept(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tiny_recipe.parent / "runs"
    runs.mkdir()
    (runs / "tiny").write_text("mine", encoding="utf-8")
    for verb in ("check", "run"):
        assert "tiny" in refused(capsys, verb, tiny_recipe)
    assert everything(runs) == {"tiny": b"mine"}
