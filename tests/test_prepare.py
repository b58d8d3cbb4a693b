"""The prepare stage: determinism, resuming, budgets, splits, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdraft.console import Console
from fastdraft.data import build
from fastdraft.data.journal import Journal
from fastdraft.data.loader import MixtureSampler
from fastdraft.data.shards import ShardWriter, open_corpus
from fastdraft.errors import DataError, FastDraftError, Interrupted, RecipeError
from fastdraft.recipe.base import load_config
from fastdraft.recipe.prepare import PrepareConfig
from fastdraft.recipe.run import RunConfig
from fastdraft.run_folder import RunFolder, file_sha256
from fastdraft.stages import prepare
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from fastdraft.training.batches import PackedBatches


def context_of(root: Path, target: Path, seed: int = 0) -> StageContext:
    return StageContext(
        RunFolder(root), RunConfig(name="test", seed=seed), Target.at(target), {}, Console(quiet=True)
    )


def config_of(*entries: dict[str, Any], **changes: Any) -> PrepareConfig:
    return load_config(
        PrepareConfig,
        {"row_length": 32, "shard_tokens": 2000, "corpora": list(entries), **changes},
        "prepare",
    )


def execute(config: PrepareConfig, context: StageContext) -> dict[str, Any]:
    artifact = context.folder("prepare")
    artifact.begin(prepare.fingerprint(config, context))
    prepare.run(config, context)
    return artifact.manifest()


def shards_of(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): file_sha256(path) for path in sorted(root.rglob("*.bin"))}


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BATCH_CHARS", 3000)
    monkeypatch.setattr(build, "COMMIT_CHARS", 12000)
    monkeypatch.setattr(build, "WINDOW_CHARS", 8000)


def test_a_corpus_becomes_rows_of_the_targets_tokens(
    tmp_path: Path, tiny_target: Path, small_corpus: Path
) -> None:
    from transformers import AutoTokenizer

    context = context_of(tmp_path, tiny_target)
    manifest = execute(
        config_of({"name": "text", "kind": "jsonl", "path": str(small_corpus), "license": "MIT"}), context
    )
    train, validation = (
        open_corpus(context.folder("prepare"), "text", split) for split in ("train", "validation")
    )
    assert manifest["separator_id"] == 0
    assert manifest["dtype"] == "uint16"
    assert train.num_shards > 1
    assert manifest["corpora"]["text"]["sources"][0]["license"] == "MIT"
    assert train.rows == manifest["corpora"]["text"]["train"]["rows"] > 10 * validation.rows >= 10
    text = AutoTokenizer.from_pretrained(tiny_target).decode(
        [int(i) for row in range(train.rows) for i in train[row]]
    )
    documents = list(text.split("<|endoftext|>")[1:-1])
    wanted = {json.loads(line)["text"] for line in small_corpus.read_text().splitlines()}
    assert set(documents) <= wanted
    assert len(documents) == len(set(documents))


def test_exact_duplicates_are_taken_once(tmp_path: Path, tiny_target: Path, small_corpus: Path) -> None:
    corpus = execute(
        config_of({"name": "text", "kind": "jsonl", "path": str(small_corpus)}),
        context_of(tmp_path, tiny_target),
    )["corpora"]["text"]
    distinct = len(set(small_corpus.read_text().splitlines()))
    assert corpus["train"]["documents"] + corpus["validation"]["documents"] == distinct < 400
    assert corpus["duplicates"] == 400 - distinct


def test_the_result_depends_on_the_seed_and_not_on_the_workers(
    tmp_path: Path, tiny_target: Path, small_corpus: Path
) -> None:
    entry = {"name": "text", "kind": "jsonl", "path": str(small_corpus)}
    for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        execute(config_of(entry, workers=workers), context_of(tmp_path / name, tiny_target, seed))
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b") != shards_of(tmp_path / "c")


def test_the_result_does_not_depend_on_how_work_is_batched(
    tmp_path: Path, tiny_target: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"name": "text", "kind": "jsonl", "path": str(small_corpus), "tokens": 9000}
    execute(config_of(entry), context_of(tmp_path / "a", tiny_target))
    monkeypatch.setattr(build, "BATCH_CHARS", 500)
    execute(config_of(entry), context_of(tmp_path / "b", tiny_target))
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")


def crash(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, at: int, before: bool) -> None:
    """Makes the `at`-th call of a method die just before or just after doing its work."""
    original: Callable[..., Any] = getattr(owner, method)
    calls = 0

    def dying(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and before:
            raise KeyboardInterrupt
        result = original(*arguments, **named)
        if calls == at:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, method, dying)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "death",
    [
        (Journal, "commit", 1),
        (Journal, "commit", 3),
        (Journal, "commit", 5),
        (ShardWriter, "flush", 4),
        (ShardWriter, "close_shard", 2),
        (ShardWriter, "close_shard", 5),
        (Journal, "add", 5),
    ],
)
@pytest.mark.usefixtures("small_batches")
def test_killed_work_goes_on_to_the_same_bytes(
    tmp_path: Path, tiny_target: Path, small_corpus: Path, death: tuple[type, str, int], before: bool
) -> None:
    config = config_of(
        {"name": "text", "kind": "jsonl", "path": str(small_corpus), "tokens": 12000},
        {"name": "more", "kind": "jsonl", "path": str(small_corpus), "tokens": 4000},
    )
    expected = execute(config, context_of(tmp_path / "whole", tiny_target))
    with pytest.MonkeyPatch.context() as patch:
        crash(patch, *death, before)
        with pytest.raises(KeyboardInterrupt):
            execute(config, context_of(tmp_path / "killed", tiny_target))
    assert not (tmp_path / "killed" / "prepare" / "manifest.json").exists()
    resumed = execute(config, context_of(tmp_path / "killed", tiny_target))
    assert shards_of(tmp_path / "killed") == shards_of(tmp_path / "whole")
    assert resumed["corpora"] == expected["corpora"]
    assert sorted(path.name for path in (tmp_path / "killed" / "prepare").iterdir()) == [
        "fingerprint.json",
        "manifest.json",
        "more",
        "text",
    ]


@pytest.mark.usefixtures("small_batches")
def test_a_wish_to_stop_is_met_after_a_commit(tmp_path: Path, tiny_target: Path, small_corpus: Path) -> None:
    config = config_of({"name": "text", "kind": "jsonl", "path": str(small_corpus)})
    context = context_of(tmp_path / "a", tiny_target)
    context.console.stop.requested = True
    with pytest.raises(Interrupted):
        execute(config, context)
    execute(config, context_of(tmp_path / "a", tiny_target))
    execute(config, context_of(tmp_path / "b", tiny_target))
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")


def test_budgets_are_kept_to_a_document_and_entries_of_one_name_make_one_corpus(
    tmp_path: Path, tiny_target: Path, small_corpus: Path
) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"File {number} speaks of the river and the fox. " * 8)
    config = config_of(
        {"name": "mix", "kind": "jsonl", "path": str(small_corpus), "tokens": 5000},
        {"name": "mix", "kind": "text", "path": str(tmp_path / "*.txt"), "tokens": "1k"},
    )
    corpus = execute(config, context_of(tmp_path / "run", tiny_target))["corpora"]["mix"]
    taken = [source["tokens"] for source in corpus["sources"]]
    assert 5000 <= taken[0] < 5400
    assert 1000 <= taken[1] < 1400
    packed = corpus["train"]["tokens"] + corpus["validation"]["tokens"]
    assert sum(taken) - 2 * 33 < packed <= sum(taken)


def test_validation_is_chosen_by_the_text_alone(
    tmp_path: Path, tiny_target: Path, small_corpus: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    chosen = []
    for seed in (0, 1):
        context = context_of(tmp_path / str(seed), tiny_target, seed)
        execute(
            config_of({"name": "text", "kind": "jsonl", "path": str(small_corpus)}, validation=0.3), context
        )
        corpus = open_corpus(context.folder("prepare"), "text", "validation")
        text = tokenizer.decode([int(i) for row in range(corpus.rows) for i in corpus[row]])
        chosen.append(set(text.split("<|endoftext|>")[1:-1]))
    assert len(chosen[0] & chosen[1]) > 0.8 * len(chosen[0])


def test_huge_and_empty_documents_are_handled(tmp_path: Path, tiny_target: Path) -> None:
    (tmp_path / "huge.txt").write_text("word " * 100_000)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "line.txt").write_text("x" * 50_000)
    corpus = execute(
        config_of({"name": "t", "kind": "text", "path": str(tmp_path / "*.txt")}),
        context_of(tmp_path / "run", tiny_target),
    )["corpora"]["t"]
    assert corpus["train"]["documents"] + corpus["validation"]["documents"] + corpus["duplicates"] == 29


def test_text_that_unicode_forbids_is_replaced(tmp_path: Path, tiny_target: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} half a pair: \ud800 " * 10}) + "\n" for i in range(30)))
    assert execute(
        config_of({"name": "t", "kind": "jsonl", "path": str(path)}),
        context_of(tmp_path / "run", tiny_target),
    )["corpora"]["t"]["train"]["rows"]


@pytest.mark.parametrize("content", ["", '{"text": ""}\n', '{"text": "  "}\n{"text": null}\n'])
def test_an_empty_corpus_is_refused(tmp_path: Path, tiny_target: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match="no new text"):
        execute(
            config_of({"name": "t", "kind": "jsonl", "path": str(tmp_path / "a.jsonl")}),
            context_of(tmp_path / "run", tiny_target),
        )


def test_a_corpus_under_one_row_is_refused_and_leaves_no_manifest(tmp_path: Path, tiny_target: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "just a few words"}\n')
    context = context_of(tmp_path / "run", tiny_target)
    for _ in range(2):
        with pytest.raises(DataError, match="each split needs at least one row of 33"):
            execute(config_of({"name": "t", "kind": "jsonl", "path": str(tmp_path / "a.jsonl")}), context)
    assert not context.folder("prepare").path.exists(), "a mended corpus can simply be run again"


def test_a_missing_source_is_refused_before_any_work(tmp_path: Path, tiny_target: Path) -> None:
    with pytest.raises(DataError, match=r"prepare.corpora\[0\].*no such file"):
        prepare.fingerprint(
            config_of({"name": "t", "kind": "jsonl", "path": str(tmp_path / "none.jsonl")}),
            context_of(tmp_path, tiny_target),
        )


def test_finished_work_outlives_its_sources(tmp_path: Path, tiny_target: Path, small_corpus: Path) -> None:
    config, context = (
        config_of({"name": "t", "kind": "jsonl", "path": str(small_corpus)}),
        context_of(tmp_path / "run", tiny_target),
    )
    execute(config, context)
    before = prepare.fingerprint(config, context)
    small_corpus.unlink()
    assert prepare.fingerprint(config, context) == before
    assert not context.folder("prepare").differences(before)


def test_the_fingerprint_holds_what_the_shards_depend_on(
    tmp_path: Path, tiny_target: Path, tiny_draft: Path, small_corpus: Path
) -> None:
    entry = {"name": "t", "kind": "jsonl", "path": str(small_corpus)}

    def of(config: PrepareConfig, target: Path = tiny_target, seed: int = 0) -> dict[str, Any]:
        return prepare.fingerprint(config, context_of(tmp_path, target, seed))

    base = of(config_of(entry))
    assert base == of(config_of(entry), tiny_draft), "another model of the same vocabulary"
    assert base == of(config_of(entry, workers=3)) == of(config_of({**entry, "license": "MIT"}))
    others = [
        of(config_of(entry), seed=1),
        of(config_of(entry, row_length=64)),
        of(config_of({**entry, "tokens": "5k"})),
        of(config_of(entry, validation=0.1)),
    ]
    assert all(other != base for other in others)


def retold(
    target: Path, folder: Path, tokenizer: dict[str, Any] | None = None, added: dict[str, Any] | None = None
) -> Path:
    """A copy of a target with changed entries in tokenizer_config.json, or one more added token."""
    shutil.copytree(target, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | (tokenizer or {})), encoding="utf-8"
    )
    if added:
        path = folder / "tokenizer.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        state["added_tokens"].append({"id": 300, **flags, **added})
        path.write_text(json.dumps(state), encoding="utf-8")
    return folder


def test_of_the_special_tokens_only_what_parts_documents_and_what_text_may_hold_matters(
    tmp_path: Path, tiny_target: Path, small_corpus: Path
) -> None:
    config = config_of({"name": "t", "kind": "jsonl", "path": str(small_corpus)})

    def of(target: Path) -> dict[str, Any]:
        return prepare.fingerprint(config, context_of(tmp_path, target))

    base = of(tiny_target)
    assert base["separator_id"] == 0
    assert of(retold(tiny_target, tmp_path / "separator", {"bos_token": "<|user|>"}))["separator_id"] == 1
    assert (
        of(retold(tiny_target, tmp_path / "special", added={"content": "<|tool|>", "special": True})) == base
    )
    assert (
        of(retold(tiny_target, tmp_path / "control", added={"content": "<|call|>", "special": False})) == base
    )
    word = of(retold(tiny_target, tmp_path / "word", added={"content": "river", "special": False}))
    assert {key for key in base if word[key] != base[key]} == {"added_words"}


def test_prepared_rows_are_trained_on_one_token_ahead(
    tmp_path: Path, tiny_target: Path, small_corpus: Path
) -> None:
    context = context_of(tmp_path / "run", tiny_target)
    execute(config_of({"name": "t", "kind": "jsonl", "path": str(small_corpus)}), context)
    corpus = open_corpus(context.folder("prepare"), "t", "train")
    source = PackedBatches(MixtureSampler({"t": corpus}, {"t": 1.0}, 0), 2, corpus.row_length, 4, 2)
    rows = source.sampler.rows(4, 4)
    for batch, part in zip(source.batches(1), (rows[:2], rows[2:]), strict=True):
        assert batch.input_ids.tolist() == part[:, :-1].tolist()
        assert batch.labels.reshape(2, -1).tolist() == part[:, 1:].tolist()


def test_a_damaged_journal_is_one_clear_line(tmp_path: Path, tiny_target: Path, small_corpus: Path) -> None:
    journal = tmp_path / "run" / "prepare" / ".journal" / "journal.sqlite"
    journal.parent.mkdir(parents=True)
    journal.write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(FastDraftError, match="redo it with --redo prepare"):
        execute(
            config_of({"name": "t", "kind": "jsonl", "path": str(small_corpus)}),
            context_of(tmp_path / "run", tiny_target),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_length": 0}, "prepare.row_length"),
        ({"validation": -0.1}, "prepare.validation"),
        ({"corpora": []}, "prepare.corpora"),
        ({"corpora": [{"name": "manifest.json", "kind": "text", "path": "x"}]}, "cannot be called"),
        (
            {
                "corpora": [
                    {"name": "Text", "kind": "text", "path": "x"},
                    {"name": "text", "kind": "text", "path": "x"},
                ]
            },
            "more than capitals",
        ),
        ({"corpora": [{"name": "t", "kind": "jsonl", "path": "x", "feild": "y"}]}, "did you mean 'field'"),
        ({"corpora": [{"name": "t", "kind": "text", "path": "x", "tokens": "many"}]}, "must be a count"),
    ],
)
def test_an_impossible_section_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        config_of({"name": "t", "kind": "text", "path": "x"}, **changes)
