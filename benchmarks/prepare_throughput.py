"""Measures the prepare stage: tokens per second beside the bare tokenizer, and peak memory at two sizes of corpus.

    python benchmarks/prepare_throughput.py
    python benchmarks/prepare_throughput.py --tokenizer DIR --text corpus.jsonl --parts rate --output prepare.json

Text: Python's own library (or `--text`: .jsonl with "text", also .gz, .xz and .zst), repeated to the asked size with a numbered line in
every 2,000 characters, so that no piece is a duplicate of another. `raw` is tokenizers' encode_batch over the batches that prepare makes,
all texts in memory, nothing done with the ids; `raw_fast` is encode_batch_fast, which leaves out the offsets and which prepare uses too.
They alternate with whole stages in one process, fingerprint included; a quotient divides prepare's tokens/s by theirs within a round.
`cpu` is processor time of all threads, which a busy machine stretches less than it does seconds. Memory is the peak resident set of a
child process that only prepares.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from machine import Report, add_arguments, ratio

from fastdraft.console import Console
from fastdraft.data.corpora import blocks, documents
from fastdraft.data.pack import BATCH_CHARS
from fastdraft.data.readers import jsonl_values
from fastdraft.data.tokenize import DocumentEncoder, set_tokenizer_threads
from fastdraft.recipe.prepare import PrepareConfig, RowsSource, SourceCodeSource
from fastdraft.recipe.run import RunConfig
from fastdraft.run_folder import RunFolder
from fastdraft.stages import prepare
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

NUMBERED_CHARS = 2000


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(prepare_once(arguments.child, arguments.tokenizer)))
        return
    report = Report(arguments.output, "prepare_throughput", "cpu", arguments)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        for part in arguments.parts:
            measure = measure_rate if part == "rate" else measure_memory
            found = measure(Path(folder), arguments)
            report.add({"part": part, "tokenizer": Path(arguments.tokenizer).name, **found})
    report.finish()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer",
        default="shipped:targets/starter",
        help="a directory with a tokenizer and a config.json",
    )
    parser.add_argument("--text", type=Path, help="a JSONL file of text; left out: Python's own library")
    parser.add_argument(
        "--megabytes",
        nargs=2,
        type=float,
        default=[50, 500],
        help="of text: rate at the first, memory at both",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=["rate", "memory"], default=["rate", "memory"])
    parser.add_argument("--work", help="where temporary files go (about the size of the text)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    add_arguments(parser, "prepare_throughput", device=False)
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.megabytes, arguments.rounds = [1.0, 2.0], 1
    return arguments


def write_corpus(folder: Path, megabytes: float, text: Path | None) -> Path:
    """JSONL of that many megabytes (10**6 bytes of text), in which no two pieces are equal."""
    path, left, copy = folder / f"{megabytes:g}.jsonl", megabytes * 1e6, 0
    with open(path, "w", encoding="utf-8") as file:
        while left > 0:
            copy += 1
            for document in texts(text):
                numbered = with_numbers(document, copy)
                file.write(json.dumps({"text": numbered}, ensure_ascii=False) + "\n")
                left -= len(numbered.encode("utf-8", "replace"))
                if left <= 0:
                    break
    return path


def texts(path: Path | None) -> Iterator[str]:
    if path is None:
        library = SourceCodeSource(name="library", kind="source_code", path="python:stdlib")
        return (text for _, _, text in documents(library, 0) if text)
    return (text for _, text in jsonl_values(path, "text"))


def with_numbers(document: str, copy: int) -> str:
    lines, since = [], NUMBERED_CHARS
    for number, line in enumerate(document.splitlines(keepends=True)):
        if since >= NUMBERED_CHARS:
            lines.append(f"# part {copy}.{number}\n")
            since = 0
        lines.append(line)
        since += len(line)
    return "".join(lines)


def prepare_once(corpus: Path, tokenizer: str) -> dict[str, float]:
    """One whole stage, fingerprint included, as a process's first."""
    root = Path(tempfile.mkdtemp(dir=corpus.parent))
    config = PrepareConfig(corpora=[RowsSource(name="text", kind="jsonl", path=str(corpus))])
    target = Target.at(tokenizer)
    context = StageContext(RunFolder(root), RunConfig(name="benchmark"), target, {}, Console(quiet=True))
    try:
        begin, started = time.perf_counter(), time.process_time()
        context.folder("prepare").begin(prepare.fingerprint(config, context))
        prepare.run(config, context)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - started
        text = context.folder("prepare").manifest()["corpora"]["text"]
    finally:
        shutil.rmtree(root)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1 << (20 if sys.platform == "darwin" else 10)
    )
    times = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak_mib}
    return {**times, "tokens": text["sources"][0]["tokens"], "duplicates": text["duplicates"]}


