"""Does replay agree with real speculative decoding, and how much faster is it?

    python benchmarks/replay_against_exact.py --draft runs/starter/export/huggingface --prompts 100
    python benchmarks/replay_against_exact.py --device cuda --target MODEL --draft DRAFT --dtype bf16

Decodes every prompt for real, replays the very text that came out, and compares the counts: equal when
greedy; when sampled, block efficiency within two standard errors (of the difference in rounds over prompts).
Then times replay of all K, in several turns, against one exact run for each K, with and without the batched
writing of the text. Greedy text is also compared with the target's own.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

import numpy as np
import torch
from machine import Report, spread, synchronize, table, take_turns, tell
from pair import Pair, pair_options

from fastdraft.decoding.cache import ReadableModel
from fastdraft.decoding.replay import replay
from fastdraft.decoding.speculative import SpeculativeDecoder, SpeculativeResult
from fastdraft.functional.acceptance import add_counts
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.runtimes.huggingface import HuggingFaceEngine

NAME = "replay_against_exact"


def row_of(text: Generation, sampling: Sampling) -> Any:
    """What replay needs to know of a text."""
    row = {"prompt_ids": text.prompt_ids, "response_ids": text.response_ids, "logprobs": text.logprobs}
    return SimpleNamespace(**row, temperature=sampling.temperature, top_k=0, top_p=1.0)


def exact(pair: Pair, k: int, sampling: Sampling) -> tuple[list[SpeculativeResult], float]:
    """Real runs of all prompts, and their seconds."""
    both, room = (ReadableModel(pair.target), ReadableModel(pair.draft)), pair.given.max_new_tokens
    decoder = SpeculativeDecoder(*both, pair.vocabulary, k)
    start = time.perf_counter()
    results = [decoder.generate(p, sampling, room, seed) for seed, p in enumerate(pair.prompts)]
    return results, time.perf_counter() - start


def agreement(pair: Pair, results: list[SpeculativeResult], sampling: Sampling) -> dict[str, Any]:
    """Exact against the replay of its own text."""
    rows, k = [row_of(result.generation, sampling) for result in results], pair.given.k
    run = [result.counts for result in results]
    replayed = [counts[k] for counts in replay(pair.draft, rows, [k], pair.vocabulary)]
    both = list(zip(run, replayed, strict=True))
    gaps = np.array([a.num_drafts - b.num_drafts for a, b in both])
    error = float(gaps.std(ddof=1) * len(gaps) ** 0.5) if len(gaps) > 1 else 0.0
    real, expected = add_counts(run), add_counts(replayed)
    found = {"num_drafts_exact": real.num_drafts, "num_drafts_replay": expected.num_drafts}
    found |= {"num_generated_tokens": real.num_generated_tokens}
    found |= {"block_efficiency_exact": real.block_efficiency}
    found |= {"block_efficiency_replay": expected.block_efficiency}
    found["difference_percent"] = 100 * (real.block_efficiency / expected.block_efficiency - 1)
    found["standard_errors"] = abs(float(gaps.sum())) / error if error else 0.0
    counts = [[(c.num_drafts, c.num_accepted_tokens_per_pos) for c in pair] for pair in both]
    return found | {"prompts_with_equal_counts": sum(a == b for a, b in counts)}


def measure(pair: Pair, temperature: float) -> dict[str, Any]:
    """Agreement at the chosen K, and the times for every K, at one temperature."""
    given, sampling = pair.given, Sampling(temperature)
    found = {"temperature": temperature, "num_speculative_tokens": given.k, "prompts": len(pair.prompts)}
    real = {k: exact(pair, k, sampling) for k in sorted({given.k, *given.speed_k})}
    found |= agreement(pair, real[given.k][0], sampling)
    start = time.perf_counter()
    engine = HuggingFaceEngine(pair.target, pair.vocabulary)
    own = engine.generate(pair.prompts, sampling, given.max_new_tokens, 0)
    synchronize(given.device)
    writing, rows = time.perf_counter() - start, [row_of(text, sampling) for text in own]
    again = {"replay": lambda: replay(pair.draft, rows, given.speed_k, pair.vocabulary)}
    replaying = spread(take_turns(again, given.turns, given.device)["replay"])
    seconds = sum(real[k][1] for k in given.speed_k)
    found |= {"exact_seconds": seconds, "writing_seconds": writing, "replay_seconds": replaying}
    found["times_faster"] = seconds / replaying["median"]
    found["times_faster_with_writing"] = seconds / (writing + replaying["median"])
    if temperature == 0:
        texts = [result.generation.response_ids for result in real[given.k][0]]
        gaps = pair.gaps(texts, [text.response_ids for text in own])
        found["greedy_texts_equal_to_the_targets_own"] = len(texts) - len(gaps)
        found["log_prob_gaps_of_the_others"] = gaps
    return found


def cell(value: Any) -> str:
    if isinstance(value, dict):
        return tell(value, ".4g")
    if isinstance(value, list):
        return ", ".join(map(cell, value)) or "none"
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def main() -> None:
    parser = pair_options(__doc__, NAME)
    parser.add_argument("--speed-k", type=int, nargs="+", default=list(range(1, 9)), help="every K timed")
    given = parser.parse_args()
    if given.dry_run:
        given.device, given.prompts, given.max_new_tokens, given.turns = "cpu", 3, 6, 2
        given.k, given.speed_k = 2, [1, 2]
    if given.threads:
        torch.set_num_threads(given.threads)
    report = Report(given.output, NAME, given.device, given)
    pair = Pair(given, spare=max(given.k, *given.speed_k) + 1)
    for temperature in given.temperatures:
        report.add(measure(pair, temperature))
    report.finish(parameters=pair.parameters)
    names = list(dict.fromkeys(name for one in report.results for name in one))
    rows = [[name.replace("_", " "), *(cell(one.get(name)) for one in report.results)] for name in names]
    print(table(["", *(f"T {one['temperature']:g}" for one in report.results)], rows))


if __name__ == "__main__":
    main()
