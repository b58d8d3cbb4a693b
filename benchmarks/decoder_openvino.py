"""Our decoder over OpenVINO's passes beside GenAI's own pipelines, on one pair of exports.

    python benchmarks/decoder_openvino.py TARGET DRAFT --threads 16 --json decoder.json

TARGET and DRAFT are folders of exported models. Every prompt is answered greedily by every way in turn, of
which every turn begins with another one: GenAI alone, with the draft, with prompt lookup; ours alone, with
the draft, with lookup, with lookup and the draft behind it. One turn of few tokens warms up. Rates are tokens
per second of whole answers, median and range over the turns. Of ours also: the time outside OpenVINO's passes,
in milliseconds for each round. Tasks: HumanEval (`code`), instructions, a summary, code to rewrite
(rewrite_task.py, in the chat template).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

import rewrite_task
from machine import Report, options, table, turns_of

from fastdraft.data.chat import ChatTemplate
from fastdraft.evaluation.tasks import load_task
from fastdraft.functional.generation import Sampling
from fastdraft.functional.same_text import compare_texts
from fastdraft.modeling.drafts import set_threads
from fastdraft.recipe.evaluation import ShippedTask
from fastdraft.runtimes.openvino_decoder import DecoderPair, OpenVINODecoderRuntime
from fastdraft.runtimes.openvino_speculative import OpenVINOPair, OpenVINOSettings
from fastdraft.runtimes.runtime import Proposer, ProposerKind, TimedText
from fastdraft.target import Target

KINDS: tuple[ProposerKind | None, ...] = (None, "draft", "lookup", "lookup_draft")
# Two ways and the least that the rate of the first should be of the second's.
ASKED = [("ours alone", "genai alone", 0.95), ("ours draft", "genai draft", 0.95)]
BOTH = "ours lookup_draft"
Way = tuple[str, Proposer | None]


class Ways:
    """Both libraries with the pair, and who answers how."""

    def __init__(self, given: argparse.Namespace) -> None:
        eos = Target.at(given.target).vocabulary.eos_token_ids
        settings = {"threads": given.threads, "precision": given.precision, "eos_ids": eos}
        folders = Path(given.target), Path(given.draft)
        self.genai = OpenVINOPair(*folders, OpenVINOSettings(**settings))
        self.ours = DecoderPair(folders, OpenVINODecoderRuntime(**settings))
        lengths: dict[ProposerKind, tuple[int, ...]] = {"draft": (given.k,), "lookup": (given.lookup,)}
        lengths["lookup_draft"] = given.k, given.lookup
        named: list[Way] = [(kind or "alone", kind and Proposer(kind, *lengths[kind])) for kind in KINDS]
        self.ways = {f"genai {name}": (self.genai, how) for name, how in named if name != "lookup_draft"}
        self.ways |= {f"ours {name}": (self.ours, how) for name, how in named}

    def answer(self, way: str, prompt: Sequence[int], tokens: int) -> tuple[TimedText, float]:
        """A greedy answer, and the seconds of it inside OpenVINO's passes; of GenAI nobody tells: 0."""
        pair, proposer = self.ways[way]
        before = self.inside()
        [text] = pair.write([prompt], Sampling(0.0), tokens, 0, proposer)
        return text, self.inside() - before

    def inside(self) -> float:
        models = (vars(self.ours).get(name) for name in ("target", "draft"))  # those that are loaded
        return sum(model.seconds for model in models if model)


def measure(ways: Ways, task: str, prompts: Sequence[Sequence[int]], given: argparse.Namespace) -> Any:
    """A result for every way: rates of every turn, and what is told of the last turn's texts."""
    names = list(ways.ways)
    seconds: dict[str, list[float]] = {name: [0.0] * given.turns for name in names}
    inside: dict[str, list[float]] = {name: [0.0] * given.turns for name in names}
    texts: dict[str, list[TimedText]] = {}
    for name in names:
        ways.answer(name, prompts[0], 8)
    for turn, order in enumerate(turns_of(names, given.turns)):
        texts = {name: [] for name in names}
        for prompt in prompts:
            for name in order:
                text, within = ways.answer(name, prompt, given.max_new_tokens)
                seconds[name][turn] += text.seconds
                inside[name][turn] += within
                texts[name].append(text)
    for name in names:
        tokens = sum(len(text.response_ids) for text in texts[name])
        rates = [tokens / each for each in seconds[name]]
        one: dict[str, Any] = {"task": task, "way": name, "tokens": tokens, "prompts": len(prompts)}
        one |= {"tokens_per_second": statistics.median(rates), "turns": rates}
        rounds = sum(len(text.rounds) or len(text.response_ids) for text in texts[name])
        one |= {"tokens_per_pass": tokens / rounds, "differences": differences(ways, prompts, texts, name)}
        # Of greedy text every turn has the same rounds.
        outside = [1e3 * (a - b) / rounds for a, b in zip(seconds[name], inside[name], strict=True)]
        yield one | {"outside_ms_per_round": outside if name.startswith("ours") else None}


