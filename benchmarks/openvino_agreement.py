"""Does OpenVINO with a draft write the target's own greedy text, and do its counts agree with ours?

    python benchmarks/openvino_agreement.py TARGET DRAFT --threads 2 --json agreement.json

TARGET and DRAFT are Hugging Face directories; prompts are taken evenly from the four tasks that ship.

Text: greedy, batch 1, with and without the draft, in full precision (--weights, float32 arithmetic and caches) and as
deployed (--deployed TARGET,DRAFT, the device's own arithmetic). Every first difference is printed with the gap in log-prob
between the two tokens, in float32 arithmetic of the very weights that ran.

What counts as a near tie is measured, not chosen. A pass over K + 1 tokens rounds otherwise than one over a single token, so
both are made over the same text with the graph that continuous batching runs (paged attention, the same compiled model),
and beside them float32 passes. At every place where the float32 runner-up is within 1 of the leader in log-prob, the gap
between these two is compared: the largest movement of it is what this precision can do to a gap, and a difference with a
larger one would not be explained.

Counts: greedy, full precision, adaptive stopping off. OpenVINO's rounds in our conventions, our decoder and replay, all from
behind OpenVINO's first token (its first pass has no proposals), masking nothing; rounds, accepted tokens and block
efficiency side by side.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

import numpy as np
from machine import Report

from fastdraft.console import Console, format_table
from fastdraft.data.chat import has_chat_template, prompt_ids
from fastdraft.decoding.replay import replay
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.evaluation.tasks import load_task
from fastdraft.functional import same_text
from fastdraft.functional.acceptance import Counts, add_counts
from fastdraft.functional.generation import Sampling
from fastdraft.modeling.drafts import load_draft, set_threads
from fastdraft.recipe.evaluation import ShippedTask
from fastdraft.run_folder import atomic_folder
from fastdraft.runtimes.openvino_export import convert
from fastdraft.runtimes.openvino_latency import LoadedModel
from fastdraft.runtimes.openvino_speculative import OpenVINOPair, OpenVINOSettings
from fastdraft.runtimes.openvino_ties import TieJudge
from fastdraft.runtimes.runtime import TimedText
from fastdraft.target import Target

TASKS = ("code", "instructions", "text", "summarization")
GREEDY = Sampling(0.0)
Array = np.ndarray[Any, np.dtype[np.float64]]
CLOSE = 1.0
"""Log-prob between leader and runner-up up to which a place tells what arithmetic does to near ties."""


class Agreement:
    """The pair, its prompts and its exports, made once."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, arguments.exports or folder
        self.console = Console()
        opened = Target.at(arguments.target)
        self.source = {"target": opened.location, "draft": arguments.draft}
        self.context = min(Target.at(place).context_length for place in self.source.values())
        self.vocabulary = replace(opened.vocabulary, missing_ids=())  # OpenVINO masks none of the draft's ids
        self.prompts = read_prompts(
            opened.location, arguments.prompts, self.context - arguments.max_new_tokens - max(arguments.k) - 1
        )
        self.largest_k = max(arguments.k)

    def export(self, role: str, weights: str) -> Path:
        """The model of a role in these weights; made when it is not there."""
        folder: Path = self.folder / f"{role}-{weights}"
        if not folder.is_dir():
            self.console.say(f"exporting the {role} in {weights}")
            with atomic_folder(folder) as temporary:
                convert(Target.at(self.source[role]), temporary, weights)  # type: ignore[arg-type]
        return folder

    def write(
        self, pair: OpenVINOPair, title: str, k: int = 0, exact_counts: bool = False
    ) -> list[TimedText]:
        """Every prompt's greedy text, one after the other; K 0: the target alone."""
        texts = []
        with self.console.progress(title, len(self.prompts), "texts") as progress:
            for _, prompt in self.prompts:
                asked = ([prompt], GREEDY, self.arguments.max_new_tokens, 0)
                batch = (
                    pair.write_with_draft(*asked, k, exact_counts=exact_counts) if k else pair.write(*asked)
                )
                texts += batch.texts
                progress.advance()
        return texts

    def texts(self, weights: tuple[str, str], precision: str) -> dict[str, Any]:
        """Texts of one pair without (`alone`) and with the draft (by K)."""
        target, draft = self.export("target", weights[0]), self.export("draft", weights[1])
        options: dict[str, Any] = {"precision": precision, "threads": self.arguments.threads}
        options["eos_ids"] = self.vocabulary.eos_token_ids
        name = f"{weights[0]}/{weights[1]} {precision}"
        pair = OpenVINOPair(target, draft, OpenVINOSettings(**options))
        alone = self.write(pair, f"{name}, alone")
        by_k = {
            k: self.write(pair, f"{name}, K = {k}", k, exact_counts=precision == "exact")
            for k in self.arguments.k
        }
        return {"alone": alone, **by_k}