def measure_rate(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    corpus = write_corpus(folder, arguments.megabytes[0], arguments.text)
    target = Target.at(arguments.tokenizer)
    bare = DocumentEncoder(target.tokenizer, target.vocabulary.size).tokenizer
    batches = list(batched(corpus))
    seconds: dict[str, list[float]] = {"raw": [], "raw_fast": [], "prepare": []}
    cpu: dict[str, list[float]] = {name: [] for name in seconds}
    for _ in range(arguments.rounds):
        for name, encode in (("raw", bare.encode_batch), ("raw_fast", bare.encode_batch_fast)):
            begin, started = time.perf_counter(), time.process_time()
            encode_all(encode, batches)
            seconds[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - started)
        one = prepare_once(corpus, arguments.tokenizer)
        seconds["prepare"].append(one["seconds"])
        cpu["prepare"].append(one["cpu_seconds"])
    rates = {name: one["tokens"] / statistics.median(taken) for name, taken in seconds.items()}
    found = {
        "megabytes": corpus.stat().st_size / 1e6,
        "tokens": one["tokens"],
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens_per_second": rates,
        "quotient_to_encode_batch": ratio(seconds["raw"], seconds["prepare"]),
        "quotient": ratio(seconds["raw_fast"], seconds["prepare"]),
        "cpu_quotient_to_encode_batch": ratio(cpu["raw"], cpu["prepare"]),
        "cpu_quotient": ratio(cpu["raw_fast"], cpu["prepare"]),
    }
    print(
        f"{'':10}{'tokens/s':>12}  seconds of each round ({found['megabytes']:.0f} MB, {found['tokens']:,} tokens)"
    )
    for name, rate in rates.items():
        print(f"{name:10}{rate:12,.0f}  {' '.join(f'{taken:.2f}' for taken in seconds[name])}")
    for name in [name for name in found if "quotient" in name]:
        value = found[name]
        print(f"{name}: {value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})", flush=True)
    return found


def encode_all(encode: Callable[..., Any], batches: list[list[str]]) -> None:
    set_tokenizer_threads(0)
    for batch in batches:
        encode(batch, add_special_tokens=False)


def batched(corpus: Path) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for block in blocks(RowsSource(name="text", kind="jsonl", path=str(corpus)), 0, (0, 0)):
        for piece in block.pieces:
            batch.append(piece)
            chars += len(piece)
            if chars >= BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    yield batch


def measure_memory(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    runs = []
    for megabytes in arguments.megabytes:
        corpus = write_corpus(folder, megabytes, arguments.text)
        command = [sys.executable, __file__, "--child", str(corpus), "--tokenizer", arguments.tokenizer]
        quiet = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=quiet)
        run = {"megabytes": megabytes, **json.loads(done.stdout.splitlines()[-1])}
        corpus.unlink()
        runs.append(run)
        print(f"{megabytes:.0f} MB: {run['tokens']:,} tokens, peak {run['peak_mib']:.0f} MiB")
    growth = runs[1]["peak_mib"] / runs[0]["peak_mib"] - 1
    print(f"growth of the peak: {growth:+.1%}", flush=True)
    return {"runs": runs, "growth": growth}


if __name__ == "__main__":
    main()
