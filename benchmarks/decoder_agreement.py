"""Does our decoder write and count the same through both readers, with every proposer, and leave nothing behind?

    python benchmarks/decoder_agreement.py TARGET DRAFT --exports FOLDER --threads 1 --json agreement.json

TARGET and DRAFT are models as `target.model` takes them; their exports are made in FOLDER and found again.
Prompts are taken evenly from the four tasks that ship. Parts:

exact: float32. Greedy text alone and with each proposer through OpenVINO, with each through transformers; the
counts of both readers and of replay over the text alone, prompt by prompt.
deployed: as a device runs it. Differences between alone and each proposer, of our decoder and of OpenVINO
GenAI's pipelines. Wherever texts part, the gap between the log-probs of the target's two best tokens there, by a
fresh read in float32.
clock: seconds of one greedy answer with the draft, through transformers and OpenVINO in float32, and as deployed.
memory: resident memory over answers, every second of them stopped in its middle; through both readers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

import numpy as np
import torch
from machine import Report, options
from openvino_agreement import read_prompts

from fastdraft.data.rows import SyntheticRow
from fastdraft.decoding.cache import ReadableModel
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.decoding.reader import Readable
from fastdraft.decoding.replay import accept_probabilities, counts_of_accepts
from fastdraft.decoding.speculative import SpeculativeDecoder, SpeculativeResult
from fastdraft.functional.acceptance import TOTALS, Counts, counts_from_array
from fastdraft.functional.generation import Sampling
from fastdraft.functional.lookup import look_up, lookup_counts
from fastdraft.functional.same_text import first_difference
from fastdraft.modeling.drafts import load_draft, set_threads
from fastdraft.run_folder import atomic_folder
from fastdraft.runtimes.openvino_decoder import DecoderPair, OpenVINODecoderRuntime
from fastdraft.runtimes.openvino_export import convert
from fastdraft.runtimes.openvino_speculative import OpenVINOPair, OpenVINOSettings
from fastdraft.runtimes.runtime import Proposer
from fastdraft.target import Target

# What is compared of a text's counts. Overlaps are left out: of a certain proposal replay has none.
COUNTED = (
    *("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos"),
    *("num_examined_tokens", "num_generated_tokens"),
)
KINDS: tuple[ProposerKind, ...] = ("draft", "lookup", "lookup_draft")
PARTS = ("exact", "deployed", "clock", "memory")
GREEDY = Sampling(0.0)
Prompts = list[tuple[str, list[int]]]


class Exports:
    """The pair's exports by role and weights, each made where it is not there."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.target, self.draft = given, Target.at(given.target), Target.at(given.draft)

    def find(self, role: str, weights: str) -> Path:
        folder: Path = self.given.exports / f"{role}-{weights}"
        if not folder.is_dir():
            source: Target = getattr(self, role)
            source.files.make_weights()  # of a GGUF file
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder) as temporary:
                convert(source, temporary, weights)  # type: ignore[arg-type]
        return folder

    def ours(self, weights: tuple[str, str], precision: Any) -> DecoderPair:
        folders = self.find("target", weights[0]), self.find("draft", weights[1])
        eos = self.target.vocabulary.eos_token_ids
        how = OpenVINODecoderRuntime(precision=precision, threads=self.given.threads, eos_ids=eos)
        return DecoderPair(folders, how)

    def transformers(self) -> tuple[Readable, Readable]:
        return ReadableModel(self.target.model("cpu", torch.float32)), ReadableModel(
            load_draft(Path(self.given.draft))
        )


def decoder_of(exports: Exports, pair: tuple[Readable, Readable], kind: ProposerKind | None, k: int) -> Any:
    draft = pair[1] if kind in ("draft", "lookup_draft") else None
    return SpeculativeDecoder(pair[0], draft, exports.target.vocabulary, k, proposer=kind)


def parted(pair: DecoderPair, name: str, prompt: list[int], own: list[int], other: list[int]) -> list[Any]:
    """Where two texts part, if they do, and how far apart the target's two best tokens are there."""
    place = first_difference(own, other)
    if place is None:
        return []
    best = np.sort(pair.judge.logprobs([*prompt, *own[:place]]))[-2:]
    return [{"prompt": name, "token": place + 1, "two_best_apart": float(best[1] - best[0])}]


def counted(counts: Counts, late: float = 0, lookups: float = 0) -> list[Any]:
    """All that is counted of one text: by position too, tokens that the draft reads late, rounds of lookup."""
    return [*(getattr(counts, name) for name in COUNTED), late, lookups]


