"""Measures the prepare stage: tokens per second beside the bare tokenizer, and peak memory at two sizes of corpus.

    python benchmarks/prepare_throughput.py
    python benchmarks/prepare_throughput.py --tokenizer DIR --text corpus.jsonl --parts rate --output prepare.json

Text: Python's own library (or `--text`: .txt, or .jsonl with "text", also .gz and .xz), repeated to the asked size with a numbered line
in every 2,000 characters, so that no piece is a duplicate of another. Tokenizer: the shipped starter's, or any directory with a
tokenizer and a config.json.

Decides what is compared with what. `raw` is one call of tokenizers' encode_batch for each of the batches that prepare makes, with all
texts in memory, the same thread pool and nothing done with the ids; `raw_fast` is encode_batch_fast, which leaves out the offsets and which
prepare uses too. They alternate with whole prepare stages in one process; the table has medians. The quotients divide prepare's tokens/s
by theirs within a round (median and range), once with and once without the stage's start: loading and describing the tokenizer, which a
process does once and which each round here does anew, the stage's fingerprint included. Memory is the peak resident set of a child
process that only prepares. `cpu` is processor time of all threads, which a busy machine stretches less than it does seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from machine import Report, add_arguments, ratio

from fastdraft.console import Console
from fastdraft.data.build import BATCH_CHARS
from fastdraft.data.ordering import PieceStream
from fastdraft.data.readers import jsonl_texts, read_text
from fastdraft.data.sources import JsonlSource, SourceCodeSource
from fastdraft.data.tokenize import DocumentEncoder, parallel_tokenization
from fastdraft.recipe.base import load_config
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
    tokenizer = Path(arguments.tokenizer).name
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        if "rate" in arguments.parts:
            rate = measure_rate(write_corpus(Path(folder), arguments.megabytes[0], arguments.text), arguments)
            print_rate(rate)
            report.add({"part": "rate", "tokenizer": tokenizer, **rate})
        if "memory" in arguments.parts:
            memory = measure_memory(Path(folder), arguments)
            print_memory(memory)
            report.add({"part": "memory", "tokenizer": tokenizer, **memory})
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
    parser.add_argument("--text", type=Path, help="a file of text; left out: Python's own library")
    parser.add_argument(
        "--megabytes",
        nargs=2,
        type=float,
        default=[50, 500],
        help="sizes of text: rate at the first, memory at both",
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


def documents(path: Path | None) -> Iterator[str]:
    if path is None:
        yield from SourceCodeSource(name="library", path="python:stdlib").documents(0)
    elif ".jsonl" in path.name:
        yield from (text for _, text in jsonl_texts(path, "text"))
    else:
        yield read_text(path)


def write_corpus(folder: Path, megabytes: float, text: Path | None) -> Path:
    """JSONL of that many megabytes (10**6 bytes of text), in which no two pieces are equal."""
    path, left, copy = folder / f"{megabytes:g}.jsonl", megabytes * 1e6, 0
    with open(path, "w", encoding="utf-8") as file:
        while left > 0:
            copy += 1
            for document in documents(text):
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


def stage(corpus: Path, tokenizer: str, root: Path) -> tuple[prepare.PrepareConfig, StageContext]:
    source = {"name": "text", "kind": "jsonl", "path": str(corpus)}
    config = load_config(prepare.PrepareConfig, {"row_length": 2048, "corpora": [source]}, "prepare")
    return config, StageContext(
        RunFolder(root), RunConfig(name="benchmark"), Target.at(tokenizer), {}, Console(quiet=True)
    )


def prepare_once(corpus: Path, tokenizer: str) -> dict[str, float]:
    """One whole stage, fingerprint included, as a process's first; `start_seconds` go by before the first text is encoded."""
    from transformers import AutoTokenizer  # noqa: F401  the library's own loading is not the stage's

    from fastdraft.modeling import loading

    loading._load_once.cache_clear()
    root = Path(tempfile.mkdtemp(dir=corpus.parent))
    first: list[float] = []
    original = DocumentEncoder.encode

    def encode(self: DocumentEncoder, texts: Any) -> Any:
        first.append(time.perf_counter())
        return original(self, texts)

    DocumentEncoder.encode = encode  # type: ignore[method-assign]
    try:
        config, context = stage(corpus, tokenizer, root)
        begin, started = time.perf_counter(), time.process_time()
        context.folder("prepare").begin(prepare.fingerprint(config, context))
        prepare.run(config, context)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - started
        text = context.folder("prepare").manifest()["corpora"]["text"]
    finally:
        DocumentEncoder.encode = original  # type: ignore[method-assign]
        shutil.rmtree(root)
    tokens = sum(source["tokens"] for source in text["sources"])
    times = {"seconds": seconds, "cpu_seconds": cpu_seconds, "start_seconds": first[0] - begin}
    return {**times, "tokens": tokens, "duplicates": text["duplicates"], "peak_mib": peak_mib()}


