"""Does OpenVINO with a draft write the target's own greedy text, and do its counts agree with ours?

    python benchmarks/openvino_agreement.py TARGET DRAFT --threads 2 --json agreement.json

TARGET and DRAFT are Hugging Face directories; prompts are taken evenly from the four tasks that ship.

Text: greedy, batch 1, with and without the draft, in full precision (--weights, float32 arithmetic and
caches) and as deployed (--deployed TARGET,DRAFT, the device's own arithmetic). Every first difference is told
with the gap in log-prob between the two tokens, in float32 arithmetic of the very weights that ran, and
whether that is a near-tie (functional/same_text.py).

Counts: greedy, full precision. OpenVINO's rounds in our conventions, our decoder and replay, all from behind
OpenVINO's first token (its first pass has no proposals), masking nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

from machine import Report, options, table

from fastdraft.console import Console
from fastdraft.data.chat import ChatTemplate
from fastdraft.decoding.cache import ReadableModel
from fastdraft.decoding.replay import replay
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.evaluation.tasks import load_task
from fastdraft.functional.acceptance import Counts, add_counts
from fastdraft.functional.generation import Sampling
from fastdraft.functional.same_text import compare_texts
from fastdraft.modeling.drafts import load_draft, set_threads
from fastdraft.recipe.evaluation import ShippedTask
from fastdraft.run_folder import atomic_folder
from fastdraft.runtimes.openvino_export import convert
from fastdraft.runtimes.openvino_speculative import OpenVINOPair, OpenVINOSettings
from fastdraft.runtimes.runtime import Proposer, TimedText
from fastdraft.target import Target

TASKS = ("code", "instructions", "text", "summarization")
GREEDY, ALONE = Sampling(0.0), 0
ByK = dict[int, list[TimedText]]
"""Texts by K; under 0 those of the target alone."""


class Agreement:
    """The pair, its prompts and its exports, made once."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder, self.console = given, given.exports or folder, Console()
        self.target, self.draft = Target.at(given.target), Target.at(given.draft)
        context = min(self.target.context_length, self.draft.context_length)
        self.prompts = read_prompts(
            self.target, given.prompts, context - given.max_new_tokens - max(given.k) - 1
        )

    def export(self, role: str, weights: str) -> Path:
        """The model of a role in these weights; made when it is not there."""
        folder: Path = self.folder / f"{role}-{weights}"
        if not folder.is_dir():
            self.console.say(f"exporting the {role} in {weights}")
            source: Target = getattr(self, role)
            source.files.make_weights()  # of a GGUF file
            with atomic_folder(folder) as temporary:
                convert(source, temporary, weights)
        return folder

    def write(self, pair: OpenVINOPair, title: str, k: int) -> list[TimedText]:
        """Every prompt's greedy text, one after the other."""
        texts, exact = [], pair.settings.precision == "exact"
        with self.console.progress(f"{title}, K = {k}", len(self.prompts), "texts") as progress:
            for _, prompt in self.prompts:
                asked = ([prompt], GREEDY, self.given.max_new_tokens, 0)
                found = (
                    pair.write(*asked, Proposer("draft", k), exact_counts=exact) if k else pair.write(*asked)
                )
                texts += found
                progress.advance()
        return texts

    def compare_texts(self, weights: tuple[str, str], precision: Any) -> tuple[dict[str, Any], ByK]:
        """One setting: how many texts are equal for each K, and every difference."""
        eos, threads = self.target.vocabulary.eos_token_ids, self.given.threads
        how = OpenVINOSettings(precision=precision, threads=threads, eos_ids=eos)
        pair = OpenVINOPair(self.export("target", weights[0]), self.export("draft", weights[1]), how)
        texts = {k: self.write(pair, f"{'/'.join(weights)} {precision}", k) for k in (ALONE, *self.given.k)}
        differences = []
        for k in self.given.k:
            for (name, prompt), own, drafted in zip(self.prompts, texts[ALONE], texts[k], strict=True):
                parted = compare_texts(prompt, own.response_ids, drafted.response_ids, pair.gap)
                if parted:
                    one = {"num_speculative_tokens": k, "prompt": name, "token": parted.place + 1}
                    one |= {"logprob_gap": parted.gap, "near_tie": parted.is_near_tie(precision)}
                    differences.append(one)
        apart = {str(k): sum(one["num_speculative_tokens"] == k for one in differences) for k in self.given.k}
        found = {"target_weights": weights[0], "draft_weights": weights[1], "precision": precision}
        found |= {"texts": len(self.prompts), "differences": differences}
        found |= {"equal": {k: len(self.prompts) - count for k, count in apart.items()}}
        return found | {"unexplained": sum(not one["near_tie"] for one in differences)}, texts

    def compare_counts(self, texts: ByK) -> list[dict[str, Any]]:
        """For each K the counts by OpenVINO, by our decoder and by replay, in full precision."""
        target, draft = self.target.model("cpu"), load_draft(Path(self.given.draft))
        known = replace(self.target.vocabulary, missing_ids=())  # OpenVINO masks none of the draft's ids
        alone = [text.response_ids for text in texts[ALONE]]
        kept = [i for i, ids in enumerate(alone) if len(ids) > 1]  # others have no round behind that token
        prompts = [[*self.prompts[i][1], alone[i][0]] for i in kept]
        how = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
        rows: list[Any] = [
            SimpleNamespace(
                prompt_ids=p, response_ids=alone[i][1:], logprobs=[0.0] * (len(alone[i]) - 1), **how
            )
            for p, i in zip(prompts, kept, strict=True)
        ]
        replayed, found = replay(draft, rows, self.given.k, known), []
        for k in self.given.k:
            decoder = SpeculativeDecoder(ReadableModel(target), ReadableModel(draft), known, k)
            # As many tokens as were asked for, so that a text that ended early must end early here too.
            room = self.given.max_new_tokens - 1
            one = {"num_speculative_tokens": k, "texts": len(kept)}
            one["openvino"] = figures(add_counts(texts[k][i].counts for i in kept))
            one["decoder"] = figures(add_counts(decoder.generate(p, GREEDY, room, 0).counts for p in prompts))
            one["replay"] = figures(add_counts(counts[k] for counts in replayed))
            found.append(one)
        return found


