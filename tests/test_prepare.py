"""The prepare stage: determinism, resuming, budgets, splits, and what it refuses."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet
from transformers import AutoTokenizer

from fastdraft.console import Console
from fastdraft.data import corpora, pack
from fastdraft.data.shards import RowWriter, open_corpus
from fastdraft.errors import DataError, Interrupted
from fastdraft.recipe.base import load_config
from fastdraft.recipe.prepare import PrepareConfig
from fastdraft.recipe.run import RunConfig
from fastdraft.run_folder import RunFolder, file_sha256, write_json
from fastdraft.stages import prepare
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from fastdraft.workers import LocalWorkers


def context_of(root: Path, target: Path, seed: int = 0, threads: int = 0) -> StageContext:
    settings = RunConfig(name="test", seed=seed, threads=threads)
    return StageContext(RunFolder(root), settings, Target.at(target), {}, Console(quiet=True))


def config_of(*entries: dict[str, Any], **changes: Any) -> PrepareConfig:
    return load_config(PrepareConfig, {"row_length": 32, "corpora": list(entries), **changes}, "prepare")


def jsonl(path: Path, name: str = "text", **settings: Any) -> dict[str, Any]:
    return {"name": name, "kind": "jsonl", "path": str(path), **settings}


def execute(config: PrepareConfig, context: StageContext) -> dict[str, Any]:
    folder = context.folder("prepare")
    folder.begin(prepare.fingerprint(config, context))
    prepare.run(config, context)
    return folder.manifest()


def shards_of(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): file_sha256(path) for path in sorted(root.rglob("*.bin"))}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 2000)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "BLOCK_CHARS", 8000)
    monkeypatch.setattr(pack, "BATCH_CHARS", 3000)


@pytest.mark.usefixtures("small_blocks")
def test_a_corpus_becomes_rows_of_the_targets_tokens_each_document_once(
    tmp_path: Path, tiny_target: Path, small_corpus: Path
) -> None:
    context = context_of(tmp_path, tiny_target)
    manifest = execute(config_of(jsonl(small_corpus, license="MIT")), context)
    text = manifest["corpora"]["text"]
    train, validation = (
        open_corpus(context.folder("prepare"), "text", split) for split in ("train", "validation")
    )
    assert (manifest["separator_id"], manifest["dtype"], manifest["row_length"]) == (0, "uint16", 32)
    assert len(train.shards) > 1
    assert text["sources"][0].items() >= {"kind": "jsonl", "license": "MIT", "files_skipped": 0}.items()
    assert train.rows == text["train"]["rows"] > 10 * validation.rows >= 10
    ids = [int(i) for row in range(train.rows) for i in train[row]]
    documents = AutoTokenizer.from_pretrained(tiny_target).decode(ids).split("<|endoftext|>")[1:-1]
    wanted = {json.loads(line)["text"] for line in small_corpus.read_text().splitlines()}
    assert set(documents) <= wanted
    assert len(documents) == len(set(documents))
    assert text["train"]["documents"] + text["validation"]["documents"] == len(wanted) < 400
    assert text["duplicates"] == 400 - len(wanted)


def test_the_result_depends_on_the_seed_and_neither_on_threads_nor_on_batches(
    tmp_path: Path, tiny_target: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(jsonl(small_corpus, tokens=9000))
    for name, seed, threads in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        monkeypatch.setattr(pack, "BATCH_CHARS", 500 if name == "b" else 1_000_000)
        execute(config, context_of(tmp_path / name, tiny_target, seed, threads))
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b") != shards_of(tmp_path / "c")


def crash(patch: pytest.MonkeyPatch, owner: Any, method: str, at: int, before: bool) -> None:
    """Makes the `at`-th call of a function die just before or just after doing its work."""
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

    patch.setattr(owner, method, dying)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "death",
    [
        *((pack, "write_json", at) for at in (1, 3, 6)),
        (RowWriter, "add", 9),
        *((RowWriter, "close_shard", at) for at in (2, 7)),
        (pack.SeenDigests, "add", 3),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_killed_work_goes_on_to_the_same_bytes(
    tmp_path: Path, tiny_target: Path, small_corpus: Path, death: tuple[Any, str, int], before: bool
) -> None:
    config = config_of(jsonl(small_corpus, tokens=12000), jsonl(small_corpus, "more", tokens=4000))
    expected = execute(config, context_of(tmp_path / "whole", tiny_target))
    with pytest.MonkeyPatch.context() as patch:
        crash(patch, *death, before)
        with pytest.raises(KeyboardInterrupt):
            execute(config, context_of(tmp_path / "killed", tiny_target))
    folder = tmp_path / "killed" / "prepare"
    assert not (folder / "manifest.json").exists()
    resumed = execute(config, context_of(tmp_path / "killed", tiny_target))
    assert shards_of(tmp_path / "killed") == shards_of(tmp_path / "whole")
    assert resumed["corpora"] == expected["corpora"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["fingerprint.json", "manifest.json", "more", "text"]


@pytest.mark.usefixtures("small_blocks")
def test_a_signal_stops_the_work_and_what_was_finished_is_not_read_again(
    tmp_path: Path, tiny_target: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, context = config_of(jsonl(small_corpus)), context_of(tmp_path / "a", tiny_target)
    starts: list[Any] = []

    def stop_after_a_block(path: Path, value: Any) -> None:
        write_json(path, value)
        context.console.stop.requested = True

    def noted(source: Any, seed: int, start: Any, part: Any) -> Any:
        starts.append(start)
        return corpora.blocks(source, seed, start, part)

    monkeypatch.setattr(pack, "blocks", noted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "write_json", stop_after_a_block)
        with pytest.raises(Interrupted):
            execute(config, context)
    execute(config, context_of(tmp_path / "a", tiny_target))
    execute(config, context_of(tmp_path / "b", tiny_target))
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")
    assert [tuple(start) for start in starts][:1] == [(0, 0)]
    assert starts[1][1] > 0


def test_budgets_are_kept_to_a_document_and_entries_of_one_name_make_one_corpus(
    tmp_path: Path, tiny_target: Path, small_corpus: Path
) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"File {number} speaks of the river and the fox. " * 8)
    files = {"name": "mix", "kind": "text", "path": str(tmp_path / "*.txt"), "tokens": "1k"}
    manifest = execute(
        config_of(jsonl(small_corpus, "mix", tokens=5000), files), context_of(tmp_path / "run", tiny_target)
    )
    corpus = manifest["corpora"]["mix"]
    taken = [source["tokens"] for source in corpus["sources"]]
    assert 5000 <= taken[0] < 5400
    assert 1000 <= taken[1] < 1400
    packed = corpus["train"]["tokens"] + corpus["validation"]["tokens"]
    assert sum(taken) - 2 * 33 < packed <= sum(taken)


def test_validation_is_chosen_by_the_text_alone(
    tmp_path: Path, tiny_target: Path, small_corpus: Path
) -> None:
    tokenizer, chosen = AutoTokenizer.from_pretrained(tiny_target), []
    for seed in (0, 1):
        context = context_of(tmp_path / str(seed), tiny_target, seed)
        execute(config_of(jsonl(small_corpus), validation=0.3), context)
        corpus = open_corpus(context.folder("prepare"), "text", "validation")
        text = tokenizer.decode([int(i) for row in range(corpus.rows) for i in corpus[row]])
        chosen.append(set(text.split("<|endoftext|>")[1:-1]))
    assert len(chosen[0] & chosen[1]) > 0.8 * len(chosen[0])


def test_huge_empty_and_damaged_documents_are_handled(tmp_path: Path, tiny_target: Path) -> None:
    (tmp_path / "huge.txt").write_text("word " * 100_000)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "line.txt").write_text("x" * 50_000)
    half = "".join(json.dumps({"text": f"{i} half a pair: \ud800 " * 10}) + "\n" for i in range(30))
    (tmp_path / "half.jsonl").write_text(half)
    text = {"name": "t", "kind": "text", "path": str(tmp_path / "*.txt")}
    manifest = execute(
        config_of(text, jsonl(tmp_path / "half.jsonl", "half")), context_of(tmp_path / "run", tiny_target)
    )
    found = manifest["corpora"]["t"]
    assert found["train"]["documents"] + found["validation"]["documents"] + found["duplicates"] == 29
    assert manifest["corpora"]["half"]["train"]["rows"], "what Unicode forbids is replaced"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no new text"),
        ('{"text": "  "}\n{"text": null}\n', "no new text"),
        ('{"text": "just a few words"}\n', "each split needs at least one row of 33"),
        ('{"text": "some words"}\n{"txt": ""}\n', r"a\.jsonl: line 2: no 'text'; has txt"),
    ],
)
def test_a_bad_corpus_is_refused_and_once_mended_can_simply_be_run_again(
    tmp_path: Path, tiny_target: Path, small_corpus: Path, content: str, message: str
) -> None:
    path, context = tmp_path / "a.jsonl", context_of(tmp_path / "run", tiny_target)
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        execute(config_of(jsonl(path)), context)
    assert not context.folder("prepare").path.exists()
    shutil.copy(small_corpus, path)
    assert execute(config_of(jsonl(path)), context)["corpora"]["text"]["train"]["rows"]


def test_a_missing_source_is_refused_before_any_work_but_finished_work_outlives_its_sources(
    tmp_path: Path, tiny_target: Path, small_corpus: Path
) -> None:
    config, context = config_of(jsonl(small_corpus)), context_of(tmp_path / "run", tiny_target)
    execute(config, context)
    before = prepare.fingerprint(config, context)
    small_corpus.unlink()
    assert prepare.fingerprint(config, context) == before
    with pytest.raises(DataError, match=r"prepare.corpora\[0\].*no such file"):
        prepare.fingerprint(config, context_of(tmp_path / "other", tiny_target))


def test_the_fingerprint_holds_what_the_shards_depend_on(
    tmp_path: Path, tiny_target: Path, tiny_draft: Path, small_corpus: Path
) -> None:
    def of(config: PrepareConfig, target: Path = tiny_target, seed: int = 0) -> dict[str, Any]:
        return prepare.fingerprint(config, context_of(tmp_path, target, seed))

    base = of(config_of(jsonl(small_corpus)))
    assert base == of(config_of(jsonl(small_corpus)), tiny_draft), "another model of the same vocabulary"
    assert base == of(config_of(jsonl(small_corpus, license="MIT")))
    assert base != of(config_of(jsonl(small_corpus)), seed=1)
    assert base != of(config_of(jsonl(small_corpus, tokens="5k")))
    for changes in ({"row_length": 64}, {"validation": 0.1}):
        assert base != of(config_of(jsonl(small_corpus), **changes))


def retold(target: Path, folder: Path, tokenizer: dict[str, Any], added: dict[str, Any]) -> Path:
    """A copy of a target with changed entries in tokenizer_config.json, or one more added token."""
    shutil.copytree(target, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | tokenizer), encoding="utf-8")
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
    config = config_of(jsonl(small_corpus))
    base = prepare.fingerprint(config, context_of(tmp_path, tiny_target))

    def changed(name: str, tokenizer: dict[str, Any], **added: Any) -> set[str]:
        found = prepare.fingerprint(
            config, context_of(tmp_path, retold(tiny_target, tmp_path / name, tokenizer, added))
        )
        return {key for key in base if found[key] != base[key]}

    assert changed("separator", {"bos_token": "<|user|>"}) == {"separator_id"}
    assert not changed("special", {}, content="<|tool|>", special=True)
    assert not changed("control", {}, content="<|call|>", special=False)
    assert changed("word", {}, content="river", special=False) == {"added_words"}


@pytest.mark.usefixtures("small_blocks")
def test_corpora_are_read_from_and_shards_written_to_addresses_of_fsspec(
    tmp_path: Path, tiny_target: Path, small_corpus: Path
) -> None:
    here = execute(config_of(jsonl(small_corpus)), context_of(tmp_path / "here", tiny_target))
    memory = fsspec.filesystem("memory")
    texts = [json.loads(line) for line in small_corpus.read_text().splitlines()]
    parquet.write_table(pa.Table.from_pylist(texts), tmp_path / "rows.parquet")
    for name, content in {
        "plain/.hidden.jsonl": b"no",
        "plain/corpus.jsonl": small_corpus.read_bytes(),
        "zst/corpus.jsonl.zst": zstandard.compress(small_corpus.read_bytes()),
        "xz/corpus.jsonl": lzma.compress(small_corpus.read_bytes()),
        "parquet/corpus.parquet": (tmp_path / "rows.parquet").read_bytes(),
    }.items():
        memory.pipe(f"/{tmp_path.name}/{name}", content)
    root = f"memory://{tmp_path.name}"
    for run, path in enumerate(("plain/corpus.jsonl", "plain", "zst/*.zst", "xz", "parquet")):
        kind = "parquet" if path == "parquet" else "jsonl"
        config = config_of(jsonl(f"{root}/{path}", kind=kind), store=f"{root}/to")  # type: ignore[arg-type]
        context = context_of(tmp_path / str(run), tiny_target)
        there, folder = execute(config, context), context.folder("prepare")
        for split in ("train", "validation"):
            assert there["corpora"]["text"][split]["rows"] > 0
            assert not list(folder.path.rglob("*.bin")), "they are in the store alone"
            assert there["corpora"]["text"][split] == here["corpora"]["text"][split]
        assert sorted(memory.ls(f"/{tmp_path.name}/to/text", detail=False))[0].endswith("train-00000.bin")
        assert open_corpus(folder, "text", "train").take([0, 5]).shape == (2, 33)
        fetched = shards_of(tmp_path / str(run))
        assert fetched.items() <= shards_of(tmp_path / "here").items()
        memory.rm(f"/{tmp_path.name}/to", recursive=True)


@pytest.mark.parametrize(
    ("path", "said"),
    [("memory://nothing/there", "no file of a usual name there"), ("nostore://x", "Protocol not known")],
)
def test_an_address_of_no_use_is_one_line(path: str, said: str) -> None:
    with pytest.raises(DataError, match=f"{path}: .*{said}"):
        corpora.parts(config_of(jsonl(path)).corpora[0], 0)  # type: ignore[arg-type]


def test_a_large_parquet_file_is_cut_at_its_row_groups_and_small_files_are_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pa.Table.from_pylist([{"text": f"document {i}"} for i in range(100)])
    for name in ("a", "b"):
        parquet.write_table(rows, tmp_path / f"{name}.parquet", row_group_size=16)
    (source,) = config_of(jsonl(tmp_path, kind="parquet")).corpora
    assert [len(part.files) for part in corpora.parts(source, 0)] == [2]
    monkeypatch.setattr(corpora, "PART_BYTES", (tmp_path / "a.parquet").stat().st_size // 3)
    cut = corpora.parts(source, 0)
    assert {part.share for part in cut} == {(number, 3) for number in range(3)}
    found = [
        piece for part in cut for block in corpora.blocks(source, 0, (0, 0), part) for piece in block.pieces
    ]
    assert sorted(found) == sorted(2 * [f"document {i}" for i in range(100)])
    assert [(file, row) for file, row, _ in corpora.documents(source, 0)] == [
        (file, row) for file in (0, 1) for row in range(1, 101)
    ]
    behind = list(corpora.blocks(source, 0, (0, 40), cut[1]))
    assert sum(len(block.pieces) for block in behind) == sum(
        row > 40 for file, row, _ in corpora._documents(source, cut[1])
    )


def test_of_equal_documents_the_first_is_found_however_many_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "LATEST_DIGESTS", 50)
    draw, known = np.random.default_rng(0), set[int]()
    seen = pack.SeenDigests(tmp_path / "seen", 0)
    for _ in range(40):
        digests = draw.integers(0, 400, 30).astype(np.uint64)
        found, wanted = seen.first_seen(digests), list[int]()
        for place, digest in enumerate(digests.tolist()):
            if digest not in known:
                wanted.append(place)
                known.add(digest)
        assert found.tolist() == wanted
        seen.add(digests[found])
    assert len(
        pack.SeenDigests(tmp_path / "seen", len(known)).first_seen(np.arange(400, dtype=np.uint64))
    ) == 400 - len(known)


@pytest.mark.usefixtures("small_blocks")
def test_encoded_elsewhere_the_shards_are_the_same(
    tmp_path: Path, tiny_target: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(jsonl(small_corpus, tokens=12000), jsonl(small_corpus, "more", tokens=4000))
    whole = execute(config, context_of(tmp_path / "whole", tiny_target))
    monkeypatch.setattr(LocalWorkers, "count", 1)
    assert execute(config, context_of(tmp_path / "other", tiny_target))["corpora"] == whole["corpora"]
    assert shards_of(tmp_path / "other") == shards_of(tmp_path / "whole")
