"""Sources, reading, cutting, tokenising, packing, shards and the mixture sampler."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fastdraft.data import loader
from fastdraft.data.loader import MixtureSampler, permute
from fastdraft.data.ordering import PieceStream, split_document
from fastdraft.data.packing import RowPacker
from fastdraft.data.readers import jsonl_texts, parquet_texts, read_text
from fastdraft.data.shards import PackedCorpus, ShardWriter, open_corpus, token_dtype
from fastdraft.data.sources import (
    HubSource,
    JsonlSource,
    ParquetSource,
    SourceCodeSource,
    SourceConfig,
    TextSource,
    find_files,
)
from fastdraft.data.tokenize import DocumentEncoder, separator_id
from fastdraft.errors import DataError, FastDraftError, TargetError
from fastdraft.run_folder import StageFolder

TEXTS = ["first\nline", "zweiter Satz: ä ’ 漢", "third"]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    content = "".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".xz":
        content = lzma.compress(content)
    elif path.suffix == ".zst":
        import pyarrow

        content = pyarrow.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)
    return path


# ---- reading


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst"])
def test_jsonl_is_read_in_every_compression(tmp_path: Path, suffix: str) -> None:
    assert [text for _, text in jsonl_texts(write_jsonl(tmp_path / f"a{suffix}", TEXTS), "text")] == TEXTS


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.xz", ".jsonl.zst"])
def test_a_truncated_download_is_named_and_not_taken_for_the_end(tmp_path: Path, suffix: str) -> None:
    path = write_jsonl(tmp_path / f"a{suffix}", [f"{i} {i * 7919 % 1000003}" for i in range(5000)])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"line \d+: damaged"):
        [text for _, text in jsonl_texts(path, "text")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "line 2: not JSON"),
        (b"[1]", "line 2: a JSON list"),
        (b'{"body": "x"}', "line 2: no field 'text'"),
        (b'{"text": 3}', "line 2: 'text' is a int"),
        (b"\xff\xfe", "line 2: byte 0 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as failure:
        [text for _, text in jsonl_texts(path, "text")]
    assert str(path) in str(failure.value)


def test_blank_lines_nulls_and_a_byte_order_mark_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": null}\r\n{"text": "two"}')
    assert [text for _, text in jsonl_texts(path, "text")] == ["one", "", "two"]


def test_parquet_is_read_and_a_missing_column_or_damage_is_named(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [*TEXTS, None]}), path)
    assert [text for _, text in parquet_texts(path, "text")] == [*TEXTS, ""]
    with pytest.raises(DataError, match="no column 'body': has text"):
        list(parquet_texts(path, "body"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="damaged"):
        [text for _, text in parquet_texts(path, "text")]


def test_text_that_is_not_utf8_is_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("eins\nzwei ü\n".encode("latin-1"))
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_text(tmp_path / "a.txt")


# ---- sources


def test_source_code_leaves_out_tests_and_undecodable_files_and_counts_those(tmp_path: Path) -> None:
    for name in ("a.py", "sub/b.py", "tests/c.py", "sub/test_d.py", "site-packages/e.py", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    skipped: list[str] = []
    source = SourceCodeSource(name="code", path=str(tmp_path))
    assert sorted(source.documents(0, skipped.append)) == ["a.py", "sub/b.py"]
    assert len(skipped) == 1


def test_files_come_in_an_order_of_the_seed(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(str(number))
    source = TextSource(name="t", path=str(tmp_path))
    orders = [list(source.documents(seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_globs_folders_and_single_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "deep/b.txt", "c.md", "d.bin"):
        (tmp_path / name).write_text("x")
    assert [f.name for f in find_files(str(tmp_path), ["*.txt"])] == ["a.txt", "deep/b.txt"]
    assert [f.name for f in find_files(str(tmp_path / "**" / "*.txt"), [])] == ["a.txt", "deep/b.txt"]
    assert [f.name for f in find_files(str(tmp_path / "d.bin"), ["*.txt"])] == ["d.bin"]
    for nothing in (tmp_path / "none", tmp_path / "*.xyz", tmp_path / "none" / "*.txt"):
        with pytest.raises(DataError, match="no "):
            find_files(str(nothing), ["*.txt"])


def test_a_description_follows_content_not_time(tmp_path: Path) -> None:
    import os

    source = JsonlSource(name="t", path=str(write_jsonl(tmp_path / "a.jsonl", TEXTS)), license="MIT")
    before = source.describe()
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert source.describe() == before
    assert "license" not in before
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:2], "thirb"])
    assert source.describe() != before


def test_kinds_are_told_apart_by_their_tag() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(SourceConfig)
    assert isinstance(
        adapter.validate_python({"name": "a", "kind": "parquet", "path": "x", "tokens": "2M"}), ParquetSource
    )
    assert isinstance(adapter.validate_python({"name": "a", "kind": "hub", "dataset": "x/y"}), HubSource)


def test_a_hub_source_streams_and_says_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    def load_dataset(name: str, subset: str | None, **options: Any) -> list[dict[str, Any]]:
        if name == "gone":
            raise ConnectionError("no route")
        assert options["streaming"]
        return [{"text": "a"}, {"text": None}, {"text": "b"}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert list(HubSource(name="h", dataset="x/y").documents(0)) == ["a", "", "b"]
    with pytest.raises(DataError, match="ConnectionError after 0 rows"):
        list(HubSource(name="h", dataset="gone").documents(0))
    with pytest.raises(DataError, match="row 1: no text under 'body'"):
        list(HubSource(name="h", dataset="x/y", field="body").documents(0))


def test_a_small_prefix_of_the_stream_is_a_spread_over_long_documents(tmp_path: Path) -> None:
    for letter in "abcd":
        (tmp_path / f"{letter}.txt").write_text((letter * 99 + "\n") * 1000)
    pieces = list(PieceStream(TextSource(name="t", path=str(tmp_path)), seed=0))
    assert len({piece[0] for piece in pieces[:8]}) >= 3
    assert sum(map(len, pieces)) == 400_000
    assert max(map(len, pieces)) <= 20_000


def test_the_shuffle_window_bounds_what_is_held_and_loses_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(500)])
    source = JsonlSource(name="t", path=str(path))
    narrow = list(PieceStream(source, 1, window_chars=200))
    assert sorted(narrow) == sorted(source.documents(0))
    assert narrow != list(source.documents(0))
    assert (
        narrow
        == list(PieceStream(source, 1, window_chars=200))
        != list(PieceStream(source, 2, window_chars=200))
    )


# ---- cutting, tokenising, packing


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


def test_control_tokens_spelled_out_in_text_stay_text(tiny_target: Path) -> None:
    from transformers import AutoTokenizer

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
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads((tiny_target / "tokenizer.json").read_text())
    state["model"]["vocab"]["beyond"] = len(state["model"]["vocab"]) + gap
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_tokens(
        [
            AddedToken("Foo", lstrip=True),
            AddedToken("<|tool|>", normalized=True),
            AddedToken("<think>", single_word=True),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    expected = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in expected["added_tokens"]:
        token["special"] = token["content"] not in ("Foo", "<think>")
    found = json.loads(DocumentEncoder(tokenizer, 400)._tokenizer.to_str())
    assert {**found, "decoder": None} == {**expected, "decoder": None}


def test_a_saved_truncation_does_not_cut_documents(tiny_target: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    tokenizer.backend_tokenizer.enable_truncation(4)
    (ids,) = DocumentEncoder(tokenizer, 320).encode(["a long text of many words " * 5])
    assert len(ids) > 20


def test_a_tokenizer_with_ids_beyond_the_model_is_refused(tiny_target: Path) -> None:
    from transformers import AutoTokenizer

    with pytest.raises(TargetError, match="the model's vocabulary has 50"):
        DocumentEncoder(AutoTokenizer.from_pretrained(tiny_target), 50).encode(["Once upon a time"])


def test_the_separator_is_bos_or_else_eos() -> None:
    assert separator_id(7, (3,)) == 7
    assert separator_id(None, (3, 4)) == 3
    with pytest.raises(TargetError, match="neither BOS nor EOS"):
        separator_id(None, ())


def test_rows_are_the_concatenation_with_a_separator_before_each_document() -> None:
    packer = RowPacker(4, 0, "uint16")
    assert packer.add([np.array([1, 2], dtype=np.uint32), np.array([3], dtype=np.uint32)]).tolist() == [
        [0, 1, 2, 0]
    ]
    assert packer.carry.tolist() == [3]
    assert packer.add([np.arange(4, 10, dtype=np.uint32)]).tolist() == [[3, 0, 4, 5], [6, 7, 8, 9]]
    assert packer.carry.tolist() == []


# ---- shards


def make_corpus(folder: Path, rows: int, row_ids: int = 5, rows_per_shard: int = 7) -> StageFolder:
    """A finished prepare artifact whose rows are filled with their own numbers."""
    splits = {}
    for split, count in (("train", rows), ("validation", 2)):
        writer = ShardWriter(folder / "text", split, row_ids, "uint16", rows_per_shard)
        writer.restore([], 0)
        writer.write(np.repeat(np.arange(count)[:, None], row_ids, 1))
        writer.close_shard()
        splits[split] = {"rows": count, "shards": writer.shards}
    artifact = StageFolder(folder)
    artifact.begin({"x": 1})
    artifact.complete(row_length=row_ids - 1, dtype="uint16", corpora={"text": splits})
    return artifact


def test_rows_come_back_from_shards_by_number(tmp_path: Path) -> None:
    corpus = open_corpus(make_corpus(tmp_path / "prepare", 30), "text", "train")
    assert corpus.rows == len(corpus) == 30
    assert corpus.row_length == 4
    assert corpus.num_shards == 5
    assert corpus[29].tolist() == [29] * 5
    assert corpus[29].dtype == np.int64
    assert corpus.take([6, 7, 0])[:, 0].tolist() == [6, 7, 0]
    with pytest.raises(IndexError):
        corpus[30]


def test_ids_fit_their_type() -> None:
    assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    artifact = make_corpus(tmp_path / "prepare", 30)
    path = artifact.path / "text" / "train-00001.bin"
    content = path.read_bytes()
    for damage, message in (
        (content[:-1], "corrupt shard of 69 bytes"),
        (b"\x01" + content[1:], "checksum"),
        (None, "missing"),
    ):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(FastDraftError, match=message):
            open_corpus(artifact, "text", "train")
        if damage is None:
            path.write_bytes(content)
    with pytest.raises(DataError, match="must be one of text"):
        open_corpus(artifact, "prose", "train")


def test_a_writer_goes_back_to_its_last_commit(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 2, "uint16", 4)
    writer.restore([], 0)
    writer.write(np.arange(6).reshape(3, 2))
    writer.flush()
    state = json.loads(json.dumps(writer.state()))
    writer.write(np.full((10, 2), 9))  # closes two shards after the commit
    writer.flush()
    again = ShardWriter(tmp_path, "train", 2, "uint16", 4)
    again.restore(**state)
    again.write(np.arange(6, 10).reshape(2, 2))
    again.close_shard()
    assert [shard["rows"] for shard in again.shards] == [4, 1]
    assert (
        b"".join((tmp_path / shard["file"]).read_bytes() for shard in again.shards)
        == np.arange(10, dtype="<u2").tobytes()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-00000.bin", "train-00001.bin"]


# ---- sampler


class Numbers(PackedCorpus):
    """A corpus without files whose rows hold their number."""

    def __init__(self, rows: int) -> None:
        super().__init__(Path("."), [{"file": "", "rows": rows}], 3, "uint16")

    def shard(self, number: int) -> np.ndarray[Any, Any]:
        return np.repeat(np.arange(self.rows, dtype=np.uint16)[:, None], 4, 1)


@given(st.integers(1, 300), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_a_permutation_holds_every_number_once(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, loader.mix(key)).tolist()) == list(range(size))


def test_the_sampler_has_no_state() -> None:
    corpora = {"a": Numbers(37), "b": Numbers(101)}
    whole = MixtureSampler(corpora, {"a": 1, "b": 2}, 3).rows(0, 200)
    pieces = MixtureSampler(corpora, {"b": 0.2, "a": 0.1}, 3)
    parts = [pieces.rows(start, 40) for start in (160, 0, 120, 40, 80)]
    assert (np.concatenate([parts[i] for i in (1, 3, 4, 2, 0)]) == whole).all()
    assert whole.dtype == np.int64
    assert whole.shape == (200, 4)
    assert (MixtureSampler(corpora, {"a": 1, "b": 2}, 4).rows(0, 200) != whole).any()


def test_every_group_of_rows_holds_the_corpora_in_their_weights() -> None:
    sampler = MixtureSampler(
        {"a": Numbers(50), "b": Numbers(50), "c": Numbers(9)}, {"a": 1, "b": 2, "c": 0}, 0
    )
    names = [name for name, _ in sampler.sources(0, 64 * 30)]
    for start in range(0, len(names), 64):
        assert abs(names[start : start + 64].count("a") - 64 / 3) <= 1.5
    assert "c" not in names
    assert len({tuple(names[s : s + 64]) for s in range(0, 640, 64)}) == 10


def test_each_epoch_walks_a_corpus_once_in_a_new_order() -> None:
    rows = MixtureSampler({"a": Numbers(60)}, {"a": 1}, 0).rows(0, 180)[:, 0].reshape(3, 60)
    assert all(sorted(epoch.tolist()) == list(range(60)) for epoch in rows)
    assert (rows[0] != rows[1]).any()
    assert (rows[1] != rows[2]).any()
    assert (rows[0] != np.arange(60)).any()


def test_counts_carry_over_from_block_to_block(monkeypatch: pytest.MonkeyPatch) -> None:
    corpora = {"a": Numbers(1000), "b": Numbers(2000)}
    expected = MixtureSampler(corpora, {"a": 1, "b": 2}, 0).sources(0, 900)
    monkeypatch.setattr(loader, "BLOCK", 128)
    assert MixtureSampler(corpora, {"a": 1, "b": 2}, 0).sources(0, 900) == expected
    assert MixtureSampler(corpora, {"a": 1, "b": 2}, 0).sources(500, 400) == expected[500:]


GOLDEN_ROWS = [("b", 0), ("a", 5), ("a", 1), ("a", 2), ("b", 2), ("a", 0)]


def test_the_first_rows_of_a_seed_never_change() -> None:
    sampler = MixtureSampler({"a": Numbers(10), "b": Numbers(10)}, {"a": 1, "b": 1}, 0)
    assert sampler.sources(0, 6) == GOLDEN_ROWS


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"c": 1.0}, "no such corpus"),
        ({"a": -1.0}, "must not be negative"),
        ({"a": 0.0}, "at least one weight"),
        ({"a": float("nan")}, "must not be negative"),
    ],
)
def test_an_impossible_mixture_is_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MixtureSampler({"a": Numbers(5)}, weights, 0)
