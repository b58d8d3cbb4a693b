"""How many tokens per second one process draws from shards: as rows, and as tensors of a training step.

    python benchmarks/loader_throughput.py --row-lengths 512 2048 --batch-tokens 65536 --output loader.json

Writes two corpora of random ids (uint16, several shards each) as prepare does, opens them as pretrain does,
and draws a mixture of two parts to one. `rows`: int64 rows in their seeded order; `batches`: micro-batches of
tensors. `first` is the first step, which opens the files and draws the first permutations. The files are in
the page cache; nothing is read ahead.
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
from machine import Report, options, table

from fastdraft.data.mixture import open_mixture
from fastdraft.data.shards import RowForm, RowWriter
from fastdraft.run_folder import StageFolder
from fastdraft.training.batches import packed_batch


def main() -> None:
    parser = options(__doc__, "loader_throughput", device=False)
    add = parser.add_argument
    add("--row-lengths", nargs="+", type=int, default=[512, 2048])
    add("--batch-tokens", type=int, default=65_536, help="tokens of a step")
    add("--micro-batch-tokens", type=int, default=8192)
    add("--tokens", type=int, default=64_000_000, help="of each corpus")
    add("--seconds", type=float, default=5.0, help="of each measurement")
    given = parser.parse_args()
    if given.dry_run:
        given.tokens, given.seconds = 1_000_000, 0.1
    torch.set_num_threads(given.threads or 1)
    report = Report(given.output, "loader_throughput", "cpu", given)
    for length in given.row_lengths:
        with tempfile.TemporaryDirectory() as folder:
            report.add(measure(write_corpora(Path(folder), length, given.tokens), length, given))
    report.finish()
    columns = ["row_length", "rows", "batches", "first_step_seconds"]
    print(table(columns, [[f"{one[name]:,.6g}" for name in columns] for one in report.results]))


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


def measure(prepared: StageFolder, row_length: int, given: argparse.Namespace) -> dict[str, Any]:
    rows = max(1, given.batch_tokens // row_length)
    micro = max(1, given.micro_batch_tokens // row_length)
    mixture = open_mixture(prepared, {"text": 2.0, "code": 1.0}, rows, seed=0)

    def batches(step: int) -> list[Any]:
        drawn = mixture.rows(step)
        return [packed_batch(drawn[start : start + micro]) for start in range(0, rows, micro)]

    def rate(draw: Callable[[int], Any]) -> float:
        steps, begin = 0, time.perf_counter()
        while (now := time.perf_counter()) - begin < given.seconds:
            draw(steps)
            steps += 1
        return steps * rows * row_length / (now - begin)

    begin = time.perf_counter()
    batches(0)
    found = {"row_length": row_length, "batch_tokens": rows * row_length, "corpora": 2}
    found["first_step_seconds"] = time.perf_counter() - begin
    return {**found, "rows": rate(mixture.rows), "batches": rate(batches)}


if __name__ == "__main__":
    main()
