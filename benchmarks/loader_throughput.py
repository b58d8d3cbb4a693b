"""Measures how many tokens per second one process draws from shards: the sampler alone, and up to the tensors of a training step.

    python benchmarks/loader_throughput.py
    python benchmarks/loader_throughput.py --row-lengths 512 2048 --batch-tokens 65536 --output loader.json

Writes two corpora of random ids (uint16, several shards each) as prepare does, opens them as pretrain does, and draws a mixture of two
parts to one. `rows`: int64 rows in their seeded order; `batches`: micro-batches of tensors, what the training loop gets. `first` is the
first step, which opens the files. The last line mixes rows of 512 with a fifth of the tokens in rows of 4096.

Decides that the files are in the page cache, as for a corpus smaller than the memory, and that nothing is read ahead.
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

from fastdraft.data.build import Layout
from fastdraft.data.loader import open_mixture
from fastdraft.data.shards import SPLITS
from fastdraft.run_folder import StageFolder
from fastdraft.training.batches import PackedBatches


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads or 1)
    report = Report(arguments.output, "loader_throughput", "cpu", arguments)
    print(f"{'rows of':>12}{'rows, tokens/s':>18}{'batches, tokens/s':>20}{'first step, ms':>16}", flush=True)
    for lengths in [*([length] for length in arguments.row_lengths), [512, 4096]]:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(write_corpora(Path(folder), lengths, arguments.tokens), lengths, arguments)
        report.add(result)
        name = "+".join(map(str, lengths))
        print(
            f"{name:>12}{result['rows']:18,.0f}{result['batches']:20,.0f}{result['first_step_seconds'] * 1e3:16.1f}",
            flush=True,
        )
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


def write_corpora(folder: Path, lengths: list[int], tokens: int) -> StageFolder:
    layout = Layout(lengths[0], dict.fromkeys(lengths[1:], 0.2), 16_000_000, 0.0, 0, "uint16")
    draw, corpora = np.random.default_rng(0), {}
    for name in ("text", "code"):
        corpora[name] = {split: {"shards": []} for split in SPLITS}
        for length in lengths:
            writer = layout.writer(folder / name, "train", length)
            writer.restore([], 0)
            left = int(tokens * (1.0 if len(lengths) == 1 else 0.8 if length == lengths[0] else 0.2)) // (
                length + 1
            )
            while left > 0:
                count = min(left, 4_000_000 // (length + 1))
                writer.write(draw.integers(0, 32_000, (count, length + 1), dtype=np.uint16))
                left -= count
            writer.close_shard()
            about = {} if length == lengths[0] else {"row_length": length}
            corpora[name]["train"]["shards"] += [{**shard, **about} for shard in writer.shards]
    artifact = StageFolder(folder)
    artifact.begin({"benchmark": True})
    artifact.complete(
        row_length=lengths[0], row_lengths=lengths, dtype="uint16", separator_id=0, corpora=corpora
    )
    return artifact


def measure(prepared: StageFolder, lengths: list[int], arguments: argparse.Namespace) -> dict[str, Any]:
    longest = max(lengths)
    rows, micro = max(1, arguments.batch_tokens // longest), max(1, arguments.micro_batch_tokens // longest)
    sampler = open_mixture(prepared, {"text": 2.0, "code": 1.0}, seed=0)
    source = PackedBatches(sampler, 1_000_000, longest, rows, micro)
    begin = time.perf_counter()
    source.batches(0)
    first = time.perf_counter() - begin
    found = {
        "row_lengths": lengths,
        "batch_tokens": rows * longest,
        "corpora": 2,
        "first_step_seconds": first,
    }
    found["rows"] = rate(lambda step: sampler.groups(step * rows, rows), rows * longest, arguments.seconds)
    found["batches"] = rate(source.batches, rows * longest, arguments.seconds)
    return found


def rate(draw: Callable[[int], Any], tokens: int, seconds: float) -> float:
    """Tokens per second over consecutive steps."""
    steps, begin = 0, time.perf_counter()
    while (now := time.perf_counter()) - begin < seconds:
        draw(steps)
        steps += 1
    return steps * tokens / (now - begin)


if __name__ == "__main__":
    main()
