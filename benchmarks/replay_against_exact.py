"""Does replay agree with real speculative decoding, and how much faster is it?

    python benchmarks/replay_against_exact.py --draft runs/starter/export/huggingface --prompts 100
    python benchmarks/replay_against_exact.py --device cuda --target MODEL --draft DRAFT --dtype bf16

Decodes every prompt for real, replays the very text that came out, and compares the counts: equal when greedy; when
sampled, block efficiency within two standard errors (of the difference in rounds over prompts). Then times replay of all K
against one exact run for each K, with and without the batched writing of the text. Also compares the greedy text with the
target's own. Without --draft the draft is the target's own first layers (pair.py).

Decides that an exact run of one K is timed once (it is minutes where replay is a second), replay in several turns; and that
text written in one batch of many prompts is what replay is given. Needs torch and transformers; figures stand in the file as
they come.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

import numpy as np
import torch
from machine import Report, add_arguments, spread, synchronize, table, take_turns
from pair import Pair, add_pair_arguments, first_difference, gap_at

from fastdraft.decoding.replay import replay
from fastdraft.decoding.speculative import SpeculativeDecoder, SpeculativeResult
from fastdraft.functional.acceptance import add_counts
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.runtimes.huggingface import HuggingFaceEngine

NAME = "replay_against_exact"


@dataclass(frozen=True)
class Row:
    """What replay needs to know of a text."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    temperature: float
    top_k: int = 0
    top_p: float = 1.0


def row_of(generation: Generation, sampling: Sampling) -> Row:
    return Row(generation.prompt_ids, generation.response_ids, generation.logprobs, sampling.temperature)


def exact(pair: Pair, k: int, sampling: Sampling) -> tuple[list[SpeculativeResult], float]:
    """Real runs of all prompts, and their seconds."""
    decoder, arguments = SpeculativeDecoder(pair.target, pair.draft, pair.vocabulary, k), pair.arguments
    start = time.perf_counter()
    results = [
        decoder.generate(prompt, sampling, arguments.max_new_tokens, arguments.seed + place)
        for place, prompt in enumerate(pair.prompts)
    ]
    return results, time.perf_counter() - start


def write(pair: Pair, sampling: Sampling) -> tuple[list[Row], float]:
    """The target's own text, batched, and the seconds it takes."""
    engine = HuggingFaceEngine(pair.target, pair.vocabulary)
    start = time.perf_counter()
    written = engine.generate(pair.prompts, sampling, pair.arguments.max_new_tokens, pair.arguments.seed)
    synchronize(pair.arguments.device)
    return [row_of(generation, sampling) for generation in written], time.perf_counter() - start


def agreement(pair: Pair, results: list[SpeculativeResult], sampling: Sampling, k: int) -> dict[str, Any]:
    """Exact against the replay of its own text."""
    run = [result.counts for result in results]
    replayed = [
        counts[k]
        for counts in replay(
            pair.draft, [row_of(r.generation, sampling) for r in results], [k], pair.vocabulary
        )
    ]
    gaps = np.array([e.num_drafts - r.num_drafts for e, r in zip(run, replayed, strict=True)])
    error = float(gaps.std(ddof=1) * len(gaps) ** 0.5) if len(gaps) > 1 else 0.0
    all_run, expected = add_counts(run), add_counts(replayed)
    equal = [
        e.num_drafts == r.num_drafts and e.num_accepted_tokens_per_pos == r.num_accepted_tokens_per_pos
        for e, r in zip(run, replayed, strict=True)
    ]
    return {
        "num_drafts_exact": all_run.num_drafts,
        "num_drafts_replay": expected.num_drafts,
        "num_generated_tokens": all_run.num_generated_tokens,
        "block_efficiency_exact": all_run.block_efficiency,
        "block_efficiency_replay": expected.block_efficiency,
        "difference_percent": 100 * (all_run.block_efficiency / expected.block_efficiency - 1),
        "standard_errors": abs(float(gaps.sum())) / error if error else 0.0,
        "prompts_with_equal_counts": sum(equal),
    }


def measure(pair: Pair, temperature: float) -> dict[str, Any]:
    """Agreement at the chosen K, and the times for every K, at one temperature."""
    arguments, sampling = pair.arguments, Sampling(temperature)
    seconds: dict[int, float] = {}
    found: dict[str, Any] = {
        "temperature": temperature,
        "num_speculative_tokens": arguments.k,
        "prompts": len(pair.prompts),
    }
    for k in sorted({arguments.k, *arguments.speed_k}):
        results, seconds[k] = exact(pair, k, sampling)
        if k == arguments.k:
            found |= agreement(pair, results, sampling, k)
            at_k = results
    rows, writing = write(pair, sampling)
    taken = take_turns(
        {"replay": lambda: replay(pair.draft, rows, arguments.speed_k, pair.vocabulary)},
        arguments.turns,
        arguments.device,
    )
    replaying, exact_seconds = spread(taken["replay"]), sum(seconds[k] for k in arguments.speed_k)
    found |= {"exact_seconds": exact_seconds, "writing_seconds": writing, "replay_seconds": replaying}
    found |= {
        "times_faster": exact_seconds / replaying["median"],
        "times_faster_with_writing": exact_seconds / (writing + replaying["median"]),
    }
    if temperature == 0:
        places = [
            first_difference(r.generation.response_ids, row.response_ids)
            for r, row in zip(at_k, rows, strict=True)
        ]
        gaps = [
            gap_at(pair.target, row.prompt_ids, row.response_ids, result.generation.response_ids, place)
            for row, result, place in zip(rows, at_k, places, strict=True)
            if place is not None
        ]
        found |= {
            "greedy_texts_equal_to_the_targets_own": places.count(None),
            "log_prob_gaps_of_the_others": gaps,
        }
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, NAME)
    add_pair_arguments(parser)
    parser.add_argument("--k", type=int, default=3, help="K at which agreement is measured")
    parser.add_argument(
        "--speed-k", type=int, nargs="+", default=list(range(1, 9)), help="every K that is timed"
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6])
    parser.add_argument("--turns", type=int, default=5, help="of replay")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.dry_run:
        given.device, given.prompts, given.max_new_tokens, given.k, given.speed_k, given.turns = (
            "cpu",
            3,
            6,
            2,
            [1, 2],
            2,
        )
    return given


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report = Report(arguments.output, NAME, arguments.device, arguments)
    pair = Pair(arguments, spare=max(arguments.k, *arguments.speed_k) + 1)
    for temperature in arguments.temperatures:
        report.add(measure(pair, temperature))
    report.finish(parameters=pair.parameters)
    names = list(dict.fromkeys(name for one in report.results for name in one))
    rows = [[name.replace("_", " "), *(_cell(one.get(name)) for one in report.results)] for name in names]
    print(table(["", *(f"T {one['temperature']:g}" for one in report.results)], rows))


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
    if isinstance(value, list):
        return ", ".join(_cell(one) for one in value) or "none"
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    main()
