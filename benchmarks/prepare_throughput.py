"""The prepare stage: tokens per second beside the bare tokenizer, and peak memory at growing corpora.

    python benchmarks/prepare_throughput.py
    python benchmarks/prepare_throughput.py --tokenizer DIR --text corpus.jsonl --parts rate --output prepare.json

Text: Python's own library (or `--text`: .jsonl with "text", also compressed), repeated to the asked size with
a numbered line in every 2,000 characters, so that no piece is a duplicate. `raw` is tokenizers' encode_batch
over the batches that prepare makes, all texts in memory, nothing done with the ids; `raw_fast` is
encode_batch_fast, which leaves out the offsets and which prepare uses too. They take turns with whole stages
in one process, fingerprint included; a quotient divides prepare's tokens/s by theirs within a round. Memory
is the peak resident set of a child process that only prepares.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from machine import Report, options, ratio, take_turns, tell
from stepping.worker import peak_memory

from fastdraft.console import Console
from fastdraft.data.corpora import blocks, documents
from fastdraft.data.pack import BATCH_CHARS
from fastdraft.data.readers import field_values
from fastdraft.data.tokenize import DocumentEncoder, set_tokenizer_threads
from fastdraft.recipe.prepare import PrepareConfig, RowsSource, SourceCodeSource
from fastdraft.recipe.run import RunConfig
from fastdraft.run_folder import RunFolder
from fastdraft.stages import prepare
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

NUMBERED_CHARS = 2000


def main() -> None:
    parser = options(__doc__, "prepare_throughput", device=False)
    add = parser.add_argument
    add("--tokenizer", default="shipped:targets/starter", help="directory of tokenizer and config.json")
    add("--text", type=Path, help="a JSONL file of text; left out: Python's own library")
    add("--megabytes", nargs="+", type=float, default=[50, 250, 500], help="rate at the first, memory at all")
    add("--rounds", type=int, default=3)
    add("--parts", nargs="+", choices=["rate", "memory"], default=["rate", "memory"])
    add("--work", help="where temporary files go (about the size of the text)")
    add("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(prepare_once(given.child, given.tokenizer)))
        return
    if given.dry_run:
        given.megabytes, given.rounds = [1.0, 2.0], 1
    report = Report(given.output, "prepare_throughput", "cpu", given)
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        for part in given.parts:
            found = (measure_rate if part == "rate" else measure_memory)(Path(folder), given)
            report.add({"part": part, "tokenizer": Path(given.tokenizer).name, **found})
    report.finish()


def write_corpus(folder: Path, megabytes: float, text: Path | None) -> Path:
    """JSONL of that many megabytes (10**6 bytes of text), in which no two pieces are equal."""
    path, left, copy = folder / f"{megabytes:g}.jsonl", megabytes * 1e6, 0
    library = SourceCodeSource(name="library", kind="source_code", path="python:stdlib")
    with open(path, "w", encoding="utf-8") as file:
        while left > 0:
            copy += 1
            own = (document for _, _, document in documents(library, 0) if document)
            given = (document for _, _, document in field_values(text, "text")) if text else own
            for document in given:
                numbered = with_numbers(document, copy)
                file.write(json.dumps({"text": numbered}, ensure_ascii=False) + "\n")
                left -= len(numbered.encode("utf-8", "replace"))
                if left <= 0:
                    break
    return path


def with_numbers(document: str, copy: int) -> str:
    lines, since = [], NUMBERED_CHARS
    for number, line in enumerate(document.splitlines(keepends=True)):
        if since >= NUMBERED_CHARS:
            lines.append(f"# part {copy}.{number}\n")
            since = 0
        lines.append(line)
        since += len(line)
    return "".join(lines)


def prepare_once(corpus: Path, tokenizer: str) -> dict[str, Any]:
    """One whole stage, fingerprint included."""
    root = Path(tempfile.mkdtemp(dir=corpus.parent))
    config = PrepareConfig(corpora=[RowsSource(name="text", kind="jsonl", path=str(corpus))])
    run = RunFolder(root), RunConfig(name="benchmark")
    context = StageContext(*run, Target.at(tokenizer), {}, Console(quiet=True))
    try:
        start = time.perf_counter()
        context.folder("prepare").begin(prepare.fingerprint(config, context))
        prepare.run(config, context)
        seconds = time.perf_counter() - start
        text = context.folder("prepare").manifest()["corpora"]["text"]
    finally:
        shutil.rmtree(root)
    peak = 1e9 * (peak_memory(torch.device("cpu")) or 0) / 2**20
    found = {"seconds": seconds, "peak_mib": peak, "tokens": text["sources"][0]["tokens"]}
    return {**found, "duplicates": text["duplicates"]}


def measure_rate(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    corpus, target = write_corpus(folder, given.megabytes[0], given.text), Target.at(given.tokenizer)
    bare, batches = DocumentEncoder(target.tokenizer, target.vocabulary.size).tokenizer, list(batched(corpus))
    set_tokenizer_threads(0)

    def encode(how: str) -> None:
        for batch in batches:
            getattr(bare, how)(batch, add_special_tokens=False)

    works: dict[str, Any] = {"raw": partial(encode, "encode_batch")}
    works |= {"raw_fast": partial(encode, "encode_batch_fast")}
    works |= {"prepare": partial(prepare_once, corpus, given.tokenizer)}
    tokens, seconds = works["prepare"]()["tokens"], take_turns(works, given.rounds)
    found = {"megabytes": corpus.stat().st_size / 1e6, "tokens": tokens, "seconds": seconds}
    found["quotient_to_encode_batch"] = ratio(seconds["raw"], seconds["prepare"])
    found["quotient"] = ratio(seconds["raw_fast"], seconds["prepare"])
    for name, taken in seconds.items():
        print(f"{name:10}{tokens / min(taken):12,.0f} tokens/s at best of {taken}")
    print(f"prepare: {tell(found['quotient'])} of encode_batch_fast", flush=True)
    return found


def batched(corpus: Path) -> Iterator[list[str]]:
    """The batches that prepare makes of each block."""
    for block in blocks(RowsSource(name="text", kind="jsonl", path=str(corpus)), 0, (0, 0)):
        ends = zip(block.pieces, accumulate(map(len, block.pieces)), strict=True)
        for _, group in groupby(ends, lambda end: end[1] // BATCH_CHARS):
            yield [piece for piece, _ in group]


def measure_memory(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    runs, quiet = [], {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    for megabytes in given.megabytes:
        corpus = write_corpus(folder, megabytes, given.text)
        command = [sys.executable, __file__, "--child", str(corpus), "--tokenizer", given.tokenizer]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=quiet)
        runs.append({"megabytes": megabytes, **json.loads(done.stdout.splitlines()[-1])})
        corpus.unlink()
        print(f"{megabytes:.0f} MB: {runs[-1]['tokens']:,} tokens, peak {runs[-1]['peak_mib']:.0f} MiB")
    growth = runs[-1]["peak_mib"] / runs[0]["peak_mib"] - 1
    print(f"growth of the peak: {growth:+.1%}", flush=True)
    return {"runs": runs, "growth": growth}


if __name__ == "__main__":
    main()