def differences(
    ways: Ways, prompts: Sequence[Sequence[int]], texts: dict[str, list[TimedText]], way: str
) -> list[float | None]:
    """Of every text that is not GenAI's alone, the gap in log-prob where they part; None: one ends there."""
    own = texts["genai alone"]
    found = [
        compare_texts(prompt, a.response_ids, b.response_ids, ways.genai.gap)
        for prompt, a, b in zip(prompts, own, texts[way], strict=True)
    ]
    return [each.gap for each in found if each is not None]


def prompts_of(target: Target, task: str, count: int, room: int) -> list[list[int]]:
    template = ChatTemplate(target.tokenizer)
    if task == "rewrite":
        asked = [(one["prompt"], True) for one in rewrite_task.prompts()]
    else:
        loaded = load_task(ShippedTask.model_validate({"kind": task, "prompts": 4 * count}))
        asked = [(one.prompt, loaded.chat) for one in loaded.prompts]
    encoded = (template.prompt_ids(text, chat=chat) for text, chat in asked)
    return [ids for ids in encoded if 0 < len(ids) <= room][:count]


def show(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table, and the ratios that are asked for, by task."""
    columns = ["task", "way", "tokens/s", "tokens/pass", "outside ms/round", "other texts"]
    rows = []
    for one in results:
        outside = one["outside_ms_per_round"]
        told = [ranged(one["turns"]), f"{one['tokens_per_pass']:.2f}"]
        told.append("" if outside is None else ranged(outside))
        rows.append([one["task"], one["way"], *told, str(len(one["differences"]))])
    print(table(columns, rows))
    ratios = []
    for task in dict.fromkeys(one["task"] for one in results):
        rates = {one["way"]: one["turns"] for one in results if one["task"] == task}
        medians = {way: statistics.median(turns) for way, turns in rates.items()}
        better = max(("ours lookup", "ours draft"), key=medians.__getitem__)
        for way, other, least in [*ASKED, (BOTH, better, 1.0)]:
            # Turn by turn, so that a slow spell of the machine hits both.
            turns = [a / b for a, b in zip(rates[way], rates[other], strict=True)]
            one = {"task": task, "way": way, "other": other, "ratio": statistics.median(turns)}
            ratios.append(one | {"turns": turns, "asked": least})
            print(f"{task}: {way} / {other}: {ranged(turns)} (asked {least})")
    return ratios


def ranged(turns: Sequence[float]) -> str:
    return f"{statistics.median(turns):.2f} [{min(turns):.2f}, {max(turns):.2f}]"


def main() -> None:
    parser = options(__doc__, "decoder_openvino", device=False)
    add = parser.add_argument
    add("target", help="folder of an exported target")
    add("draft", help="folder of an exported draft with its vocabulary")
    add("--tasks", nargs="+", default=["code", "instructions", "summarization", "rewrite"])
    add("--prompts", type=int, default=8, help="of each task")
    add("--max-new-tokens", type=int, default=128)
    add("--num-speculative-tokens", "-k", dest="k", type=int, default=3)
    add(
        "--num-lookup-tokens",
        dest="lookup",
        type=int,
        help="lookup's, alone and before the draft; default: K",
    )
    add("--turns", type=int, default=5)
    add("--precision", choices=["fast", "exact"], default="fast")
    given = parser.parse_args()
    given.lookup = given.k if given.lookup is None else given.lookup
    if given.dry_run:
        given.tasks, given.prompts, given.max_new_tokens, given.turns = ["code"], 1, 8, 1
    set_threads(given.threads)
    report, ways, target = (
        Report(given.output, "decoder_openvino", "cpu", given),
        Ways(given),
        Target.at(given.target),
    )
    room = (
        min(target.context_length, Target.at(given.draft).context_length)
        - given.max_new_tokens
        - max(given.k, given.lookup)
        - 1
    )
    for task in given.tasks:
        report.add(*measure(ways, task, prompts_of(target, task, given.prompts, room), given))
    report.finish(ratios=show(report.results))


if __name__ == "__main__":
    main()