def read_prompts(target: str, count: int, room: int) -> list[tuple[str, list[int]]]:
    """Names and ids of prompts that fit, spread evenly over the tasks."""
    tokenizer = Target.at(target).tokenizer
    template, found = has_chat_template(tokenizer), []
    for number, kind in enumerate(TASKS):
        share = (count + len(TASKS) - 1 - number) // len(TASKS)
        task = load_task(ShippedTask.model_validate({"kind": kind, "prompts": 4 * share}))
        encoded = (
            (prompt.id, prompt_ids(tokenizer, prompt.text, task.chat and template)) for prompt in task.prompts
        )
        found += [(f"{kind} {name}", ids) for name, ids in encoded if len(ids) <= room][:share]
    return found


class TextReader(LoadedModel):
    """Reads a given text in passes of a given width through the graph of continuous batching."""

    ids: Sequence[int] = ()

    def begin(self, ids: Sequence[int]) -> None:
        """Starts over with another text."""
        self.ids, self.prefix_tokens = ids, 0
        self._inputs.clear()

    def _tensors(self, width: int) -> dict[str, Any]:
        import openvino

        ids = np.asarray(self.ids[self.prefix_tokens : self.prefix_tokens + width], dtype=np.int64)
        return {**super()._tensors(width), "input_ids": openvino.Tensor(ids)}

    def logprobs(self, prompt: Sequence[int], response: Sequence[int], width: int) -> Array:
        """[len(response), V] behind the prompt and each response token but the last, in passes over `width` tokens.

        The prompt but its last token is read in one pass, as continuous batching does.
        """
        self.begin([*prompt, *response[:-1]])
        self.read(len(prompt) - 1)
        self.prefix_tokens = len(prompt) - 1
        rows = []
        while self.prefix_tokens < len(self.ids):
            step = min(width, len(self.ids) - self.prefix_tokens)
            self.read(step)
            self.prefix_tokens += step
            rows.append(self.logits().astype(np.float64)[-step:])
        logits = np.concatenate(rows)
        shifted = logits - logits.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def lead(logprobs: Array, leaders: np.ndarray[Any, np.dtype[np.int64]]) -> Array:
    """[T]: by how much the second of two tokens leads the first, from log-probs [T, V] and token ids [T, 2]."""
    return np.asarray(np.diff(np.take_along_axis(logprobs, leaders, -1))[:, 0])


def movement(
    agreement: Agreement, folder: Path, precision: str, texts: Sequence[TimedText]
) -> dict[str, Any]:
    """How far this precision moves the gap between the two leading tokens; see the module's docstring."""
    room, options = agreement.context, {"threads": agreement.arguments.threads}
    exact, tested = (
        TextReader(folder, 0, room, precision="exact", **options),
        TextReader(folder, 0, room, precision=precision, **options),
    )  # type: ignore[arg-type]
    moved: dict[int, list[float]] = {k + 1: [] for k in (0, *agreement.arguments.k)}
    flips, places = dict.fromkeys(moved, 0), 0
    with agreement.console.progress(f"movement in {precision}", len(texts), "texts") as progress:
        for (_, prompt), text in zip(agreement.prompts, texts, strict=True):
            progress.advance()
            if len(prompt) < 2:
                continue
            reference = exact.logprobs(prompt, text.response_ids, 1)
            leaders = np.argsort(reference, axis=-1)[:, -2:]
            gap = lead(reference, leaders)
            close = gap < CLOSE
            places += int(close.sum())
            gaps = {
                width: lead(tested.logprobs(prompt, text.response_ids, width), leaders) for width in moved
            }
            for width, found in gaps.items():
                moved[width] += np.abs(found - gap)[close].tolist()
                flips[width] += int(((found < 0) != (gaps[1] < 0))[close].sum())
    together = np.array([value for values in moved.values() for value in values] or [0.0])
    return {
        "places": places,
        "largest": float(together.max()),
        "median": float(np.median(together)),
        "percentile_99": float(np.percentile(together, 99)),
        "largest_by_width": {str(width): max(values, default=0.0) for width, values in moved.items()},
        "flips_against_one_token": {str(width): flips[width] for width in moved if width > 1},
    }


