"""Our exact decoder beside transformers' assisted generation: the same pair, prompts and K; and the target alone.

    python benchmarks/decoder_against_assisted.py --device cuda --target MODEL --draft DRAFT --dtype bf16
    python benchmarks/decoder_against_assisted.py --draft runs/starter/export/huggingface

Without --draft the draft is made on the spot from the target's own first layers (--draft-layers) with its embeddings, norm and head:
untrained, accepted now and then, the same on every machine. Greedy: rounds and texts of both are compared, and with the target's own;
a difference is told with the place where it begins (in bf16 two near-equal tokens may change places). Sampled: tokens per target pass.

Decides that assisted generation is asked for what ours does: K proposals in every round (schedule `constant`, confidence
threshold 0), no id masked, the same ends of text; that its rounds are counted as passes of the target; that all three take turns over all
prompts, batch 1, and ratios are formed within a turn. Needs torch and transformers; figures stand in the file as they come.
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
from machine import Report, add_arguments, ratio, spread, table, take_turns
from pair import Pair, add_pair_arguments, first_difference, gap_at

from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.functional.generation import Sampling

NAME = "decoder_against_assisted"
ALONE, ASSISTED, OURS = "target alone", "assisted generation", "our decoder"


class Writers:
    """The pair, and the three ways to write with it, each giving texts and rounds."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.pair = arguments, Pair(arguments, spare=arguments.k + 1)
        self.target, self.draft, self.prompts = self.pair.target, self.pair.draft, self.pair.prompts
        self.decoder = SpeculativeDecoder(self.target, self.draft, self.pair.vocabulary, arguments.k)
        config = self.draft.generation_config
        (
            config.num_assistant_tokens,
            config.num_assistant_tokens_schedule,
            config.assistant_confidence_threshold,
        ) = (arguments.k, "constant", 0.0)
        for model in (self.target, self.draft):  # nothing of the models' own taste
            model.generation_config.update(temperature=None, top_k=None, top_p=None, repetition_penalty=None)
        self.passes = 0
        self.target.register_forward_pre_hook(lambda *_: self._count())

    def _count(self) -> None:
        self.passes += 1

    def ours(self, sampling: Sampling) -> tuple[list[list[int]], int]:
        tokens = self.arguments.max_new_tokens
        results = [
            self.decoder.generate(prompt, sampling, tokens, seed) for seed, prompt in enumerate(self.prompts)
        ]
        return [result.generation.response_ids for result in results], sum(
            len(result.rounds) for result in results
        )

    def transformers(self, sampling: Sampling, **options: Any) -> tuple[list[list[int]], int]:
        torch.manual_seed(0)
        sampled = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        how = sampled if sampling.temperature else {"do_sample": False}
        before, texts = self.passes, []
        for prompt in self.prompts:
            ids = torch.tensor([prompt], device=self.target.device)
            output = self.target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.arguments.max_new_tokens,
                pad_token_id=0,
                eos_token_id=self.pair.eos_ids or None,
                **how,
                **options,
            )
            texts.append(output[0, len(prompt) :].tolist())
        return texts, self.passes - before

    def contenders(self, sampling: Sampling) -> dict[str, Callable[[], tuple[list[list[int]], int]]]:
        return {
            ALONE: lambda: self.transformers(sampling),
            ASSISTED: lambda: self.transformers(sampling, assistant_model=self.draft),
            OURS: lambda: self.ours(sampling),
        }


def measure(writers: Writers, temperature: float, turns: int) -> list[dict[str, Any]]:
    """One entry for each contender at one temperature."""
    contenders, sampling = writers.contenders(Sampling(temperature)), Sampling(temperature)
    first = {
        name: write() for name, write in contenders.items()
    }  # warms up; text and rounds are the same in every turn
    seconds = take_turns(contenders, turns, writers.arguments.device)
    found = []
    for name, (texts, rounds) in first.items():
        tokens = sum(map(len, texts))
        one: dict[str, Any] = {
            "contender": name,
            "temperature": sampling.temperature,
            "num_speculative_tokens": writers.arguments.k,
            "prompts": len(texts),
            "tokens": tokens,
            "rounds": rounds,
            "tokens_per_target_pass": round(tokens / rounds, 4),
            "seconds": spread(seconds[name]),
            "tokens_per_second": spread([tokens / taken for taken in seconds[name]]),
            "seconds_per_target_pass": float(f"{spread(seconds[name])['median'] / rounds:.4g}"),
        }
        # Sampled texts differ in length: what is compared is tokens a second, within the turn.
        per_token = {
            other: [taken / sum(map(len, first[other][0])) for taken in seconds[other]]
            for other in contenders
        }
        one["times_faster_than"] = {
            other: ratio(per_token[other], per_token[name]) for other in contenders if other != name
        }
        if temperature == 0:
            one |= compared(writers, texts, first[ALONE][0])
        found.append(one)
    return found


def compared(writers: Writers, texts: list[list[int]], own: list[list[int]]) -> dict[str, Any]:
    """How many greedy texts are the target's own, and how near a tie the others parted from it."""
    gaps = [
        gap_at(writers.target, prompt, other, text, place)
        for prompt, text, other in zip(writers.prompts, texts, own, strict=True)
        if (place := first_difference(text, other)) is not None
    ]
    return {"texts_equal_to_the_targets_own": len(texts) - len(gaps), "log_prob_gaps_of_the_others": gaps}


def show(found: Sequence[dict[str, Any]]) -> str:
    columns = [
        "contender",
        "tokens",
        "target passes",
        "tokens/pass",
        "tokens/s",
        "range",
        "ms/pass",
        "x alone",
        "x assisted",
        "equal texts",
    ]
    rows = []
    for one in found:
        speed, faster = one["tokens_per_second"], one["times_faster_than"]
        times = [f"{faster[other]['median']:.2f}" if other in faster else "-" for other in (ALONE, ASSISTED)]
        equal = one.get("texts_equal_to_the_targets_own")
        rows.append(
            [
                f"{one['contender']}, T {one['temperature']:g}",
                one["tokens"],
                one["rounds"],
                f"{one['tokens_per_target_pass']:.3f}",
                f"{speed['median']:.0f}",
                f"{speed['low']:.0f} to {speed['high']:.0f}",
                f"{1e3 * one['seconds_per_target_pass']:.2f}",
                *times,
                "-" if equal is None else f"{equal} of {one['prompts']}",
            ]
        )
    return table(columns, rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, NAME)
    add_pair_arguments(parser)
    parser.add_argument("--k", type=int, default=3, help="num_speculative_tokens")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6])
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args(arguments)
    if given.dry_run:
        given.device, given.prompts, given.max_new_tokens, given.turns = "cpu", 2, 6, 2
    return given


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report = Report(arguments.output, NAME, arguments.device, arguments)
    writers = Writers(arguments)
    for temperature in arguments.temperatures:
        report.add(*measure(writers, temperature, arguments.turns))
    sizes = writers.pair.parameters
    report.finish(parameters=sizes)
    print(
        f"target {sizes['target'] / 1e6:.1f} M parameters, draft {sizes['draft'] / 1e6:.1f} M, K = {arguments.k}"
    )
    print(show(report.results))


if __name__ == "__main__":
    main()
