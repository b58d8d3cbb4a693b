"""Corpora as they come: cut off, vanishing, in every kind of Unicode, with documents of nothing and of megabytes, under odd names."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from fastdraft.data import sources
from fastdraft.data.ordering import PieceStream, split_document
from fastdraft.data.place import Place
from fastdraft.data.readers import jsonl_texts, parquet_texts, read_text
from fastdraft.data.shards import open_corpus
from fastdraft.data.sources import JsonlSource, ParquetSource, SourceCodeSource, TextSource
from fastdraft.errors import DataError
from test_data import write_jsonl
from test_prepare import config_of, context_of, execute, shards_of

TALES = [f"{i} foxes and {i * 7919 % 1000003} rivers" for i in range(3000)]


def write_parquet(path: Path, texts: list[str], group: int = 500) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=group)
    return path


# ---- cut off


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jsonl", r"a\.jsonl line \d+: cut off inside a line"),
        ("a.jsonl.gz", r"a\.jsonl\.gz line \d+: damaged"),
        ("a.jsonl.xz", r"a\.jsonl\.xz line \d+: damaged"),
        ("a.jsonl.zst", r"a\.jsonl\.zst line \d+: damaged"),
        ("a.parquet", r"a\.parquet row 1: damaged"),
    ],
)
def test_a_file_cut_off_half_way_is_one_line_naming_file_and_place_and_leaves_nothing(
    tmp_path: Path, tiny_target: Path, name: str, message: str
) -> None:
    path = (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name, TALES)
    half(path)
    context = context_of(tmp_path / "run", tiny_target)
    kind = "parquet" if name.endswith("parquet") else "jsonl"
    with pytest.raises(DataError, match=message) as failure:
        execute(config_of({"name": "t", "kind": kind, "path": str(path)}), context)
    assert "\n" not in str(failure.value)
    assert not context.folder("prepare").path.exists()


def test_a_file_cut_off_inside_a_character_is_not_taken_for_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "caf\xc3')
    with pytest.raises(DataError, match=r"a\.jsonl line 2: cut off inside a character"):
        list(jsonl_texts(path, "text"))
    path.write_bytes(b'{"text": "caf\xc3\n{"text": "one"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 1: byte 13 is not UTF-8"):
        list(jsonl_texts(path, "text"))


def test_a_bad_line_in_the_middle_is_not_taken_for_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "tw\n{"text": "three"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl line 2: not JSON"):
        list(jsonl_texts(path, "text"))


def test_a_page_of_a_table_that_was_overwritten_is_named_by_its_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TALES, group=1000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = os.urandom(2000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet row \d+: damaged"):
        list(parquet_texts(path, "text"))


# ---- reading from a place on


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz", ".parquet"])
def test_reading_goes_on_behind_a_place(tmp_path: Path, suffix: str) -> None:
    for number in range(3):
        texts = TALES[number * 100 : number * 100 + 100]
        path = tmp_path / f"{number}{suffix}"
        write_parquet(path, texts, group=30) if suffix == ".parquet" else write_jsonl(path, texts)
    source = (ParquetSource if suffix == ".parquet" else JsonlSource)(name="t", path=str(tmp_path))
    everything = list(source.documents(4))
    for taken in (0, 1, 30, 99, 100, 101, 215, 300):
        place = Place()
        documents = source.documents(4, place=place)
        for _ in range(taken):
            next(documents)
        assert list(source.documents(4, place=Place.from_state(place.state()))) == everything[taken:]


def test_lines_before_a_place_are_not_parsed_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"other": 1}\n\n{"text": "two"}\n', encoding="utf-8")
    assert list(jsonl_texts(path, "text", after=2)) == [(4, "two")]


@given(
    st.lists(st.text(alphabet="ab \n", max_size=60), max_size=30), st.integers(0, 60), st.integers(10, 200)
)
@settings(max_examples=60, deadline=None)
def test_a_stream_goes_on_from_its_state_wherever_it_stopped(
    texts: list[str], taken: int, window: int
) -> None:
    class Texts:
        def documents(self, seed: int, skipped: Callable[[str], None], place: Place) -> object:
            for row in range(place.row, len(texts)):
                place.row = row + 1
                yield texts[row]

    everything = list(PieceStream(Texts(), 2, window_chars=window, limit=20))  # type: ignore[arg-type]
    stream = PieceStream(Texts(), 2, window_chars=window, limit=20)  # type: ignore[arg-type]
    given_before = [piece for _, piece in zip(range(taken), stream, strict=False)]
    state = json.loads(json.dumps(stream.state()))
    rest = list(PieceStream(Texts(), 2, state, window_chars=window, limit=20))  # type: ignore[arg-type]
    assert given_before + rest == everything
    assert sorted(everything) == sorted(piece for text in texts for piece in split_document(text, 20))


# ---- Unicode

ODD = {
    "a byte order mark inside": "one \ufeff two",
    "NUL": "zero \x00 byte",
    "combining marks": "e\u0301 a\u0308\u0323 \u0915\u094d\u0937",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "right to left": "\u202bשלום\u202c مرحبا",
    "line ends": "a\r\nb\rc\nd",
    "line separators": "one\u2028two\u2029three\x85four\x0b\x0cfive",
    "private and last": "\ue000 \U0010ffff \ufffd",
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("escaped", [False, True])
def test_every_kind_of_unicode_comes_through_to_the_rows(
    tmp_path: Path, tiny_target: Path, name: str, escaped: bool
) -> None:
    from transformers import AutoTokenizer

    texts = [f"{ODD[name]} number {i} {ODD[name]}" for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        "".join(json.dumps({"text": text}, ensure_ascii=escaped) + "\n" for text in texts).encode()
    )
    context = context_of(tmp_path / "run", tiny_target)
    execute(config_of({"name": "t", "kind": "jsonl", "path": str(path)}), context)
    rows = open_corpus(context.folder("prepare"), "t", "train")
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    found = tokenizer.decode(
        rows.take(range(rows.rows)).reshape(-1).tolist(), clean_up_tokenization_spaces=False
    ).split("<|endoftext|>")
    assert len(found) > 5
    assert set(found[1:-1]) <= set(texts)


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path, tiny_target: Path) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{i} \ud83d half \udc00 "}) + "\n" for i in range(60)), encoding="ascii"
    )
    context = context_of(tmp_path / "run", tiny_target)
    execute(config_of({"name": "t", "kind": "jsonl", "path": str(path)}), context)
    ids = open_corpus(context.folder("prepare"), "t", "train")[1].tolist()
    assert " ? half ? " in AutoTokenizer.from_pretrained(tiny_target).decode(ids)


def test_text_files_lose_their_mark_and_their_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree \ufeff\n".encode())
    assert read_text(tmp_path / "a.txt") == "one\ntwo\rthree \ufeff\n"


# ---- nothing, and a great deal


def test_documents_of_no_bytes_are_left_out_and_files_of_no_bytes_are_no_error(
    tmp_path: Path, tiny_target: Path
) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "full.txt").write_text("\n\n".join(TALES), encoding="utf-8")
    source = {"name": "t", "kind": "text", "path": str(tmp_path / "*.txt")}
    assert (
        execute(config_of(source), context_of(tmp_path / "run", tiny_target))["corpora"]["t"]["train"][
            "documents"
        ]
        > 0
    )


def test_empty_and_blank_texts_between_others_change_nothing(tmp_path: Path, tiny_target: Path) -> None:
    rows = []
    for name, texts in (
        ("a", TALES[:300]),
        ("b", ["", *TALES[:150], " \n\t ", "", *TALES[150:300], "\u2003"]),
    ):
        context = context_of(tmp_path / name, tiny_target)
        corpus = execute(
            config_of(
                {"name": "t", "kind": "jsonl", "path": str(write_jsonl(tmp_path / f"{name}.jsonl", texts))}
            ),
            context,
        )
        rows.append((shards_of(tmp_path / name), corpus["corpora"]["t"]["duplicates"]))
    assert rows[0] == rows[1]
    assert rows[0][1] == 0


def line_ending_tokenizer() -> Tokenizer:
    """Byte-level BPE behind the pre-tokenizer of Llama 3 and Qwen."""
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TALES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


LLAMA = line_ending_tokenizer()


@given(st.text(alphabet="ab.1 \n\t\u00e9", min_size=1, max_size=400), st.integers(20, 60))
@settings(max_examples=200, deadline=None)
def test_the_ids_of_the_pieces_are_those_of_the_whole_document(text: str, limit: int) -> None:
    words = text.replace("\t", " word")  # most windows hold a place to cut
    pieces = list(split_document(words, limit))
    if "".join(pieces) != words or any(no_place_to_cut(piece, limit) for piece in pieces[:-1]):
        return
    ids = [token for piece in pieces for token in LLAMA.encode(piece).ids]
    assert ids == LLAMA.encode(words).ids


def no_place_to_cut(piece: str, limit: int) -> bool:
    """Whether a piece was cut at the limit for want of a line end or a space."""
    return len(piece) == limit and not piece.endswith("\n")


def test_a_document_of_megabytes_is_held_a_few_times_and_cut_into_pieces(tmp_path: Path) -> None:
    size = 6_000_000
    path = write_jsonl(tmp_path / "a.jsonl", ["the quick brown fox\n" * (size // 20)])
    tracemalloc.start()
    count = chars = 0
    for piece in PieceStream(JsonlSource(name="t", path=str(path)), 0):
        count, chars = count + 1, chars + len(piece)
        assert len(piece) <= 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert chars == size
    assert count >= size // 20_000
    assert peak < 5 * size


def test_one_document_many_blocks_long_becomes_rows_that_hold_all_of_it(
    tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdraft.data import build

    for name, chars in (("BATCH_CHARS", 2000), ("COMMIT_CHARS", 8000), ("WINDOW_CHARS", 4000)):
        monkeypatch.setattr(build, name, chars)
    monkeypatch.setattr(build, "piece_chars", lambda row_length: 200)
    book = "\n".join(TALES)
    context = context_of(tmp_path / "run", tiny_target)
    corpus = execute(
        config_of({"name": "t", "kind": "jsonl", "path": str(write_jsonl(tmp_path / "a.jsonl", [book]))}),
        context,
    )
    text = corpus["corpora"]["t"]
    assert (
        text["train"]["documents"] + text["validation"]["documents"]
        == len(list(split_document(book, 200)))
        > 300
    )
    assert text["train"]["tokens"] + text["validation"]["tokens"] > text["sources"][0]["tokens"] - 2 * 33, (
        "all but two open rows"
    )


def test_a_cut_never_parts_a_letter_from_its_marks() -> None:
    text = "e\u0301" * 50
    pieces = list(split_document(text, 21))
    assert "".join(pieces) == text
    assert not any(piece[0] == "\u0301" for piece in pieces)
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert all(set(piece) == set(family) for piece in split_document(family * 10, 12))


# ---- names


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_file_names_that_are_not_utf8_are_read_and_described(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / os.fsdecode(b"caf\xe9%d.txt" % number)).write_text(f"tale {number}", encoding="utf-8")
    source = TextSource(name="t", path=str(tmp_path))
    assert sorted(source.documents(0)) == ["tale 0", "tale 1", "tale 2"]
    assert source.describe()["files"] == 3
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"\xff")
    with pytest.raises(DataError) as failure:
        list(source.documents(0))
    assert "line 1: not UTF-8" in str(failure.value)
    failure.value.args[0].encode("utf-8", "backslashreplace")


def test_names_in_data_never_become_paths(tmp_path: Path, tiny_target: Path) -> None:
    rows = [{"text": tale, "name": "../../escaped", "path": "/etc/x", "../key": 1} for tale in TALES[:300]]
    path = tmp_path / "in" / "a.jsonl.gz"
    path.parent.mkdir()
    with open(path, "wb") as raw, gzip.GzipFile("../../escaped.jsonl", "wb", fileobj=raw) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    context = context_of(tmp_path / "run", tiny_target)
    execute(config_of({"name": "t", "kind": "jsonl", "path": str(path)}), context)
    found = {item.relative_to(tmp_path).parts[0] for item in tmp_path.rglob("*")}
    assert found == {"in", "run"}
    assert {item.suffix for item in (tmp_path / "run").rglob("*") if item.is_file()} == {".bin", ".json"}


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "nul\x00", ""])
def test_a_corpus_cannot_be_named_like_a_path(name: str) -> None:
    from fastdraft.errors import RecipeError

    with pytest.raises(RecipeError):
        config_of({"name": name, "kind": "jsonl", "path": "x"})


# ---- vanishing


@pytest.mark.parametrize("kind", [TextSource, SourceCodeSource, JsonlSource, ParquetSource])
def test_a_file_that_vanishes_while_the_corpus_is_read_is_an_error_and_not_less_text(
    tmp_path: Path, kind: type
) -> None:
    suffix = {TextSource: ".txt", SourceCodeSource: ".py", JsonlSource: ".jsonl", ParquetSource: ".parquet"}[
        kind
    ]
    for number in range(4):
        path = tmp_path / f"{number}{suffix}"
        if kind is JsonlSource:
            write_jsonl(path, ["tale"])
        elif kind is ParquetSource:
            write_parquet(path, ["tale"])
        else:
            path.write_text("tale", encoding="utf-8")
    documents = kind(name="t", path=str(tmp_path)).documents(0)
    next(documents)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=rf"\d\{suffix}.*must (exist|be a whole)"):
        next(documents)


def test_a_file_that_vanishes_before_it_is_described_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("tale", encoding="utf-8")
    source = TextSource(name="t", path=str(tmp_path))
    files = source.files()
    (tmp_path / "a.txt").unlink()
    monkeypatch.setattr(sources, "find_files", lambda *arguments: files)
    with pytest.raises(DataError, match=r"a\.txt: No such file"):
        source.describe()


def test_a_file_that_shrinks_into_a_hole_of_the_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TALES[:10])

    class Failing:
        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *_: object) -> None: ...

        def __iter__(self) -> object:
            yield b'{"text": "one"}\n'
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("fastdraft.data.readers.open_binary", lambda path: Failing())
    with pytest.raises(DataError, match=r"a\.jsonl line 2: damaged \(\[Errno 5\] Input/output error\)"):
        list(jsonl_texts(path, "text"))


def test_a_row_number_behind_the_corpus_is_refused(
    tmp_path: Path, tiny_target: Path, small_corpus: Path
) -> None:
    context = context_of(tmp_path / "run", tiny_target)
    execute(config_of({"name": "t", "kind": "jsonl", "path": str(small_corpus)}), context)
    rows = open_corpus(context.folder("prepare"), "t", "train")
    with pytest.raises(IndexError):
        rows.take([0, rows.rows])
    assert (
        rows.take(np.array([rows.rows - 1, 0, 3])) == np.stack([rows[rows.rows - 1], rows[0], rows[3]])
    ).all()