def figures_of(run: SpeculativeResult) -> list[Any]:
    late = run.num_caught_up if any(r.proposer == "draft" for r in run.rounds) else 0
    lookups = sum(r.proposer == "lookup" for r in run.rounds)
    return counted(run.counts, late, lookups)


def replayed(draft: Any, exports: Exports, run: SpeculativeResult, k: int) -> dict[str, list[Any]]:
    """By proposer the same figures, by replay over the text that the target wrote alone."""
    row = SyntheticRow.of(run.generation, "", GREEDY)
    accepts = accept_probabilities(draft, [row], exports.target.vocabulary)
    lookups = [look_up(row.prompt_ids, row.response_ids, k)]
    found = {"draft": counted(counts_of_accepts(accepts, [k])[0][k])}
    for kind, behind in (("lookup", None), ("lookup_draft", accepts)):
        line = lookup_counts(lookups, [k], behind)[0, 0]
        found[kind] = counted(counts_from_array(line[: TOTALS + k]), *line[-2:])
    return found


class Tally:
    """A row of the report for every way, which grows prompt by prompt; the file holds what is done."""

    def __init__(self, report: Report, part: str) -> None:
        self.report, self.part, self.rows = report, part, dict[tuple[str, str], dict[str, Any]]()

    def add(self, where: str, kind: str | None, differences: list[Any], **figures: float) -> None:
        place, names = (where, kind or "alone"), ("part", "where", "proposer")
        row = self.rows.setdefault(place, {"part": self.part, "where": where, "proposer": place[1]})
        row["differences"] = row.get("differences", []) + differences
        for name, value in {"texts": 1, **figures}.items():
            row[name] = row.get(name, 0) + value
        self.report.put(row, *names)


def exact(exports: Exports, prompts: Prompts, report: Report) -> None:
    given, pair, tally = exports.given, exports.ours(("fp32", "fp32"), "exact"), Tally(report, "exact")
    readers = {"openvino": (pair.target, pair.draft), "transformers": exports.transformers()}
    ways: list[tuple[str, ProposerKind | None]] = [("openvino", None)]
    ways += [(reader, kind) for kind in KINDS for reader in readers]
    decoders = {way: decoder_of(exports, readers[way[0]], way[1], given.k) for way in ways}
    draft = load_draft(Path(given.draft))
    for number, (name, prompt) in enumerate(prompts):
        start = time.monotonic()
        runs = {way: each.generate(prompt, GREEDY, given.max_new_tokens, 0) for way, each in decoders.items()}
        alone = runs["openvino", None]
        own, told = alone.generation.response_ids, replayed(draft, exports, alone, given.k)
        for (reader, kind), run in runs.items():
            figures: dict[str, float] = {"tokens": len(run.generation.response_ids)}
            if kind:
                mine, other = figures_of(run), figures_of(runs["openvino", kind])
                figures |= {"rounds": run.counts.num_drafts, "proposed": run.counts.num_draft_tokens}
                figures |= {"accepted": run.counts.num_accepted_tokens}
                figures |= {"equal_to_replay": mine == told[kind], "equal_to_openvino": mine == other}
            parts = parted(pair, name, prompt, own, run.generation.response_ids)
            tally.add(reader, kind, parts, **figures)
        print(f"exact: {number + 1} of {len(prompts)}, {time.monotonic() - start:.0f} s", flush=True)
    show(tally)


def deployed(exports: Exports, prompts: Prompts, report: Report) -> None:
    """Both libraries over the same exports, each against itself alone."""
    given, weights, tally = exports.given, exports.given.deployed.split(","), Tally(report, "deployed")
    ours = exports.ours((weights[0], weights[-1]), "fast")
    eos = exports.target.vocabulary.eos_token_ids
    genai = OpenVINOPair(*ours.folders, OpenVINOSettings(threads=given.threads, eos_ids=eos))
    libraries: list[tuple[str, Any, Any]] = [("ours", ours, KINDS), ("genai", genai, KINDS[:2])]
    for number, (name, prompt) in enumerate(prompts):
        for library, pair, kinds in libraries:
            own: list[int] = []
            for kind in (None, *kinds):
                how = kind and Proposer(kind, given.k)
                [text] = pair.write([prompt], GREEDY, given.max_new_tokens, 0, how)
                own = own or text.response_ids
                parts = parted(ours, name, prompt, own, text.response_ids)
                tally.add(library, kind, parts, tokens=len(text.response_ids), seconds=text.seconds)
        print(f"deployed: {number + 1} of {len(prompts)}", flush=True)
    show(tally)


