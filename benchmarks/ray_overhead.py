"""What it costs to let Ray carry the work: synthesize and prepare by one worker of Ray beside the same in one process.

    python benchmarks/ray_overhead.py --threads 1
    python benchmarks/ray_overhead.py --parts memory --megabytes 50 500

Both take turns; workers are started and have loaded their model before the clock runs. A quotient divides the tokens
a second through Ray by those of one process, within a turn. Memory: the most that a worker held of its own
(anonymous pages; what it hands over lies in Ray's store), and whether the same duplicates were found as in one
process: the text is cut into ten files, and a tenth of each is repeated in the next.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import psutil
from machine import Report, options, ratio, take_turns, tell
from prepare_throughput import write_corpus

from fastdraft import pipeline
from fastdraft.console import Console
from fastdraft.data.pack import CorpusPacker, TextReader
from fastdraft.data.readers import field_values
from fastdraft.data.shards import RowForm
from fastdraft.data.synthesis_plan import Planner, unit_seed
from fastdraft.recipe.prepare import PrepareConfig, RowsSource
from fastdraft.recipe.recipe import load_recipe
from fastdraft.runtimes.engines import choose_engine
from fastdraft.stages import prepare, synthesize
from fastdraft.stages.context import StageContext
from fastdraft.workers import Job, Workers


def main() -> None:
    parser = options(__doc__, "ray_overhead", device=False)
    add = parser.add_argument
    add("--parts", nargs="+", choices=["synthesize", "prepare", "memory"], default=["synthesize", "prepare"])
    add("--megabytes", nargs="+", type=float, default=[20], help="of text for prepare; memory at all of them")
    add("--units", type=int, default=6, help="units of a turn of synthesize")
    add("--turns", type=int, default=5)
    given = parser.parse_args()
    if given.dry_run:
        given.megabytes, given.units, given.turns = [1.0], 1, 1
    report = Report(given.output, "ray_overhead", "cpu", given)
    with tempfile.TemporaryDirectory() as folder:
        for part in given.parts:
            for result in PARTS[part](Path(folder), given):
                report.add({"part": part, **result})
    report.finish()


def context_of(folder: Path, given: argparse.Namespace, ray: bool) -> StageContext:
    own = [f"run.folder={folder}", f"run.threads={given.threads}", "run.device=cpu", "run.name=overhead"]
    own += [
        "synthesize.engine={kind: huggingface}",
        "synthesize.batch_rows=16",
        "synthesize.max_new_tokens=64",
    ]
    own += ["run.cluster={address: local, workers: 1}"] if ray else []
    return pipeline.make_context(load_recipe("starter", own), Console(quiet=True))


def written(folder: Path, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Units of the starter's prompts, answered by its target."""
    contexts = {name: context_of(folder, given, name == "ray") for name in ("one", "ray")}
    config = contexts["one"].section("synthesize")
    target, tokens = contexts["one"].target, dict[str, int]()
    choice = choose_engine(config.engine, target, "cpu", contexts["one"].folder("synthesize"))
    asked = config.model_copy(update={"prompts": [p for p in config.prompts if p.kind == "jsonl"]})
    (plan,) = Planner(asked, contexts["one"].chat, target.vocabulary, (), 0, lambda: None).plans()  # type: ignore[arg-type,return-value]

    def job(number: int) -> Job:
        return Job(number, "write", lambda: (plan.unit(number), unit_seed(0, plan.name, number)))

    def take(name: str, workers: Workers) -> None:
        every = [job(number) for number in range(given.units)]
        answers = [workers.take(one, every[place:]) for place, one in enumerate(every)]
        tokens[name] = sum(len(answer.response_ids) for unit in answers for answer, _ in unit.keyed)

    makes = {
        name: partial(synthesize._open_writer, asked, choice, (), context.run.date, context)
        for name, context in contexts.items()
    }
    with (
        contexts["one"].workers("synthesize", makes["one"], "device") as one,
        contexts["ray"].workers("synthesize", makes["ray"], "device") as by_ray,
    ):
        works = {"one": partial(take, "one", one), "ray": partial(take, "ray", by_ray)}
        for workers in (one, by_ray):
            workers.open()
        for work in works.values():
            work()
        seconds = take_turns(works, given.turns)
    assert tokens["one"] == tokens["ray"]
    yield told("synthesize", tokens["one"], seconds)