def differences(
    agreement: Agreement, judge: TieJudge, texts: dict[str, Any], limit: float
) -> list[dict[str, Any]]:
    """The first difference of every text that differs, with its gap and whether that is a near tie."""
    found = []
    for k in agreement.arguments.k:
        for (name, prompt), alone, drafted in zip(agreement.prompts, texts["alone"], texts[k], strict=True):
            parted = same_text.compare_texts(prompt, alone.response_ids, drafted.response_ids, judge.gap)
            if parted is None:
                continue
            place, gap = parted.place, math.inf if parted.gap is None else parted.gap
            own, other = ((*text.response_ids, -1)[place] for text in (alone, drafted))  # -1: the end
            found.append(
                {
                    "num_speculative_tokens": k,
                    "prompt": name,
                    "token": place + 1,
                    "alone": own,
                    "with_draft": other,
                    "logprob_gap": gap,
                    "near_tie": gap <= limit,
                }
            )
    return found


def compare_texts(
    agreement: Agreement, weights: tuple[str, str], precision: str, texts: dict[str, Any]
) -> dict[str, Any]:
    """One setting: how many texts are equal for each K, the measured limit, and every difference."""
    folder = agreement.export("target", weights[0])
    moved = movement(agreement, folder, precision, texts["alone"])
    found = differences(agreement, TieJudge(folder), texts, moved["largest"])
    equal = {
        str(k): sum(a.response_ids == b.response_ids for a, b in zip(texts["alone"], texts[k], strict=True))
        for k in agreement.arguments.k
    }
    return {
        "target_weights": weights[0],
        "draft_weights": weights[1],
        "precision": precision,
        "texts": len(texts["alone"]),
        "tokens": sum(len(text.response_ids) for text in texts["alone"]),
        "equal": equal,
        "movement": moved,
        "differences": found,
        "unexplained": sum(not one["near_tie"] for one in found),
    }


def compare_counts(agreement: Agreement, texts: dict[str, Any]) -> list[dict[str, Any]]:
    """For each K the counts by OpenVINO, by our decoder and by replay, in full precision."""
    target, draft = (
        Target.at(agreement.arguments.target).model("cpu"),
        load_draft(agreement.source["draft"]),
    )
    # Texts of one token have no round behind it.
    kept = [i for i, text in enumerate(texts["alone"]) if len(text.response_ids) > 1]
    behind = [
        ([*agreement.prompts[i][1], texts["alone"][i].response_ids[0]], texts["alone"][i].response_ids[1:])
        for i in kept
    ]
    rows = [
        SimpleNamespace(
            prompt_ids=prompt,
            response_ids=ids,
            logprobs=[0.0] * len(ids),
            temperature=0.0,
            top_k=0,
            top_p=1.0,
        )
        for prompt, ids in behind
    ]
    replayed = replay(draft, rows, agreement.arguments.k, agreement.vocabulary)
    found = []
    for k in agreement.arguments.k:
        decoder = SpeculativeDecoder(target, draft, agreement.vocabulary, k)
        # As many tokens as were asked for, so that a text that ended early must end early here too.
        room = agreement.arguments.max_new_tokens - 1
        ways = {
            "openvino": add_counts(texts[k][i].counts for i in kept),
            "decoder": add_counts(decoder.generate(prompt, GREEDY, room, 0).counts for prompt, _ in behind),
            "replay": add_counts(counts[k] for counts in replayed),
        }
        found.append(
            {
                "num_speculative_tokens": k,
                "texts": len(kept),
                **{name: figures(counts) for name, counts in ways.items()},
            }
        )
        found[-1]["largest_difference_percent"] = largest_difference(found[-1])
    return found


def figures(counts: Counts) -> dict[str, float]:
    return {
        "rounds": counts.num_drafts,
        "accepted": counts.num_accepted_tokens,
        "generated": counts.num_generated_tokens,
        "acceptance_rate": counts.acceptance_rate,
        "block_efficiency": counts.block_efficiency,
    }


