"""What serves a real target best: itself alone, lookup, a small sibling, or a draft of one's own? One table.

    python benchmarks/real_models.py --openvino TARGET sibling=SIBLING ours=DRAFT \\
        --llamacpp TARGET.gguf sibling=SIBLING.gguf ours=DRAFT.gguf --threads 2 --output real_models.json

Folders of exports (`fastdraft export MODEL --format openvino`) and GGUF files of one target. Greedy; of each
prompt all contenders write an answer in turn, another first each time, and the tasks take turns too. A cell has
tokens per pass of the target (the prompt's pass aside), seconds of all answers, and seconds per token alone over
seconds per token so. Tasks: HumanEval, instructions, a summary, code to rewrite (rewrite_task.py), the last three
in the chat template.

The same command goes on where it was cut off: finished answers stand in the output.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import rewrite_task
from machine import Report, options, table

from fastdraft.console import Console
from fastdraft.data.chat import ChatTemplate
from fastdraft.evaluation.tasks import encode_task
from fastdraft.functional.generation import Sampling
from fastdraft.recipe.evaluation import FileTask, ShippedTask
from fastdraft.runtimes.llama_cpp_process import ServerSettings
from fastdraft.runtimes.llama_cpp_server import LlamaServer
from fastdraft.runtimes.openvino_speculative import OpenVINOPair, OpenVINOSettings
from fastdraft.runtimes.runtime import Proposer
from fastdraft.target import Target

GREEDY = Sampling(0.0)
KEYS = ("runtime", "task", "prompt", "contender")
# A prompt and most new tokens -> ids, seconds, seconds to the first token, passes of the target behind that.
Written = tuple[list[int], float, float, int]
Writer = Callable[[list[int], int], Written]


def openvino_writer(target: str, draft: str, proposer: Proposer | None, given: argparse.Namespace) -> Writer:
    eos = Target.at(target).vocabulary.eos_token_ids
    pair = OpenVINOPair(Path(target), Path(draft), OpenVINOSettings(threads=given.threads, eos_ids=eos))

    def write(prompt: list[int], tokens: int) -> Written:
        [text] = pair.write([prompt], GREEDY, tokens, 0, proposer)
        ids = list(map(int, text.response_ids))
        return ids, text.seconds, text.first_token_seconds, len(text.rounds) if proposer else len(ids) - 1

    return write


def llamacpp_writer(target: str, draft: str, proposer: Proposer | None, given: argparse.Namespace) -> Writer:
    kind, k = (proposer.kind, proposer.num_speculative_tokens) if proposer else ("", 0)
    own = draft if kind.endswith("draft") else ""
    server = LlamaServer(
        ServerSettings(target, own, k, kind.startswith("lookup"), given.room, threads=given.threads)
    )

    def write(prompt: list[int], tokens: int) -> Written:
        answer = server.complete(prompt, GREEDY, tokens, 0)
        passes = max(0, len(answer.ids) - 1 - answer.num_accepted)
        return answer.ids, answer.seconds, answer.first_token_seconds, passes

    return write


def contenders(
    runtime: str, named: Sequence[str], given: argparse.Namespace
) -> dict[str, Callable[[], Writer]]:
    """By name what opens each, once: models are loaded only where an answer is missing."""
    target, *drafts = named
    make = {"openvino": openvino_writer, "llamacpp": llamacpp_writer}[runtime]
    pairs = [draft.partition("=")[::2] for draft in drafts]
    any_draft, k = pairs[0][1] if pairs else target, given.k
    asked: dict[str, tuple[str, Proposer | None]] = {"alone": (any_draft, None)}
    asked |= {"lookup": (any_draft, Proposer("lookup", k))}
    asked |= {name: (path, Proposer("draft", k)) for name, path in pairs}
    if runtime == "llamacpp":  # OpenVINO has no such mode
        asked |= {f"lookup, else {name}": (path, Proposer("lookup_draft", k)) for name, path in pairs}
    return {
        name: cache(partial(make, target, path, proposer, given)) for name, (path, proposer) in asked.items()
    }


def read_tasks(
    target: Target, given: argparse.Namespace
) -> Iterator[tuple[str, list[tuple[str, list[int]]]]]:
    """Names and ids of every task's prompts."""
    limits = {"prompts": given.prompts, "max_new_tokens": given.max_new_tokens}
    tasks: list[Any] = [
        ShippedTask.model_validate({"kind": kind, **limits})
        for kind in ("code", "instructions", "summarization")
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rewrite.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rewrite_task.prompts()), encoding="utf-8")
        tasks.append(FileTask(kind="file", path=str(path), chat=True, **limits))
        for task in tasks:
            found = encode_task(task, ChatTemplate(target.tokenizer), given.room, Console(quiet=True))
            yield task.name, list(zip(found.prompt_names, found.prompt_ids, strict=True))