def peak_mib() -> float:
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measure_rate(corpus: Path, arguments: argparse.Namespace) -> dict[str, Any]:

    encoder = DocumentEncoder(Target.at(arguments.tokenizer).tokenizer, 1 << 31)
    bare = encoder._tokenizer
    batches = list(batched(PieceStream(JsonlSource(name="text", path=str(corpus)), 0)))
    rounds: dict[str, list[float]] = {"raw": [], "raw_fast": [], "prepare": [], "prepare_after_start": []}
    cpu: dict[str, list[float]] = {"raw": [], "raw_fast": [], "prepare": []}
    tokens = 0
    for _ in range(arguments.rounds):
        for name, encode in (
            ("raw", bare.encode_batch),
            ("raw_fast", getattr(bare, "encode_batch_fast", bare.encode_batch)),
        ):
            seconds, started = 0.0, time.process_time()
            with parallel_tokenization(0):
                for batch in batches:
                    begin = time.perf_counter()
                    encoded = encode(batch, add_special_tokens=False)
                    seconds += time.perf_counter() - begin
                    del encoded
            rounds[name].append(seconds)
            cpu[name].append(time.process_time() - started)
        one = prepare_once(corpus, arguments.tokenizer)
        cpu["prepare"].append(one["cpu_seconds"])
        tokens = int(one["tokens"])
        rounds["prepare"].append(one["seconds"])
        rounds["prepare_after_start"].append(one["seconds"] - one["start_seconds"])
    rates = {name: tokens / statistics.median(seconds) for name, seconds in rounds.items()}
    return {
        "megabytes": corpus.stat().st_size / 1e6,
        "tokens": tokens,
        "seconds": rounds,
        "cpu_seconds": cpu,
        "tokens_per_second": rates,
        "quotient": ratio(rounds["raw_fast"], rounds["prepare"]),
        "quotient_after_start": ratio(rounds["raw_fast"], rounds["prepare_after_start"]),
        "quotient_to_encode_batch": ratio(rounds["raw"], rounds["prepare"]),
        "quotient_to_encode_batch_after_start": ratio(rounds["raw"], rounds["prepare_after_start"]),
        "cpu_quotient": ratio(cpu["raw_fast"], cpu["prepare"]),
        "cpu_quotient_to_encode_batch": ratio(cpu["raw"], cpu["prepare"]),
    }


def batched(pieces: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for piece in pieces:
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
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
        )
        runs.append({"megabytes": megabytes, **json.loads(done.stdout.splitlines()[-1])})
        corpus.unlink()
    return {"runs": runs, "growth": runs[1]["peak_mib"] / runs[0]["peak_mib"] - 1}


def print_rate(rate: dict[str, Any]) -> None:
    print(
        f"{'':22}{'tokens/s':>12}  seconds of each round ({rate['megabytes']:.0f} MB, {rate['tokens']:,} tokens)"
    )
    for name, tokens in rate["tokens_per_second"].items():
        print(f"{name:22}{tokens:12,.0f}  {' '.join(f'{seconds:.2f}' for seconds in rate['seconds'][name])}")
    for name, against in (
        ("quotient_to_encode_batch", "raw"),
        ("quotient_to_encode_batch_after_start", "raw, after its start"),
        ("quotient", "raw_fast"),
        ("quotient_after_start", "raw_fast, after its start"),
        ("cpu_quotient_to_encode_batch", "raw, cpu"),
        ("cpu_quotient", "raw_fast, cpu"),
    ):
        found = rate[name]
        print(
            f"prepare / {against}: {found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})", flush=True
        )


def print_memory(memory: dict[str, Any]) -> None:
    for run in memory["runs"]:
        rate = run["tokens"] / run["seconds"]
        print(
            f"{run['megabytes']:.0f} MB: {run['tokens']:,} tokens, {rate:,.0f} tokens/s, peak {run['peak_mib']:.0f} MiB"
        )
    print(f"growth of the peak: {memory['growth']:+.1%}", flush=True)


if __name__ == "__main__":
    main()
