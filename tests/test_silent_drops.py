"""Whatever a reader cannot use is told, by a count or by a name: nothing is dropped in silence."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from conftest import TEXT, write_recipe
from fastdraft import cli
from fastdraft.console import Console
from fastdraft.data import prompts
from fastdraft.data.chat import ChatTemplate
from fastdraft.evaluation.texts import logged_rows
from fastdraft.pipeline import run
from fastdraft.recipe.evaluation import LoggedTexts
from fastdraft.recipe.recipe import load_recipe
from fastdraft.recipe.synthesize import HubPrompts
from fastdraft.target import Target

ASKED = [{"role": "user", "content": "Why?"}]
CALLS = [*ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], "content": None}]


def texts(*more: str | None) -> list[dict[str, Any]]:
    return [{"text": text} for text in [*(f"{TEXT[n % 5]} Number {n}. " * 3 for n in range(120)), *more]]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_sources(root: Path) -> None:
    """One source for each reader, with something in each that it cannot use."""
    write_rows(root / "lines/a.jsonl", texts(None, " \n"))
    write_rows(root / "table/a.parquet", texts(None))
    write_rows(root / "set/train.parquet", texts(None, "", " "))
    for number, row in enumerate(texts()):
        write_rows(root / "words" / f"{number}.txt", [row])
        write_rows(root / "program" / f"{number}.py", [row])
    write_rows(root / "program/tests/a.py", texts())
    (root / "words/empty.txt").touch()
    (root / "program/latin.py").write_bytes(b"# \xe9\n")
    plain: list[dict[str, Any]] = [{"prompt": f"What is {n}?"} for n in range(8)]
    messages = [{"messages": [{"role": "user", "content": f"What is {n}?"}]} for n in range(8)]
    write_rows(root / "asked/a.jsonl", [*plain, {"prompt": ""}, {"prompt": "WHAT is 1?"}])
    write_rows(root / "talks/a.json", [*messages, {"messages": CALLS + ASKED}])
    write_rows(root / "asked_set/train.parquet", [*plain, {"prompt": " "}, {"prompt": None}])
    logged = {"messages": ASKED, "response": "So it is.", "temperature": 0}
    write_rows(root / "log/a.jsonl", [logged, logged, {**logged, "response": None}])
    for folder in ("lines", "table", "words", "set", "asked", "asked_set", "talks", "log"):
        (root / folder / "notes.docx").write_text("x")
    (root / "asked/.cache").mkdir()


CORPORA = {"lines": "jsonl", "table": "parquet", "words": "text", "program": "source_code"}
PROMPTS = {"asked": "jsonl", "talks": "jsonl", "log": "transcripts"}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> str:
    """What a run says that reads one source of each kind, the folder's name left out."""
    root = tmp_path_factory.mktemp("drops")
    write_sources(root)
    corpora = [{"name": name, "kind": kind, "path": str(root / name)} for name, kind in CORPORA.items()]
    asked = [{"name": name, "kind": kind, "path": str(root / name)} for name, kind in PROMPTS.items()]
    corpora.append({"name": "set", "kind": "hub", "dataset": str(root / "set")})
    asked.append({"name": "asked_set", "kind": "hub", "dataset": str(root / "asked_set")})
    asked[1]["field"] = "messages"
    design = load_recipe(str(write_recipe(root, tiny_target))).model_dump()["design"]
    sections = {"prepare": {"row_length": 64, "corpora": corpora}, "design": design}
    synthesize = {"tokens": 2000, "temperatures": [0], "max_new_tokens": 8, "prompts": asked}
    sections |= {"synthesize": synthesize | {"engine": {"kind": "huggingface"}}}
    sections |= dict.fromkeys(("pretrain", "continue_pretrain", "align", "evaluate", "export", "report"))
    recipe = load_recipe(str(write_recipe(root, tiny_target, **sections)))
    with contextlib.redirect_stderr(io.StringIO()) as told:
        run(recipe, Console(), only=["design", "prepare", "synthesize"])
    return told.getvalue().replace(f"{root}/", "")


@pytest.mark.parametrize(
    "said",
    [
        "prepare.corpora[0]: lines: 1 file; passed over 1: notes.docx",
        "lines: 2 documents of lines hold no text",
        "prepare.corpora[1]: table: 1 file; passed over 1: notes.docx",
        "table: 1 documents of table hold no text",
        "prepare.corpora[2]: words: 121 files; passed over 1: notes.docx",
        "words: 1 documents of words hold no text",
        "prepare.corpora[3]: program: 121 files; passed over 1: tests",
        "program: 1 files of program passed over (unreadable or not UTF-8)",
        "prepare.corpora[4]: set: 1 file; passed over 1: notes.docx",
        "set: 3 documents of set hold no text",
        "synthesize.prompts[0]: asked: 1 file; passed over 2: .cache, notes.docx",
        "prompts 'asked' not asked: 1 empty, 1 repeated",
        "synthesize.prompts[1]: talks: 1 file; passed over 1: notes.docx",
        "prompts 'talks' not asked: 1 unsupported",
        "synthesize.prompts[2]: log: 1 file; passed over 1: notes.docx",
        "prompts 'log' not asked: 1 no_answer",
        "synthesize.prompts[3]: asked_set: 1 file; passed over 1: notes.docx",
        "prompts 'asked_set' not asked: 2 empty",
    ],
)
def test_a_run_tells_what_it_could_not_use(output: str, said: str) -> None:
    assert output.count(said) == 1, output


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": ""}, "line 7: an empty prompt"),
        ({"messages": CALLS}, "line 7: tools"),
        ({"said": "x"}, "line 7: no 'prompt'; has said"),
        ({"prompt": "\ud800"}, "line 7: half a character"),
        ({"id": "t0", "prompt": "x"}, "id 't0' twice"),
    ],
)
def test_a_task_with_a_row_of_no_use_is_refused_by_its_name(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], said: str
) -> None:
    with open(tiny_recipe.parent / "tasks.jsonl", "a", encoding="utf-8") as tasks:
        tasks.write(json.dumps(row) + "\n")
    assert cli.main(["check", str(tiny_recipe)]) == 2
    assert said in capsys.readouterr().err


def test_a_log_on_which_drafts_are_measured_counts_what_is_left_out(
    tmp_path: Path, tiny_target: Path
) -> None:
    row = {"messages": ASKED, "response": "So.", "temperature": 0}
    write_rows(tmp_path / "a.jsonl", [row, {**row, "response": None}, {**row, "messages": CALLS + ASKED}])
    target, left_out = Target.at(tiny_target), Counter[str]()
    log = LoggedTexts(kind="transcripts", name="log", path=str(tmp_path))
    rows, _ = logged_rows(log, ChatTemplate(target.tokenizer), target.vocabulary, 0, left_out)
    assert (len(rows), left_out.total()) == (1, 2), left_out


def test_a_data_set_of_which_only_the_beginning_is_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "train.parquet", [{"prompt": f"What is {n}?"} for n in range(8)])
    monkeypatch.setattr(prompts, "HUB_ROWS", 5)
    source = HubPrompts(name="p", kind="hub", dataset=str(tmp_path))
    assert prompts.select_prompts(source, (), 0).note.startswith("only the first 5 rows are read")
    assert not prompts.select_prompts(source.model_copy(update={"count": 8}), (), 0).note
