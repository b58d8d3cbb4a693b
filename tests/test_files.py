"""What a `path` names: one rule for folders and patterns, and what it passes over has a name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import write_recipe
from fastdraft import cli
from fastdraft.data.corpora import describe
from fastdraft.data.files import ALL, JSONL, TEXT, find_files
from fastdraft.data.prompts import describe as describe_prompts
from fastdraft.errors import DataError, RecipeError
from fastdraft.recipe.base import load_config
from fastdraft.recipe.prepare import HubSource, PrepareConfig
from fastdraft.recipe.synthesize import HubPrompts
from fastdraft.run_folder import read_json

Capture = pytest.CaptureFixture[str]


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "x"}\n')
    return folder


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of all names that occur, with links to a file, to a folder and back to itself."""
    fill(tmp_path / "ext", "j.jsonl", "back/k.jsonl")
    names = ["a.jsonl", "B.JSONL", "c.json", "d.json.gz", "e.ndjson", "g.jsonl.bz2", "k.jsonl.zstd"]
    names += ["sub/h.jsonl", ".hidden/i.jsonl", ".DS_Store", "notes.docx", "sub/dataset_info.json"]
    folder = fill(tmp_path / "f", *names)
    (folder / "link").symlink_to("../ext", target_is_directory=True)
    (folder / "one.jsonl").symlink_to("../ext/j.jsonl")
    (folder / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "ext" / "circle").symlink_to("../f", target_is_directory=True)
    (folder / "self").symlink_to(".", target_is_directory=True)
    return folder


LINES = ["B.JSONL", "a.jsonl", "link/back/k.jsonl", "link/j.jsonl", "one.jsonl", "sub/h.jsonl"]
OTHERS = ["c.json", "d.json.gz", "e.ndjson", "g.jsonl.bz2", "k.jsonl.zstd"]
PASSED = [".DS_Store", ".hidden", "gone.jsonl", "notes.docx", "sub/dataset_info.json"]
RULES = [
    ("", JSONL, sorted(LINES + OTHERS), PASSED),
    ("**/*.jsonl", TEXT, LINES, sorted(PASSED + OTHERS)),
    ("**/*.json*", TEXT, sorted({*LINES, *OTHERS, "sub/dataset_info.json"} - {"e.ndjson"}), None),
    ("*.jsonl", TEXT, ["B.JSONL", "a.jsonl", "one.jsonl"], None),
    ("link/*", TEXT, ["j.jsonl"], []),
    ("l*/*.jsonl", TEXT, ["link/j.jsonl"], None),
    ("**/h.*", TEXT, ["sub/h.jsonl"], None),
    ("sub", ALL, ["dataset_info.json", "h.jsonl"], []),
    (".hidden", JSONL, ["i.jsonl"], []),
    ("notes.docx", JSONL, ["notes.docx"], []),
]


@pytest.mark.parametrize(("path", "endings", "files", "passed"), RULES)
def test_a_path_names_files_by_one_rule(
    mixed: Path, path: str, endings: Sequence[str], files: list[str], passed: list[str] | None
) -> None:
    found = find_files(f"{mixed}/{path}".rstrip("/"), endings)
    assert list(found.files) == files
    assert all(place.is_file() for place in found.files.values())
    assert passed is None or found.passed_over == passed


def test_what_is_passed_over_is_told_by_number_and_first_names(mixed: Path) -> None:
    others = ", ".join(PASSED[:3])
    assert find_files(str(mixed), JSONL).told == f"11 files; passed over 5: {others}, ..."
    assert find_files(f"{mixed}/a.jsonl", JSONL).told == "1 file"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none", "no such file or folder"),
        ("none/*.txt", "no such file or folder"),
        ("f/*.xyz", "no file of that name there; passed over 12: .DS_Store, .hidden, B.JSONL, ..."),
        ("f/sub", "no file of a usual name there; passed over 2: dataset_info.json, h.jsonl"),
    ],
)
def test_a_path_that_names_no_file_tells_what_is_there(mixed: Path, path: str, said: str) -> None:
    with pytest.raises(DataError, match=said.replace(".", r"\.").replace("*", r"\*")):
        find_files(f"{mixed.parent}/{path}", TEXT)


def test_a_local_data_set_is_known_by_its_files(tmp_path: Path) -> None:
    folder = str(fill(tmp_path / "set", "train.jsonl"))
    corpus = HubSource(name="h", kind="hub", dataset=folder)
    prompts = HubPrompts(name="h", kind="hub", dataset=folder)
    before: list[dict[str, Any]] = [describe(corpus), describe_prompts(prompts)]
    assert [describe(corpus), describe_prompts(prompts)] == before
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "y"}\n')
    assert all(
        a["listing"] != b["listing"]
        for a, b in zip(before, [describe(corpus), describe_prompts(prompts)], strict=True)
    )
    assert "files" not in describe(corpus.model_copy(update={"dataset": "owner/name"}))


@pytest.mark.parametrize("names", [["manifest.json"], ["Manifest.JSON"], ["text", "Text"]])
def test_a_corpus_whose_folder_would_be_anothers_is_refused(names: list[str]) -> None:
    corpora = [{"name": name, "kind": "text", "path": "x"} for name in names]
    with pytest.raises(RecipeError, match="differ by capitals only|would lie where that file does"):
        load_config(PrepareConfig, {"corpora": corpora}, "prepare")


def test_check_and_run_tell_the_files_and_the_manifest_keeps_them(
    tmp_path: Path, tiny_target: Path, capsys: Capture
) -> None:
    recipe = str(write_recipe(tmp_path, tiny_target))
    (tmp_path / "text.jsonl").rename(fill(tmp_path / "folder", "notes.docx", ".git/x") / "a.jsonl")
    (tmp_path / "prompts.jsonl").rename(fill(tmp_path / "asked", "b.csv") / "p.jsonl")
    moved = [f"prepare.corpora[0].path={tmp_path}/folder", f"synthesize.prompts[0].path={tmp_path}/asked"]
    lines = [f"prepare.corpora[0]: {tmp_path}/folder: 1 file; passed over 2: .git, notes.docx"]
    lines += [f"synthesize.prompts[0]: {tmp_path}/asked: 1 file; passed over 1: b.csv"]
    assert cli.main(["check", recipe, *moved]) == 0
    told = capsys.readouterr().out
    assert [told.count(line) for line in lines] == [1, 1]
    assert cli.main(["prepare", recipe, *moved, "design=null"]) == 0
    assert capsys.readouterr().err.count(lines[0]) == 1
    (source,) = read_json(tmp_path / "runs/tiny/prepare/manifest.json")["corpora"]["text"]["sources"]
    assert (
        source.items() >= {"files": 1, "passed_over": 2, "passed_over_names": [".git", "notes.docx"]}.items()
    )