def told(name: str, tokens: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    found = ratio(seconds["one"], seconds["ray"])
    rates = {each: round(tokens / min(taken)) for each, taken in seconds.items()}
    print(f"{name}: {tell(found)} of one process; tokens/s at best {rates}", flush=True)
    return {"tokens": tokens, "seconds": seconds, "quotient": found}


def packed(corpus: Path, context: StageContext, workers: Workers) -> dict[str, Any]:
    """The whole of prepare but its manifest."""
    folder, config = context.folder("prepare"), PrepareConfig(corpora=[source_of(corpus)])
    encoder, form = prepare._open_encoder(context), RowForm(config.row_length, 0, "uint16", 64_000_000, 0.005)
    shutil.rmtree(folder.path, ignore_errors=True)
    packer = CorpusPacker("text", folder.path, form, encoder, 0)
    return packer.run(config.sources["text"], workers, context.console, lambda tokens: None)


def source_of(corpus: Path) -> RowsSource:
    return RowsSource(name="text", kind="jsonl", path=str(corpus))


def prepared(folder: Path, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    corpus, results = cut(write_corpus(folder, given.megabytes[0], None)), dict[str, Any]()
    contexts = {name: context_of(folder / name, given, name == "ray") for name in ("one", "ray")}

    def pack(name: str, workers: Workers) -> None:
        results[name] = packed(corpus, contexts[name], workers)

    with reading(contexts["one"]) as one, reading(contexts["ray"]) as by_ray:
        works = {"one": partial(pack, "one", one), "ray": partial(pack, "ray", by_ray)}
        for work in works.values():
            work()
        seconds = take_turns(works, given.turns)
    assert results["one"] == results["ray"]
    yield told("prepare", results["one"]["sources"][0]["tokens"], seconds)


def measured(folder: Path, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for megabytes in given.megabytes:
        corpus = cut(write_corpus(folder, megabytes, None))
        contexts = {name: context_of(folder / name, given, name == "ray") for name in ("one", "ray")}
        with reading(contexts["one"]) as workers:
            alone = packed(corpus, contexts["one"], workers)
        with reading(contexts["ray"]) as workers, Peak() as peak:
            by_ray = packed(corpus, contexts["ray"], workers)
        equal = alone == by_ray
        print(
            f"{megabytes:g} MB: a worker held {peak.mib:.0f} MiB; {by_ray['duplicates']} duplicates, {equal=}"
        )
        yield {
            "megabytes": megabytes,
            "worker_mib": round(peak.mib),
            "duplicates": by_ray["duplicates"],
            "equal": equal,
        }


@contextmanager
def reading(context: StageContext) -> Iterator[Workers]:
    make = partial(TextReader, partial(prepare._open_encoder, context))
    with context.workers("prepare", make, "cpu") as workers:
        workers.open()
        yield workers


def cut(corpus: Path, files: int = 10) -> Path:
    """A folder of files, each of which begins with a tenth of the one before it."""
    folder = corpus.with_suffix("")
    folder.mkdir(exist_ok=True)
    texts = [text for _, _, text in field_values(corpus, "text")]
    size = -(-len(texts) // files)
    for number in range(files):
        own = texts[max(0, number * size - size // 10) : (number + 1) * size]
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in own]
        (folder / f"{number}.jsonl").write_text("".join(lines), encoding="utf-8", errors="replace")
    return folder


class Peak:
    """The most anonymous memory that one of Ray's workers had inside the block."""

    mib = 0.0

    def __enter__(self) -> Peak:
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.follow, daemon=True)
        self.thread.start()
        return self

    def follow(self) -> None:
        while not self.ended.wait(0.2):
            for process in psutil.process_iter(["cmdline"]):
                if (process.info["cmdline"] or [""])[0].startswith("ray::RayWorker"):
                    status = Path(f"/proc/{process.pid}/status")
                    lines = status.read_text().splitlines() if status.exists() else []
                    held = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
                    self.mib = max([self.mib, *(kib / 1024 for kib in held)])

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


PARTS = {"synthesize": written, "prepare": prepared, "memory": measured}

if __name__ == "__main__":
    main()