def read_prompts(target: Target, count: int, room: int) -> list[tuple[str, list[int]]]:
    """Names and ids of prompts that fit, spread evenly over the tasks."""
    template, found = ChatTemplate(target.tokenizer), []
    for number, kind in enumerate(TASKS):
        share = (count + len(TASKS) - 1 - number) // len(TASKS)
        task = load_task(ShippedTask.model_validate({"kind": kind, "prompts": 4 * share}))
        chat = task.chat
        encoded = ((one.id, template.prompt_ids(one.text, chat=chat)) for one in task.prompts)
        found += [(f"{kind} {name}", ids) for name, ids in encoded if len(ids) <= room][:share]
    return found


def figures(counts: Counts) -> dict[str, float]:
    found = {"rounds": counts.num_drafts, "accepted": counts.num_accepted_tokens}
    found |= {"generated": counts.num_generated_tokens, "acceptance_rate": counts.acceptance_rate}
    return found | {"block_efficiency": counts.block_efficiency}


def show(texts: list[dict[str, Any]], counts: list[dict[str, Any]]) -> None:
    for one in texts:
        weights = f"{one['target_weights']}/{one['draft_weights']}, {one['precision']}"
        print(f"\n{weights}: of {one['texts']} equal by K {one['equal']}; unexplained {one['unexplained']}")
        columns = ["prompt", "num_speculative_tokens", "token", "logprob_gap", "near_tie"]
        if one["differences"]:
            print(table(columns, [[str(row[name])[:40] for name in columns] for row in one["differences"]]))
    print("\ncounts, greedy, full precision: OpenVINO / our decoder / replay")
    names = ("rounds", "accepted", "block_efficiency")
    ways = ("openvino", "decoder", "replay")
    rows = [
        [
            row["num_speculative_tokens"],
            *(" / ".join(f"{row[way][name]:.6g}" for way in ways) for name in names),
        ]
        for row in counts
    ]
    print(table(["K", *names], rows))


def main() -> None:
    parser = options(__doc__, "openvino_agreement", device=False)
    add = parser.add_argument
    add("target", help="Hugging Face directory, or shipped:targets/starter")
    add("draft", help="Hugging Face directory of a draft with its vocabulary")
    add("--prompts", type=int, default=50)
    add("--max-new-tokens", type=int, default=64)
    add("--num-speculative-tokens", dest="k", type=int, nargs="+", default=[1, 3, 5])
    add("--weights", default="fp32", choices=["fp32", "fp16", "int8", "int4"], help="in full precision")
    add("--deployed", default="int4,int8", help="of target and draft as deployed; empty: only full precision")
    add("--exports", type=Path, help="where exports are kept and found again; default: nowhere")
    given = parser.parse_args()
    if given.dry_run:
        given.prompts, given.max_new_tokens, given.k, given.deployed = 4, 6, [2], ""
    set_threads(given.threads)
    report = Report(given.output, "openvino_agreement", "cpu", given)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        agreement = Agreement(given, Path(folder))
        exact, texts = agreement.compare_texts((given.weights, given.weights), "exact")
        report.add(exact)
        counts = agreement.compare_counts(texts)
        if given.deployed:
            target, _, draft = given.deployed.partition(",")
            report.add(agreement.compare_texts((target, draft or target), "fast")[0])
    report.finish(counts=counts)
    show(report.results, counts)


if __name__ == "__main__":
    main()
