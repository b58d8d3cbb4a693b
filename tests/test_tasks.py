"""Evaluation tasks: the shipped ones, files, and what is refused; under which licence they ship."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

import fastdraft
from fastdraft.errors import DataError
from fastdraft.evaluation.tasks import describe_task, load_task
from fastdraft.recipe.evaluation import FileTask, ShippedTask, TaskConfig
from fastdraft.run_folder import file_sha256
from fastdraft.target import Target

SHIPPED = Path(fastdraft.__path__[0]) / "shipped"
NAMES = {"code": 164, "summarization": 120, "text": 200, "instructions": 200}
PERMISSIVE = {"CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "MIT", "Apache-2.0", "MIT OR Apache-2.0"}


@pytest.mark.parametrize("kind", NAMES)
def test_a_shipped_task_loads_by_name(kind: str) -> None:
    task = load_task(TypeAdapter(TaskConfig).validate_python({"kind": kind, "prompts": 1000}))
    assert task.name == kind
    assert len(task.prompts) == NAMES[kind]
    assert task.chat == (kind in ("summarization", "instructions"))
    assert all(prompt.text and prompt.id for prompt in task.prompts)


def test_fewer_prompts_are_an_even_spread() -> None:
    every = load_task(ShippedTask(kind="code", prompts=164)).prompts
    some = load_task(ShippedTask(kind="code", prompts=4)).prompts
    assert some == [every[i] for i in (0, 41, 82, 123)]


def test_a_file_of_the_user_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "my questions.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"id": "b", "prompt": "two", "reference": "answer"}\n')
    config: Any = TypeAdapter(TaskConfig).validate_python({"kind": "file", "path": str(path), "chat": True})
    task = load_task(config)
    assert (task.name, task.chat) == ("my-questions", True)
    assert [(p.id, p.text, p.reference) for p in task.prompts] == [("1", "one", ""), ("b", "two", "answer")]


def test_a_description_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one"}\n')
    config = FileTask(kind="file", path=str(path))
    before = describe_task(config)
    path.write_text('{"prompt": "two"}\n')
    assert describe_task(config) != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompt"),
        (b"{", "line 1: not JSON"),
        (b'{"prompt": ""}', "line 1: an empty prompt"),
        (b'{"words": "a"}', "line 1: no 'prompt'; has words"),
        (b"\xff", "line 1: byte 0 is not UTF-8"),
        (b'{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "id '1' twice"),
    ],
)
def test_a_bad_task_file_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_task(FileTask(kind="file", path=str(path)))


def test_a_missing_file_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    for action in (load_task, describe_task):
        with pytest.raises(DataError, match="must exist"):
            action(FileTask(kind="file", path=str(tmp_path / "none.jsonl")))
    with pytest.raises(ValidationError):
        TypeAdapter(TaskConfig).validate_python({"kind": "poems"})


@pytest.mark.parametrize("name", ["books", "prose", "prompts"])
def test_every_shipped_row_names_its_source_and_a_permissive_licence(name: str) -> None:
    with lzma.open(SHIPPED / "data" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) > 500
    assert all(row["license"] in PERMISSIVE and row["source"] for row in rows)


def test_what_ships_is_small_and_has_its_licences_beside_it() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 50_000_000
    assert (SHIPPED / "data" / "LICENSES.md").is_file()
    assert (SHIPPED / "tasks" / "LICENSES.md").is_file()


def test_no_evaluation_prompt_is_a_training_prompt() -> None:
    with lzma.open(SHIPPED / "data" / "prompts.jsonl.xz", "rt", encoding="utf-8") as file:
        training = {json.loads(line)["prompt"].strip().lower() for line in file}
    for kind in NAMES:
        prompts = load_task(ShippedTask(kind=kind, prompts=1000)).prompts  # type: ignore[arg-type]
        assert not training & {prompt.text.strip().lower() for prompt in prompts}


def test_the_shipped_draft_is_the_one_that_its_page_describes() -> None:
    folder = SHIPPED / "drafts" / "smollm2"
    page, draft = (folder / "README.md").read_text(encoding="utf-8"), Target.at(folder)
    draft.check_tensors()
    assert f"`{file_sha256(folder / 'model.safetensors')}`" in page
    assert f"{draft.architecture.parameters:,} parameters" in page
    assert draft.vocabulary.size == 49_152
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25_000_000
