"""The stage in which the target writes: budget, shares, resuming, accounts, fingerprints, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from conftest import write_recipe
from fastdraft import pipeline
from fastdraft.console import Console
from fastdraft.data.filters import RowCounts
from fastdraft.data.rows import read_all, read_facts, read_rows, unit_paths
from fastdraft.data.sparse_logits import read_with_logits
from fastdraft.errors import DataError, FastDraftError, Interrupted, RecipeError, TargetError
from fastdraft.recipe.evaluation import FileTask
from fastdraft.recipe.recipe import Recipe, load_recipe
from fastdraft.run_folder import StageFolder
from fastdraft.runtimes import synthesis
from fastdraft.runtimes.synthesis import sparse_logits
from fastdraft.stages import synthesize
from fastdraft.target import Target


class Folder:
    """Recipes and runs in one folder; design and prepare are done once and copied into every run."""

    def __init__(self, root: Path, target: Path) -> None:
        self.root, self.target, self.number = root, target, 0
        self.prepared = pipeline.run(self.recipe(), only=("design", "prepare")).root

    def recipe(self, **changes: object) -> Recipe:
        self.number += 1
        path = write_recipe(self.root, self.target)
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        value["run"]["name"] = f"run-{self.number}"
        value["synthesize"].update({"tokens": 1500, "batch_rows": 8, "max_new_tokens": 16, **changes})
        path.write_text(yaml.safe_dump(value), encoding="utf-8")
        return load_recipe(str(path))

    def ready(self, recipe: Recipe) -> Recipe:
        for stage in ("design", "prepare"):
            if not (recipe.run.root / stage).exists():
                shutil.copytree(self.prepared / stage, recipe.run.root / stage)
        return recipe

    def run(self, recipe: Recipe) -> StageFolder:
        return pipeline.run(self.ready(recipe), only=["synthesize"]).folder("synthesize")


@pytest.fixture(scope="module")
def folder(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("synthesize"), tiny_target)


@pytest.fixture(scope="module")
def written(folder: Folder) -> StageFolder:
    """A finished stage; tests only read it."""
    return folder.run(folder.recipe())


LOGITS = {"kind": "top_k", "k": 16}


def instructions(folder: Folder, **changes: object) -> dict[str, object]:
    path = str(folder.root / "prompts.jsonl")
    return {"kind": "jsonl", "name": "instructions", "path": path, "share": 2, **changes}


def contents(artifact: StageFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (artifact.path / "units").iterdir()}


def test_the_stage_writes_until_its_budget_and_accounts_for_every_row(written: StageFolder) -> None:
    manifest, rows = written.manifest(), list(read_all(written))
    assert manifest["asked"] == manifest["written"] + sum(manifest["filtered"].values()) + manifest["failed"]
    assert manifest["written"] == len(rows) == len({row.row_id for row in rows})
    assert manifest["tokens"] == sum(len(row.response_ids) for row in rows) >= 1500
    last = read_facts(unit_paths(written)[-1])["counts"]["tokens"]
    assert manifest["tokens"] - last < 1500
    for path in unit_paths(written):
        counts = RowCounts(**read_facts(path)["counts"])
        assert (counts.balance(), counts.written) == (0, len(read_rows(path)))
    for split in ("by_source", "by_temperature"):
        assert sum(part["written"] for part in manifest[split].values()) == len(rows)
    assert set(manifest["by_source"]) == {"instructions", "magpie", "code"}
    assert {f"{row.temperature:g}" for row in rows} <= set(manifest["by_temperature"])


def test_rows_hold_the_prompts_as_asked_and_the_answers_as_drawn(
    written: StageFolder, tiny_target: Path
) -> None:
    tokenizer: Any = Target.at(tiny_target).tokenizer
    for row in read_all(written):
        assert len(row.logprobs) == len(row.response_ids) <= 16
        assert (row.finish_reason == "stop") == (row.response_ids[-1] == 3)
        assert all(logprob == 0 if row.temperature == 0 else logprob <= 0 for logprob in row.logprobs)
        if row.source != "code":
            assert tokenizer.decode(row.prompt_ids).startswith("<|user|>\n")
            assert tokenizer.decode(row.prompt_ids).endswith("<|end|>\n<|assistant|>\n")


def test_any_beginning_of_the_units_holds_the_shares(folder: Folder) -> None:
    code = {"kind": "corpus", "name": "code", "corpus": "code", "share": 1, "prompt_tokens": [8, 24]}
    prompts = [instructions(folder), code]
    tokens, largest = {"instructions": 0, "code": 0}, 0
    for path in unit_paths(folder.run(folder.recipe(prompts=prompts, tokens=600))):
        facts = read_facts(path)
        tokens[facts["source"]] += facts["counts"]["tokens"]
        largest = max(largest, facts["counts"]["tokens"])
        assert abs(tokens["instructions"] - sum(tokens.values()) * 2 / 3) <= largest


def killed_every_second_time(write: Any, moment: str) -> Any:
    """A writer whose process ends before (half a file is left) or after each second of its files."""
    calls = 0

    def killed(path: Path, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls % 2 == 0 and moment == "before":
            path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, *arguments)
        if calls % 2 == 0:
            raise KeyboardInterrupt

    return killed


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("writer", "changes", "undisturbed"),
    [
        ("write_rows", {}, "written"),
        ("write_sparse_logits", {"tokens": 400, "logits": LOGITS}, "with_logits"),
    ],
    ids=["rows", "logits"],
)
def test_a_killed_run_goes_on_to_the_very_files_of_an_undisturbed_one(
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    moment: str,
    writer: str,
    changes: Any,
    undisturbed: str,
) -> None:
    whole = request.getfixturevalue(undisturbed)
    recipe = folder.recipe(**changes)
    with monkeypatch.context() as patch:
        patch.setattr(synthesize, writer, killed_every_second_time(getattr(synthesize, writer), moment))
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                folder.run(recipe)
    finished = folder.run(recipe)
    assert contents(finished) == contents(whole)
    new = ("provenance", "generated_tokens_per_second")
    assert {k: v for k, v in finished.manifest().items() if k not in new}.items() <= whole.manifest().items()
    (finished.path / "manifest.json").unlink()
    for owner, name in ((synthesize, "write_rows"), (synthesis, "unit_logits")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("done again"))
    assert contents(folder.run(recipe)) == contents(whole)


def test_a_stop_is_obeyed_between_two_units_and_the_same_command_goes_on(folder: Folder) -> None:
    recipe, console = folder.ready(folder.recipe()), Console(quiet=True)
    console.stop.requested = True
    context = pipeline.make_context(recipe, console)
    artifact = context.folder("synthesize")
    assert recipe.synthesize
    artifact.begin(synthesize.fingerprint(recipe.synthesize, context))
    with pytest.raises(Interrupted):
        synthesize.run(recipe.synthesize, context)
    assert [path.name for path in unit_paths(artifact)] == ["unit-00000.parquet"]
    assert folder.run(recipe).is_complete()


@pytest.fixture(scope="module")
def with_logits(folder: Folder) -> StageFolder:
    """A finished stage with logits; tests only read it."""
    return folder.run(folder.recipe(tokens=400, logits=LOGITS))


def test_every_unit_has_its_logits_and_every_row_its_part(
    with_logits: StageFolder, tiny_target: Path
) -> None:
    assert with_logits.manifest()["logits"] == LOGITS
    placed = list(read_with_logits(with_logits))
    assert [row for row, _ in placed] == list(read_all(with_logits))
    expected = sparse_logits(Target.at(tiny_target).model("cpu"), [row for row, _ in placed], 16)
    for (row, logits), whole in zip(placed, expected, strict=True):
        found = logits.read(0, len(row.response_ids))
        assert np.array_equal(np.sort(found.ids), np.sort(whole.ids))
        np.testing.assert_array_equal(logits.read(1, 3).ids, found.ids[1:3])


def test_a_k_that_leaves_no_tail_is_refused(folder: Folder) -> None:
    with pytest.raises(RecipeError, match=r"synthesize\.logits\.k: 320; must be below the 320 ids"):
        folder.run(folder.recipe(logits={"kind": "top_k", "k": 320}))


def test_prompts_used_up_before_the_budget_end_the_stage(folder: Folder) -> None:
    manifest = folder.run(folder.recipe(tokens="10M", prompts=[instructions(folder)])).manifest()
    assert manifest["asked"] == 80 * 3
    assert manifest["tokens"] < 10_000_000


def test_a_target_that_writes_nothing_useful_is_refused(folder: Folder) -> None:
    with pytest.raises(DataError, match="0 of 32 rows kept"):
        folder.run(folder.recipe(max_new_tokens=256, prompts=[instructions(folder)]))


def test_evaluation_prompts_among_the_prompts_are_counted(folder: Folder, tmp_path: Path) -> None:
    others = [f"How is {number}?" for number in range(24)]
    path, texts = tmp_path / "prompts.jsonl", ("tell me ABOUT number 3 and the fox.", *others)
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    artifact = folder.run(folder.recipe(prompts=[instructions(folder, path=str(path))]))
    refused = {"evaluation": 1, "empty": 0, "repeated": 0}
    assert artifact.manifest()["refused_prompts"] == {"instructions": refused}


def fingerprint(recipe: Recipe) -> dict[str, object]:
    assert recipe.synthesize
    return synthesize.fingerprint(recipe.synthesize, pipeline.make_context(recipe, Console(quiet=True)))


def test_the_fingerprint_follows_what_the_text_depends_on_and_nothing_else(
    folder: Folder, tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({"prompt": "An unrelated prompt"}) + "\n", encoding="utf-8")
    recipe = folder.ready(folder.recipe())
    assert recipe.evaluate
    task = FileTask(kind="file", name="t", path=str(tasks))
    own = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"tasks": [task]})})
    first = fingerprint(recipe)
    assert json.loads(json.dumps(first)) == first == fingerprint(own)
    tasks.write_text(json.dumps({"prompt": "what is 1 plus 7?"}) + "\n", encoding="utf-8")
    assert fingerprint(own) != first
    assert fingerprint(folder.ready(folder.recipe(top_k=5)))["settings"] != first["settings"]


def test_a_missing_prompt_file_is_one_line(folder: Folder) -> None:
    with pytest.raises(FastDraftError, match=r"nowhere\.jsonl"):
        folder.run(folder.recipe(prompts=[instructions(folder, path="nowhere.jsonl")]))


def test_a_writer_writes_what_it_would_write_as_the_target(folder: Folder, tiny_draft: Path) -> None:
    written = folder.run(folder.recipe(writer=str(tiny_draft)))
    recipe = folder.recipe()
    own = recipe.model_copy(update={"target": recipe.target.model_copy(update={"model": str(tiny_draft)})})
    alone = pipeline.run(own, only=["design", "prepare", "synthesize"]).folder("synthesize")
    by_writer, by_target = (list(map(read_rows, unit_paths(stage))) for stage in (written, alone))
    assert by_writer == by_target != []
    assert written.manifest()["writer"] == str(tiny_draft)


def test_a_writer_of_another_vocabulary_is_refused(folder: Folder) -> None:
    with pytest.raises(TargetError, match=r"synthesize\.writer: draft 8192, target 320; vocab_size"):
        folder.run(folder.recipe(writer="shipped:targets/starter"))
