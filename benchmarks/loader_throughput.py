"""Measures how many tokens per second one process draws from shards: the mixture alone, and up to the tensors of a training step.

    python benchmarks/loader_throughput.py
    python benchmarks/loader_throughput.py --row-lengths 512 2048 --batch-tokens 65536 --output loader.json

Writes two corpora of random ids (uint16, several shards each) as prepare does, opens them as pretrain does, and draws a mixture of two
parts to one. `rows`: int64 rows in their seeded order; `batches`: micro-batches of tensors, what the training loop gets. `first` is the
first step, which opens the files and draws the first permutations. The files are in the page cache; nothing is read ahead.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
from machine import Report, add_arguments

from fastdraft.data.mixture import open_mixture
from fastdraft.data.shards import RowForm, RowWriter
from fastdraft.run_folder import StageFolder
from fastdraft.training.batches import packed_batch


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads or 1)
    report = Report(arguments.output, "loader_throughput", "cpu", arguments)
    print(f"{'rows of':>12}{'rows, tokens/s':>18}{'batches, tokens/s':>20}{'first step, ms':>16}", flush=True)
    for length in arguments.row_lengths:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(write_corpora(Path(folder), length, arguments.tokens), length, arguments)
        report.add(found)
        first = found["first_step_seconds"] * 1e3
        print(f"{length:>12}{found['rows']:18,.0f}{found['batches']:20,.0f}{first:16.1f}", flush=True)
    report.finish()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row-lengths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--batch-tokens", type=int, default=65_536, help="tokens of a step")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=64_000_000, help="of each corpus")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    add_arguments(parser, "loader_throughput", device=False)
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.tokens, arguments.seconds = 1_000_000, 0.1
    return arguments


def write_corpora(folder: Path, row_length: int, tokens: int) -> StageFolder:
    form, draw, corpora = RowForm(row_length, 0, "uint16", 16_000_000), np.random.default_rng(0), {}
    for name in ("text", "code"):
        writer = RowWriter(folder / name, "train", form)
        for start in range(0, tokens, 4_000_000):
            writer.add([draw.integers(0, 32_000, min(4_000_000, tokens - start), dtype=np.uint16)])
        writer.close_shard()
        corpora[name] = {"train": {"shards": writer.shards}, "validation": {"shards": []}}
    stage = StageFolder(folder)
    stage.begin({"benchmark": True})
    stage.complete(row_length=row_length, dtype="uint16", separator_id=0, corpora=corpora)
    return stage


def measure(prepared: StageFolder, row_length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    rows = max(1, arguments.batch_tokens // row_length)
    rows_per_micro = max(1, arguments.micro_batch_tokens // row_length)
    mixture = open_mixture(prepared, {"text": 2.0, "code": 1.0}, rows, seed=0)

    def batches(step: int) -> list[Any]:
        drawn = mixture.rows(step)
        return [
            packed_batch(drawn[start : start + rows_per_micro]) for start in range(0, rows, rows_per_micro)
        ]

    begin = time.perf_counter()
    batches(0)
    first = time.perf_counter() - begin
    tokens = rows * row_length
    return {
        "row_length": row_length,
        "batch_tokens": tokens,
        "corpora": 2,
        "first_step_seconds": first,
        "rows": rate(mixture.rows, tokens, arguments.seconds),
        "batches": rate(batches, tokens, arguments.seconds),
    }


def rate(draw: Callable[[int], Any], tokens: int, seconds: float) -> float:
    """Tokens per second over consecutive steps."""
    steps, begin = 0, time.perf_counter()
    while (now := time.perf_counter()) - begin < seconds:
        draw(steps)
        steps += 1
    return steps * tokens / (now - begin)


if __name__ == "__main__":
    main()
