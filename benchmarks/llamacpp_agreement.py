"""Does llama.cpp with a draft write what it writes without, and do its counts agree with a replay?

    python benchmarks/llamacpp_agreement.py TARGET.gguf DRAFT.gguf --threads 2 --output agreement.json

Text: with and without the draft, at each temperature from the same seeds. A difference of greedy text is told with
the gap in log-prob between the two tokens, at the file's own weights (functional/same_text.py: what a near-tie is).

Counts: llama.cpp's rounds beside a replay of the draft's dequantised file, both over the text that was written with
the draft, from behind its first token. llama.cpp accepts the draft's likeliest token where it is the one drawn, at
any temperature, so the replay's draft is greedy.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from machine import Report, options, table
from openvino_agreement import figures, read_prompts

from fastdraft.decoding.replay import replay
from fastdraft.functional.acceptance import Counts, add_counts
from fastdraft.functional.generation import Sampling
from fastdraft.functional.same_text import compare_texts
from fastdraft.modeling.drafts import set_threads
from fastdraft.runtimes.llama_cpp_runtime import LlamaCppRuntime
from fastdraft.runtimes.runtime import LoadedPair, Proposer
from fastdraft.target import Target

Prompts = list[tuple[str, list[int]]]


def compare(
    pair: LoadedPair,
    draft: Any,
    target: Target,
    prompts: Prompts,
    temperature: float,
    given: argparse.Namespace,
    report: Report,
    runtime: str = "llamacpp",
) -> None:
    """One temperature: equal texts, differences, and the counts of both, in the file after every prompt."""
    asked = Sampling(temperature), given.max_new_tokens
    known = replace(target.vocabulary, missing_ids=())  # llama.cpp masks none of the draft's ids
    differences, counts, replayed = list[dict[str, Any]](), list[Counts](), list[Counts]()
    for seed, (name, prompt) in enumerate(prompts):
        [alone] = pair.write([prompt], *asked, seed)
        [text] = pair.write([prompt], *asked, seed, Proposer("draft", given.k), exact_counts=True)
        ids, own = text.response_ids, alone.response_ids
        parted = compare_texts(prompt, own, ids, pair.gap)
        if parted:
            gap, tie = parted.gap, parted.is_near_tie("fast") if temperature == 0 else None
            one = {"prompt": name, "token": parted.place + 1, "logprob_gap": gap, "near_tie": tie}
            differences.append(one)
        if text.rounds:  # else it ended at its first token
            sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0}
            response = {"response_ids": ids[1:], "logprobs": [0.0] * (len(ids) - 1)}
            row: Any = SimpleNamespace(prompt_ids=[*prompt, ids[0]], **response, **sampling)
            replayed.append(replay(draft, [row], [given.k], known, draft_temperature=0.0)[0][given.k])
            counts.append(text.counts)
        equal = sum(figures(a) == figures(b) for a, b in zip(replayed, counts, strict=True))
        found = {"temperature": temperature, "texts": seed + 1, "equal_texts": seed + 1 - len(differences)}
        found |= {"differences": differences, "equal_counts": equal, "counted_texts": len(counts)}
        found |= {runtime: figures(add_counts(counts)), "replay": figures(add_counts(replayed))}
        report.put({"k": given.k, **found}, "k", "temperature")


def tell(report: Report, runtime: str) -> None:
    """What was found, for a reader."""
    for one in report.results:
        print(
            f"\nK = {one['k']}, at {one['temperature']:g}: {one['equal_texts']} of {one['texts']} texts equal; ",
            end="",
        )
        print(f"counts of {one['equal_counts']} of {one['counted_texts']} texts equal a replay")
        columns = ["prompt", "token", "logprob_gap", "near_tie"]
        if one["differences"]:
            print(table(columns, [[str(row[name])[:40] for name in columns] for row in one["differences"]]))
        names = ("rounds", "accepted", "block_efficiency")
        print(
            table(
                ["", *names], [[way, *(f"{one[way][n]:.6g}" for n in names)] for way in (runtime, "replay")]
            )
        )


def main() -> None:
    parser = options(__doc__, "llamacpp_agreement", device=False)
    add = parser.add_argument
    add("target", type=Path, help="GGUF file")
    add("draft", type=Path, help="GGUF file")
    add("--prompts", type=int, default=20, help="spread evenly over the four tasks that ship")
    add("--max-new-tokens", type=int, default=64)
    add("--num-speculative-tokens", dest="k", type=int, default=3)
    add("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    given = parser.parse_args()
    if given.dry_run:
        given.prompts, given.max_new_tokens = 4, 6
    set_threads(given.threads)
    report = Report(given.output, "llamacpp_agreement", "cpu", given)
    target, draft = Target.at(given.target), Target.at(given.draft)
    room = min(target.context_length, draft.context_length) - given.max_new_tokens - 2 * given.k - 2
    prompts = read_prompts(target, given.prompts, min(room, 2000))
    pair = LlamaCppRuntime(threads=given.threads, eos_ids=target.vocabulary.eos_token_ids).open(
        given.target, given.draft
    )
    model = draft.model("cpu")
    for temperature in given.temperatures:
        compare(pair, model, target, prompts, temperature, given, report)
    pair.close()
    report.finish(xllamacpp=LlamaCppRuntime().describe()["version"])
    tell(report, "llamacpp")


if __name__ == "__main__":
    main()
