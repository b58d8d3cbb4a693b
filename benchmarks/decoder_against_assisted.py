"""Our exact decoder beside transformers' assisted generation and the target alone: same pair, prompts, K.

    python benchmarks/decoder_against_assisted.py --device cuda --target MODEL --draft DRAFT --dtype bf16
    python benchmarks/decoder_against_assisted.py --draft runs/starter/export/huggingface

Assisted generation is asked for what ours does: K proposals in every round (schedule `constant`, confidence
threshold 0), no id masked, the same ends of text; its rounds are counted as passes of the target. All three
take turns over all prompts, batch 1. Greedy texts are compared with the target's own (in bf16 two near-equal
tokens may change places).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

import torch
from machine import Report, ratio, spread, table, take_turns, tell
from pair import Pair, pair_options

from fastdraft.decoding.cache import ReadableModel
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.functional.generation import Sampling

NAME = "decoder_against_assisted"
ALONE, ASSISTED, OURS = "target alone", "assisted generation", "our decoder"
Written = tuple[list[list[int]], int]
"""Texts, and passes of the target."""


class Writers:
    """The pair, and the three ways to write with it."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.pair = given, Pair(given, spare=given.k + 1)
        self.target, self.draft, self.prompts = self.pair.target, self.pair.draft, self.pair.prompts
        self.decoder = SpeculativeDecoder(
            ReadableModel(self.target), ReadableModel(self.draft), self.pair.vocabulary, given.k
        )
        for model in (self.target, self.draft):  # nothing of the models' own taste
            model.generation_config.update(temperature=None, top_k=None, top_p=None, repetition_penalty=None)
        config = self.draft.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = given.k, "constant"
        config.assistant_confidence_threshold = 0.0
        self.passes = 0

        def count(*_: Any) -> None:
            self.passes += 1

        self.target.register_forward_pre_hook(count)

    def ours(self, sampling: Sampling) -> Written:
        room, prompts = self.given.max_new_tokens, enumerate(self.prompts)
        results = [self.decoder.generate(prompt, sampling, room, seed) for seed, prompt in prompts]
        texts = [result.generation.response_ids for result in results]
        return texts, sum(len(result.rounds) for result in results)

    def transformers(self, sampling: Sampling, **how: Any) -> Written:
        torch.manual_seed(0)
        how |= {"do_sample": bool(sampling.temperature), "max_new_tokens": self.given.max_new_tokens}
        how |= {"pad_token_id": 0, "eos_token_id": self.pair.eos_ids or None}
        if sampling.temperature:
            how |= {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        before, texts = self.passes, []
        for prompt in self.prompts:
            ids = torch.tensor([prompt], device=self.target.device)
            output = self.target.generate(ids, attention_mask=torch.ones_like(ids), **how)
            texts.append(output[0, len(prompt) :].tolist())
        return texts, self.passes - before

    def contenders(self, sampling: Sampling) -> dict[str, Callable[[], Written]]:
        return {
            ALONE: lambda: self.transformers(sampling),
            ASSISTED: lambda: self.transformers(sampling, assistant_model=self.draft),
            OURS: lambda: self.ours(sampling),
        }


def measure(writers: Writers, temperature: float, turns: int) -> list[dict[str, Any]]:
    """One entry for each contender at one temperature."""
    contenders, k = writers.contenders(Sampling(temperature)), writers.given.k
    first = {name: write() for name, write in contenders.items()}  # warms up; every turn writes the same
    seconds = take_turns(contenders, turns, writers.given.device)
    # Sampled texts differ in length: what is compared are seconds a token.
    counts = {name: sum(map(len, texts)) for name, (texts, _) in first.items()}
    per_token = {name: [taken / counts[name] for taken in seconds[name]] for name in first}
    found = []
    for name, (texts, rounds) in first.items():
        one = {"contender": name, "temperature": temperature, "num_speculative_tokens": k}
        one |= {"prompts": len(texts), "tokens": counts[name], "rounds": rounds}
        one["tokens_per_target_pass"] = round(counts[name] / rounds, 4)
        one["seconds"] = spread(seconds[name])
        one["tokens_per_second"] = spread([1 / taken for taken in per_token[name]])
        one["seconds_per_target_pass"] = float(f"{one['seconds']['median'] / rounds:.4g}")
        others = [other for other in first if other != name]
        one["times_faster_than"] = {other: ratio(per_token[other], per_token[name]) for other in others}
        if temperature == 0:
            gaps = writers.pair.gaps(texts, first[ALONE][0])
            one |= {"texts_equal_to_the_targets_own": len(texts) - len(gaps)}
            one |= {"log_prob_gaps_of_the_others": gaps}
        found.append(one)
    return found


def show(found: Sequence[dict[str, Any]]) -> str:
    columns = ["contender", "tokens", "target passes", "tokens/pass", "tokens/s", "ms/pass"]
    rows = []
    for one in found:
        faster = one["times_faster_than"]
        equal = one.get("texts_equal_to_the_targets_own")
        rows.append([f"{one['contender']}, T {one['temperature']:g}", one["tokens"], one["rounds"]])
        rows[-1] += [f"{one['tokens_per_target_pass']:.3f}", tell(one["tokens_per_second"], ".0f")]
        rows[-1] += [f"{1e3 * one['seconds_per_target_pass']:.2f}"]
        rows[-1] += [tell(faster[other]) if other in faster else "-" for other in (ALONE, ASSISTED)]
        rows[-1] += ["-" if equal is None else f"{equal} of {one['prompts']}"]
    return table([*columns, "x alone", "x assisted", "equal texts"], rows)


def main() -> None:
    given = pair_options(__doc__, NAME).parse_args()
    if given.dry_run:
        given.device, given.prompts, given.max_new_tokens, given.turns = "cpu", 2, 6, 2
    if given.threads:
        torch.set_num_threads(given.threads)
    report, writers = Report(given.output, NAME, given.device, given), Writers(given)
    for temperature in given.temperatures:
        report.add(*measure(writers, temperature, given.turns))
    report.finish(parameters=writers.pair.parameters)
    print(show(report.results))


if __name__ == "__main__":
    main()