def largest_difference(row: dict[str, Any]) -> float:
    """Between any two of the three ways, over all figures, in percent of the decoder's."""
    ways = [row[name] for name in ("openvino", "decoder", "replay")]
    spread = [
        (max(way[name] for way in ways) - min(way[name] for way in ways)) / max(row["decoder"][name], 1e-9)
        for name in ways[0]
    ]
    return 100 * max(spread)


def show_texts(found: dict[str, Any]) -> None:
    moved = found["movement"]
    equal = ", ".join(f"K = {k}: {count}" for k, count in found["equal"].items())
    print(
        f"\n{found['target_weights']}/{found['draft_weights']}, {found['precision']}: of {found['texts']} texts equal {equal}"
    )
    print(
        f"near tie: a gap up to {moved['largest']:.2g}, the largest movement over {moved['places']} places (median {moved['median']:.1g}, "
        f"99 % {moved['percentile_99']:.1g}; order of the two leaders changed by the width of the pass: "
        + ", ".join(f"{width} tokens {count}" for width, count in moved["flips_against_one_token"].items())
        + ")"
    )
    same: dict[tuple[Any, ...], list[str]] = {}  # most differences are the same for every K
    for one in found["differences"]:
        key = (
            one["prompt"],
            one["token"],
            one["alone"],
            one["with_draft"],
            one["logprob_gap"],
            one["near_tie"],
        )
        same.setdefault(key, []).append(str(one["num_speculative_tokens"]))
    columns = ["prompt", "K", "token", "alone", "with draft", "log-prob gap", "verdict"]
    rows = [
        [
            prompt[:40],
            ", ".join(ks),
            token,
            own,
            other,
            f"{gap:.2g}",
            "near tie" if near else "NOT a near tie",
        ]
        for (prompt, token, own, other, gap, near), ks in same.items()
    ]
    if rows:
        print(format_table("", columns, rows, width=140))


def show_counts(found: Sequence[dict[str, Any]]) -> None:
    def cell(row: dict[str, Any], name: str, form: str) -> str:
        return " / ".join(format(row[way][name], form) for way in ("openvino", "decoder", "replay"))

    columns = ["K", "texts", "rounds", "accepted", "block efficiency", "largest difference"]
    rows = [
        [
            row["num_speculative_tokens"],
            row["texts"],
            cell(row, "rounds", ".0f"),
            cell(row, "accepted", ".0f"),
            cell(row, "block_efficiency", ".4f"),
            f"{row['largest_difference_percent']:.2f} %",
        ]
        for row in found
    ]
    print(
        format_table(
            "\ncounts, greedy, full precision: OpenVINO / our decoder / replay", columns, rows, width=140
        )
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", help="Hugging Face directory, or shipped:targets/starter")
    parser.add_argument("draft", help="Hugging Face directory of a draft with its vocabulary")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-speculative-tokens", dest="k", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument(
        "--weights",
        default="fp32",
        choices=["fp32", "fp16", "int8", "int4"],
        help="of both, in full precision",
    )
    parser.add_argument(
        "--deployed",
        default="int4,int8",
        help="weights of target and draft as deployed; empty: only full precision",
    )
    parser.add_argument(
        "--exports", type=Path, help="where exports are kept and found again; default: nowhere"
    )
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    set_threads(arguments.threads)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        agreement = Agreement(arguments, Path(folder))
        settings = [((arguments.weights, arguments.weights), "exact")]
        if arguments.deployed:
            target, _, draft = arguments.deployed.partition(",")
            settings.append(((target, draft or target), "fast"))
        found: dict[str, Any] = {"texts": []}
        for weights, precision in settings:
            texts = agreement.texts(weights, precision)
            found["texts"].append(compare_texts(agreement, weights, precision, texts))
            if precision == "exact":
                found["counts"] = compare_counts(agreement, texts)
    for one in found["texts"]:
        show_texts(one)
    show_counts(found["counts"])
    print(f"differences not explained by a near tie: {sum(one['unexplained'] for one in found['texts'])}")
    if arguments.json:
        Report(arguments.json, "openvino_agreement", "cpu", arguments).finish(**found)


if __name__ == "__main__":
    main()