def show(tally: Tally) -> None:
    for row in tally.rows.values():
        gaps = [f"{each['two_best_apart']:.4f}" for each in row["differences"]]
        rest = {key: value for key, value in row.items() if key not in ("differences", "part")}
        print(rest, f"differences {len(gaps)}: {gaps}", flush=True)


def clock(exports: Exports, prompts: Prompts, report: Report) -> None:
    """Whole answers to the same prompts in turns, with the draft."""
    given, weights = exports.given, exports.given.deployed.split(",")
    exact_pair, fast = (
        exports.ours(("fp32", "fp32"), "exact"),
        exports.ours((weights[0], weights[-1]), "fast"),
    )
    ways = {"transformers float32": exports.transformers()}
    ways |= {"openvino float32": (exact_pair.target, exact_pair.draft)}
    ways |= {"openvino deployed": (fast.target, fast.draft)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    decoders = {way: decoder_of(exports, pair, "draft", given.k) for way, pair in ways.items()}
    for decoder in decoders.values():
        decoder.generate(prompts[0][1], GREEDY, 8, 0)
    for _, prompt in prompts[: given.clock_prompts]:
        for way, decoder in decoders.items():
            start = time.perf_counter()
            text = decoder.generate(prompt, GREEDY, given.clock_tokens, 0).generation.response_ids
            seconds[way].append((time.perf_counter() - start) * given.clock_tokens / len(text))
    base = seconds["transformers float32"]
    for way, each in seconds.items():
        ratios = [a / b for a, b in zip(base, each, strict=True)]
        one = {"part": "clock", "way": way, "tokens": given.clock_tokens, "seconds": statistics.median(each)}
        report.add(one | {"times_faster": statistics.median(ratios), "low": min(ratios), "high": max(ratios)})
        print(report.results[-1], flush=True)


def memory(exports: Exports, prompts: Prompts, report: Report) -> None:
    """Every second answer is stopped behind its second round."""
    given, pair = exports.given, exports.ours(("fp32", "fp32"), "exact")
    for name, readers in (("openvino", (pair.target, pair.draft)), ("transformers", exports.transformers())):
        decoder, resident = decoder_of(exports, readers, "lookup_draft", given.k), Counter[int]()
        decoder.generate(max((ids for _, ids in prompts), key=len), GREEDY, 12, 0)
        for number in range(given.answers + 1):
            if number % 20 == 0:
                resident[number] = resident_bytes()
                print(f"memory {name}: {number} answers, {resident[number] / 2**20:.1f} MiB", flush=True)
            rounds = decoder.rounds(prompts[number % len(prompts)][1], GREEDY, 12, number)
            next(rounds)
            if number % 2:
                next(rounds, None)
            else:
                list(rounds)
            rounds.close()
        report.add(
            {"part": "memory", "reader": name, "resident_bytes": {str(k): v for k, v in resident.items()}}
        )


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    parser = options(__doc__, "decoder_agreement", device=False)
    add = parser.add_argument
    add("target", help="a model: a folder, a GGUF file, or shipped:targets/starter")
    add("draft", help="folder of a draft with its vocabulary")
    add("--exports", type=Path, required=True, help="where exports are kept and found again")
    add("--deployed", default="int4,int8", help="weights of target and draft as deployed")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--prompts", type=int, default=50)
    add("--prompt-tokens", type=int, default=2**20, help="most of a prompt")
    add("--max-new-tokens", type=int, default=64)
    add("--num-speculative-tokens", "-k", dest="k", type=int, default=3)
    add("--clock-prompts", type=int, default=4)
    add("--clock-tokens", type=int, default=96)
    add("--answers", type=int, default=200, help="of the part memory")
    given = parser.parse_args()
    if given.dry_run:
        given.prompts, given.max_new_tokens, given.clock_tokens, given.answers = 4, 6, 8, 20
    set_threads(given.threads)
    report, exports = Report(given.output, "decoder_agreement", "cpu", given), Exports(given)
    context = min(exports.target.context_length, exports.draft.context_length)
    room = context - max(given.max_new_tokens, given.clock_tokens) - given.k - 1
    prompts = read_prompts(exports.target, given.prompts, min(room, given.prompt_tokens))
    print(
        f"{len(prompts)} prompts of {min(len(ids) for _, ids in prompts)} to {max(len(ids) for _, ids in prompts)} tokens"
    )
    for part in given.parts:
        {"exact": exact, "deployed": deployed, "clock": clock, "memory": memory}[part](
            exports, prompts, report
        )
    report.finish()


if __name__ == "__main__":
    main()
