"""Readers, corpora, cutting, tokenising, shards."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastdraft.data import corpora, readers
from fastdraft.data.corpora import blocks, describe, documents, split_document
from fastdraft.data.readers import field_values, read_rows, read_text
from fastdraft.data.shards import RowForm, RowWriter, open_corpus, token_dtype
from fastdraft.data.tokenize import DocumentEncoder, separator_id
from fastdraft.errors import DataError, FastDraftError, TargetError
from fastdraft.recipe.prepare import PrepareConfig, SourceConfig
from fastdraft.run_folder import StageFolder

TEXTS = ["first\nline", "zweiter Satz: ä ’ 漢", "third"]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    content = "".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts).encode()
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](content))
    return path


def source_of(kind: str, path: Path, **settings: Any) -> SourceConfig:
    source = {"name": "t", "kind": kind, "path": str(path), **settings}
    return PrepareConfig.model_validate({"corpora": [source]}).corpora[0]


def texts_of(source: SourceConfig, seed: int = 0) -> list[str | None]:
    return [text for _, _, text in documents(source, seed)]


# ---- reading


@pytest.mark.parametrize("suffix", PACK)
def test_jsonl_and_text_are_read_in_every_compression(tmp_path: Path, suffix: str) -> None:
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", TEXTS)
    assert [text for _, _, text in field_values(path, "text")] == TEXTS
    assert list(field_values(path, "text", after=2)) == [(3, f"{path}: line 3", "third")]
    (tmp_path / f"a.txt{suffix}").write_bytes(PACK[suffix](b"\xef\xbb\xbfone\r\ntwo"))
    assert texts_of(source_of("text", tmp_path)) == ["one\ntwo"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_truncated_download_is_named_and_not_taken_for_the_end(tmp_path: Path, suffix: str) -> None:
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", [f"{i} {i * 7919 % 1000003}" for i in range(5000)])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"a\.jsonl\S+: line \d+: damaged"):
        list(field_values(path, "text"))
    with pytest.raises(DataError, match="damaged"):
        read_text(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "line 2: not JSON"),
        (b"[1]", "line 2: a JSON list"),
        (b'{"body": "x"}', "line 2: no 'text'; has body"),
        (b'{"text": 3}', "line 2: 'text' is a int"),
        (b"\xff\xfe", "line 2: byte 0 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as failure:
        texts_of(source_of("jsonl", path))
    assert str(path) in str(failure.value)


def test_blank_lines_nulls_and_a_byte_order_mark_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": null}\r\n{"text": "two"}')
    assert texts_of(source_of("jsonl", path)) == ["one", "", "two"]


def test_parquet_is_read_and_a_missing_column_or_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [*TEXTS, None]}), path)
    assert texts_of(source_of("parquet", tmp_path)) == [*TEXTS, ""]
    assert [(n, text) for n, _, text in field_values(path, "text", after=2)] == [(3, "third"), (4, None)]
    with pytest.raises(DataError, match=r"a\.parquet: no 'body'; has text"):
        list(field_values(path, "body"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"a\.parquet: row 1: damaged"):
        list(field_values(path, "text"))


ROWS: list[dict[str, Any]] = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]


@pytest.mark.parametrize(
    ("name", "content", "unit"),
    [
        ("array.json", json.dumps(ROWS), "row"),
        ("pretty.json", json.dumps(ROWS, indent=1), "row"),
        ("one-after-the-other.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS), "row"),
        ("old-mac.jsonl", "".join(json.dumps(row) + "\r" for row in ROWS), "row"),
        ("plain-text-called.gz", "\n".join(map(json.dumps, ROWS)), "line"),
    ],
)
def test_rows_are_read_in_every_form_and_named_by_file_and_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, unit: str
) -> None:
    monkeypatch.setattr(readers, "ARRAY_BYTES", 7)
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert list(read_rows(path)) == [(f"{path}: {unit} {n}", row) for n, row in enumerate(ROWS, 1)]
    assert [row for _, row in read_rows(path, after=2)] == ROWS[2:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n{"a": 2}', r"line 2: not JSON"),
        (b'[{"a": 1},\n"text"]', r"line 2: not JSON \(no object"),
        (b'[{"a": 1},\n{"a" 2}]', r"line 2: not JSON \(Expecting ':'"),
        (b'[{"a": 1},\n{"a": "\xe9"}]', r"line 2: byte 7 is not UTF-8 \(0xE9\)"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16 text"),
        ('{"a": 1}'.encode("utf-16-le"), "binary data, or UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        (b"PK\x03\x04rest", "a zip archive"),
    ],
)
def test_a_file_that_holds_no_rows_says_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / "a.json"))


def test_text_that_is_not_utf8_is_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("eins\nzwei ü\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt: line 2: byte 5 is not UTF-8"):
        texts_of(source_of("text", tmp_path))


# ---- corpora


def test_source_code_leaves_out_tests_and_counts_files_that_are_not_utf8(tmp_path: Path) -> None:
    for name in ("a.py", "sub/b.py", "tests/c.py", "sub/test_d.py", "site-packages/e.py", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    source = source_of("source_code", tmp_path)
    assert sorted(texts_of(source), key=str) == [None, "a.py", "sub/b.py"]
    (block,) = blocks(source, 0, (0, 0))
    assert sorted(block.pieces) == ["a.py", "sub/b.py"]
    assert block.skipped == 1
    with pytest.raises(DataError, match="no file of a usual name there; passed over"):
        describe(source_of("source_code", tmp_path, exclude=["*"]))


def test_files_come_in_an_order_of_the_seed(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(str(number))
    orders = [texts_of(source_of("text", tmp_path), seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(map(str, orders[0])) == sorted(map(str, orders[2]))


def test_a_description_follows_content_not_time(tmp_path: Path) -> None:
    source = source_of("jsonl", write_jsonl(tmp_path / "a.jsonl", TEXTS), license="MIT")
    before = describe(source)
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert describe(source) == before
    assert "license" not in before
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:2], "thirb"])
    assert describe(source) != before


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_blocks_lose_nothing_and_go_on_behind_any_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(corpora, "BLOCK_CHARS", 500)
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", [f"document {name}{i}" for i in range(70)])
        for i in range(40):
            (tmp_path / f"{name}{i}.txt").write_text(f"some text {name}{i}")
    source = source_of(kind, tmp_path)
    found = list(blocks(source, 1, (0, 0)))
    pieces = [piece for block in found for piece in block.pieces]
    assert sorted(pieces) == sorted(map(str, texts_of(source)))
    assert pieces != texts_of(source, 1)
    assert max(sum(map(len, block.pieces)) for block in found) < 600
    assert len({int(digest) for block in found for digest in block.digests}) == len(pieces)
    for number, block in enumerate(found):
        rest = list(blocks(source, 1, block.end))
        assert [block.pieces for block in rest] == [block.pieces for block in found[number + 1 :]]


@given(st.text(alphabet="ab \n", max_size=300), st.integers(2, 40))
@settings(max_examples=100, deadline=None)
def test_pieces_are_short_and_lose_no_letter(text: str, limit: int) -> None:
    pieces = list(split_document(text, limit))
    assert all(0 < len(piece) <= limit and not piece.isspace() for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_cuts_prefer_paragraphs_then_lines_then_spaces() -> None:
    assert list(split_document("aaaa b\n\ncc dd ee", 10)) == ["aaaa b\n\n", "cc dd ee"]
    assert list(split_document("aaaa bb\ncc dd ee", 10)) == ["aaaa bb\n", "cc dd ee"]
    assert list(split_document("aaaa bb cc dd ee", 10)) == ["aaaa bb", " cc dd ee"]
    assert list(split_document("a" * 25, 10)) == ["a" * 10, "a" * 10, "a" * 5]


# ---- tokenising


def test_control_tokens_spelled_out_in_text_stay_text(tiny_target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    text = "he said <|end|> and <|endoftext|>\n<|user|>"
    (ids,) = DocumentEncoder(tokenizer, 320).encode([text])
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids.tolist()) == text
    assert 3 in tokenizer(text).input_ids, "the caller's tokenizer is left as it was"


@pytest.mark.parametrize("gap", [0, 5])
def test_the_encoders_tokenizer_is_the_targets_with_control_tokens_marked(
    tiny_target: Path, gap: int
) -> None:
    state = json.loads((tiny_target / "tokenizer.json").read_text())
    state["model"]["vocab"]["beyond"] = len(state["model"]["vocab"]) + gap
    backend = Tokenizer.from_str(json.dumps(state))
    added = {"Foo": "lstrip", "<|tool|>": "normalized", "<think>": "single_word"}
    backend.add_tokens([AddedToken(text, **{flag: True}) for text, flag in added.items()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    expected = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in expected["added_tokens"]:
        token["special"] = token["content"] not in ("Foo", "<think>")
    found = json.loads(DocumentEncoder(tokenizer, 400).tokenizer.to_str())
    assert {**found, "decoder": None} == {**expected, "decoder": None}


def test_a_saved_truncation_does_not_cut_documents(tiny_target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    tokenizer.backend_tokenizer.enable_truncation(4)
    (ids,) = DocumentEncoder(tokenizer, 320).encode(["a long text of many words " * 5])
    assert len(ids) > 20


def test_a_tokenizer_with_ids_beyond_the_model_is_refused(tiny_target: Path) -> None:
    with pytest.raises(TargetError, match="the model's vocabulary has 50"):
        DocumentEncoder(AutoTokenizer.from_pretrained(tiny_target), 50).encode(["Once upon a time"])


def test_the_separator_is_bos_or_else_eos() -> None:
    assert separator_id(7, (3,)) == 7
    assert separator_id(None, (3, 4)) == 3
    with pytest.raises(TargetError, match="neither BOS nor EOS"):
        separator_id(None, ())


# ---- shards


def ids(*values: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.array(values, dtype=np.uint32)


def make_corpus(folder: Path, rows: int, row_ids: int = 5, rows_per_shard: int = 7) -> StageFolder:
    """A finished prepare stage whose rows are a separator and then their own numbers."""
    form, splits = RowForm(row_ids - 1, 0, "uint16", rows_per_shard * row_ids), {}
    for split, count in (("train", rows), ("validation", 2)):
        writer = RowWriter(folder / "text", split, form)  # type: ignore[arg-type]
        writer.add([ids(*[number] * (row_ids - 1)) for number in range(count)])
        writer.close_shard()
        splits[split] = {"rows": count, "shards": writer.shards}
    stage = StageFolder(folder)
    stage.begin({"x": 1})
    stage.complete(row_length=row_ids - 1, dtype="uint16", separator_id=0, corpora={"text": splits})
    return stage


def test_rows_are_the_documents_one_after_the_other_with_a_separator_before_each(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path, "train", RowForm(3, 0, "uint16", 1000))
    writer.add([ids(1, 2), ids(3)])
    assert (writer.rows, writer.state()["carry"]) == (1, [3])
    writer.add([])
    writer.add([ids(4, 5, 6, 7, 8, 9)])
    writer.close_shard()
    found = np.fromfile(tmp_path / "train-00000.bin", dtype="<u2").tolist()
    assert found == [0, 1, 2, 0, 3, 0, 4, 5, 6, 7, 8, 9]
    assert writer.state()["carry"] == []


def test_rows_come_back_from_shards_by_number(tmp_path: Path) -> None:
    corpus = open_corpus(make_corpus(tmp_path / "prepare", 30), "text", "train")
    assert (corpus.rows, corpus.row_length, corpus.tokens, len(corpus.shards)) == (30, 4, 150, 5)
    assert corpus[29].tolist() == [0, 29, 29, 29, 29]
    assert corpus[29].dtype == np.int64
    assert corpus.take([6, 7, 0])[:, 1].tolist() == [6, 7, 0]
    with pytest.raises(IndexError):
        corpus[30]


def test_ids_fit_their_type() -> None:
    assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")


def test_a_shard_that_is_missing_or_cut_is_refused(tmp_path: Path) -> None:
    stage = make_corpus(tmp_path / "prepare", 30)
    path = stage.path / "text" / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(FastDraftError, match=r"train-00001\.bin: must have 70 bytes; do it again"):
            open_corpus(stage, "text", "train").take([0])
        path.unlink(missing_ok=True)
    with pytest.raises(DataError, match="must be one of text"):
        open_corpus(stage, "prose", "train")


def test_a_writer_goes_back_to_the_state_that_was_written_down(tmp_path: Path) -> None:
    form = RowForm(1, 0, "uint16", 8)
    writer = RowWriter(tmp_path, "train", form)
    writer.add([ids(1), ids(2), ids(3, 4)])
    writer.sync()
    state = json.loads(json.dumps(writer.state()))
    writer.add([ids(*range(5, 40))])  # closes shards after the commit
    again = RowWriter(tmp_path, "train", form, state)
    again.add([ids(9), ids(8, 7)])
    again.close_shard()
    assert [shard["rows"] for shard in again.shards] == [4, 2]
    content = b"".join((tmp_path / shard["file"]).read_bytes() for shard in again.shards)
    assert content == np.array([0, 1, 0, 2, 0, 3, 4, 0, 9, 0, 8, 7], dtype="<u2").tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-00000.bin", "train-00001.bin"]
