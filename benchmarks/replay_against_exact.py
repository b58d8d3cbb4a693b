"""Does replay agree with real speculative decoding, and how much faster is it?

Decodes every prompt for real, replays the very text that came out, and compares the counts: equal when greedy; when
sampled, block efficiency within two standard errors (of the difference in rounds over prompts). Then times replay of all K
against one exact run for each K, with and without the batched writing of the text. Also compares the greedy text with the
target's own. Prints a table, and JSON with --json.

    python benchmarks/replay_against_exact.py --target DIR --draft DIR --task FILE.jsonl [--chat] [--json results.json]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdraft.console import format_table
from fastdraft.data.chat import prompt_ids
from fastdraft.data.responses import SyntheticRow
from fastdraft.decoding.evaluation import as_row, exact_runs, greedy_difference
from fastdraft.decoding.replay import replay
from fastdraft.decoding.speculative import SpeculativeDecoder, SpeculativeResult
from fastdraft.functional.acceptance import add_counts
from fastdraft.interfaces import Sampling, TargetConfig
from fastdraft.modeling.loading import load_draft, load_target, load_tokenizer, load_vocabulary, pick_device, set_threads
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.tasks import FileTask, load_task


class Pair:
    """Everything loaded once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        set_threads(arguments.threads)
        config, device = TargetConfig(model=arguments.target, dtype="fp32"), pick_device(arguments.device)
        self.arguments, self.target, self.vocabulary = arguments, load_target(config, device), load_vocabulary(config)
        self.draft, self.engine = load_draft(Path(arguments.draft), device), HuggingFaceEngine(self.target, self.vocabulary)
        tokenizer = load_tokenizer(config.location)
        task = load_task(FileTask(kind="file", path=arguments.task, chat=arguments.chat, prompts=10**6))
        room = int(self.target.config.max_position_embeddings) - arguments.max_new_tokens
        encoded = (prompt_ids(tokenizer, prompt.text, task.chat) for prompt in task.prompts)
        self.prompts = [ids for ids in encoded if len(ids) <= room][: arguments.prompts]

    def exact(self, k: int, sampling: Sampling) -> tuple[list[SpeculativeResult], float]:
        """Real runs of all prompts, and their seconds."""
        decoder = SpeculativeDecoder(self.target, self.draft, self.vocabulary, k)
        start = time.perf_counter()
        results = exact_runs(decoder, self.prompts, sampling, self.arguments.max_new_tokens, self.arguments.seed)
        return results, time.perf_counter() - start

    def write(self, sampling: Sampling) -> tuple[list[SyntheticRow], float]:
        """The target's own text, batched, and the seconds it takes."""
        start = time.perf_counter()
        written = self.engine.generate(self.prompts, sampling, self.arguments.max_new_tokens, self.arguments.seed)
        return [as_row(generation, sampling, "task") for generation in written], time.perf_counter() - start


def agreement(pair: Pair, results: list[SpeculativeResult], sampling: Sampling, k: int) -> dict[str, Any]:
    """Exact against the replay of its own text."""
    exact = [result.counts for result in results]
    rows = [as_row(result.generation, sampling, "task") for result in results]
    replayed = [counts[k] for counts in replay(pair.draft, rows, [k], pair.vocabulary)]
    gaps = np.array([e.num_drafts - r.num_drafts for e, r in zip(exact, replayed, strict=True)])
    error = float(gaps.std(ddof=1) * len(gaps) ** 0.5)
    run, expected = add_counts(exact), add_counts(replayed)
    return {
        "block_efficiency_exact": run.block_efficiency,
        "block_efficiency_replay": expected.block_efficiency,
        "difference_percent": 100 * (run.block_efficiency / expected.block_efficiency - 1),
        "standard_errors": abs(float(gaps.sum())) / error if error else 0.0,
        "prompts_with_equal_counts": sum(e.num_drafts == r.num_drafts and e.num_accepted_tokens_per_pos == r.num_accepted_tokens_per_pos
                                         for e, r in zip(exact, replayed, strict=True)),
    }  # fmt: skip


def measure(pair: Pair, temperature: float) -> dict[str, Any]:
    """Agreement at the chosen K, and the times for every K, at one temperature."""
    arguments, sampling = pair.arguments, Sampling(temperature)
    seconds: dict[int, float] = {}
    found: dict[str, Any] = {"temperature": temperature, "prompts": len(pair.prompts)}
    for k in sorted({arguments.k, *arguments.speed_k}):
        results, seconds[k] = pair.exact(k, sampling)
        if k == arguments.k:
            found |= agreement(pair, results, sampling, k)
            at_k = results
    rows, writing = pair.write(sampling)
    start = time.perf_counter()
    replay(pair.draft, rows, arguments.speed_k, pair.vocabulary)
    replaying, exact_seconds = time.perf_counter() - start, sum(seconds[k] for k in arguments.speed_k)
    found |= {"exact_seconds": exact_seconds, "writing_seconds": writing, "replay_seconds": replaying}
    found |= {"times_faster": exact_seconds / replaying, "times_faster_with_writing": exact_seconds / (writing + replaying)}
    if temperature == 0:
        differences = [greedy_difference(pair.target, row, result.generation.response_ids) for row, result in zip(rows, at_k, strict=True)]
        found["greedy_texts_equal_to_the_targets_own"] = sum(d is None for d in differences)
        found["largest_gap_of_the_others"] = max((d.gap for d in differences if d), default=None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--task", required=True, help="JSONL with `prompt` in each line")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--k", type=int, default=3, help="K at which agreement is measured")
    parser.add_argument("--speed-k", type=int, nargs="+", default=list(range(1, 9)), help="every K that is timed")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    pair = Pair(parser.parse_args())
    found = [measure(pair, temperature) for temperature in pair.arguments.temperatures]
    names = list(dict.fromkeys(name for one in found for name in one))
    cells = [[name.replace("_", " "), *(_cell(one.get(name)) for one in found)] for name in names]
    print(format_table("", ["", *(f"T {one['temperature']:g}" for one in found)], cells))
    if pair.arguments.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(pair.arguments).items()}
        report = {"settings": settings, "torch": torch.__version__, "results": found}
        pair.arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _cell(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    main()