def measure(
    report: Report, tasks: Any, runtime: str, writers: dict[str, Callable[[], Writer]], tokens: int
) -> None:
    """Every answer that the report has not yet; a contender's first answer in a process is a warm-up."""
    done, warm, names = {tuple(one[key] for key in KEYS) for one in report.results}, set[str](), list(writers)
    rounds = zip_longest(*([(task, *prompt) for prompt in prompts] for task, prompts in tasks))
    asked = [each for one_of_each_task in rounds for each in one_of_each_task if each]
    for number, (task, prompt_name, prompt) in enumerate(asked):
        first = (number + number // len(tasks)) % len(names)  # another for each task too
        for name in names[first:] + names[:first]:
            place = runtime, task, prompt_name, name
            if place in done:
                continue
            if name not in warm:
                writers[name]()(prompt, 8)
                warm.add(name)
            ids, seconds, first_seconds, passes = writers[name]()(prompt, tokens)
            one = {"prompt_tokens": len(prompt), "passes": passes, "ids": ids}
            one |= {"seconds": round(seconds, 4), "first_token_seconds": round(first_seconds, 4)}
            report.add({**dict(zip(KEYS, place, strict=True)), **one})
        print(f"{runtime}: {number + 1} of {len(asked)} prompts", flush=True)


def show(results: Sequence[dict[str, Any]]) -> str:
    """Contenders by task."""
    tasks = [*dict.fromkeys(one["task"] for one in results), "all"]

    def cell(runtime: str, contender: str, task: str) -> str:
        def of(who: str) -> list[dict[str, Any]]:
            same = (one for one in results if (one["runtime"], one["contender"]) == (runtime, who))
            return [one for one in same if task in ("all", one["task"])]

        def pace(found: list[dict[str, Any]]) -> float:
            return sum(one["seconds"] for one in found) / max(1, sum(len(one["ids"]) for one in found))

        found = of(contender)
        if not found:
            return "-"
        per_pass = sum(len(one["ids"]) - 1 for one in found) / max(1, sum(one["passes"] for one in found))
        gain = pace(of("alone")) / pace(found)
        return f"{per_pass:.2f}  {sum(one['seconds'] for one in found):.1f} s  {gain:.2f}x"

    rows = dict.fromkeys((one["runtime"], one["contender"]) for one in results)
    lines = [
        [f"{runtime}: {name}", *(cell(runtime, name, task) for task in tasks)]
        for runtime, name in sorted(rows)
    ]
    return table(["tokens per pass, seconds, gain", *tasks], lines)


def main() -> None:
    parser = options(__doc__, "real_models", device=False)
    add = parser.add_argument
    add("--openvino", nargs="+", default=[], metavar=("TARGET", "NAME=DRAFT"), help="folders of exports")
    add("--llamacpp", nargs="+", default=[], metavar=("TARGET", "NAME=DRAFT"), help="GGUF files")
    add("--prompts", type=int, default=4, help="of each task")
    add("--max-new-tokens", type=int, default=64)
    add("--num-speculative-tokens", dest="k", type=int, default=3)
    add("--room", type=int, default=1024, help="tokens of a prompt and its answer")
    given = parser.parse_args()
    if given.dry_run:
        given.prompts, given.max_new_tokens = 1, 8
    before = json.loads(given.output.read_text(encoding="utf-8")) if given.output.is_file() else {}
    report = Report(given.output, "real_models", "cpu", given)
    if before.get("settings") == report.content["settings"]:
        report.add(*before["results"])
    models = {"openvino": given.openvino, "llamacpp": given.llamacpp}
    target = Target.at((given.llamacpp or given.openvino)[0])
    tasks = list(read_tasks(target, given))
    for runtime in (name for name, named in models.items() if named):
        writers = contenders(runtime, models[runtime], given)
        measure(report, tasks, runtime, writers, given.max_new_tokens)
        del writers  # ends the servers, and the memory of its models
    report.finish()
    print(show(report.results))


if __name__ == "__main__":
    main()
