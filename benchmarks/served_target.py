"""A draft for a target that is only there over HTTP, from a real server, with every promise checked.

    python benchmarks/served_target.py --target MODEL_FOLDER --server http://127.0.0.1:8000/v1 --restart
    ./restart.sh

Synthesizes from the server with a process that is killed again and again (and, with --restart, a server that
this command kills and starts again as often), aligns, and evaluates over the logged text, all with the
weights away. Decides pass or fail by content: the rows equal those of an undisturbed run, nothing is lost or
doubled, greedy text is that of the weights, every logged log-prob is that of the weights within float32
rounding, and the replay rows equal those that the weights give.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from fastdraft.data.rows import SyntheticRow, read_all
from fastdraft.decoding.scoring import score
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.run_folder import RunFolder, StageFolder, read_json
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.target import Target

CLOCKED = ("mbsu_latency", "predicted_speedup")
OPENINGS = ("Once upon a time", "One day", "There was a", "The little", "Lily", "A big tree", "In the park")
VERBS = ("saw a", "had a", "and the")
THINGS = ("red ball", "small cat", "old house", "happy bird", "kind girl", "green frog", "warm cake")


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--target", type=Path, required=True, help="its folder, weights included: they are the judge")
    add("--server", required=True, help="address of a server that serves it")
    add("--restart", help="shell command that kills the server and starts it again")
    add("--logprobs", default="processed", choices=["processed", "raw", "none"])
    add("--tokens", type=int, default=30_000)
    add("--max-new-tokens", type=int, default=96)
    add("--kills", type=int, default=3)
    add("--folder", type=Path, help="keep the runs here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = Check(given, (given.folder or Path(scratch)).resolve()).run()
    print("\n".join(f"FAILED: {line}" for line in found) or "passed")
    sys.exit(bool(found))


class Check:
    """The runs `whole` and `killed` of one recipe in one folder."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder, self.bare = given, folder, folder / "bare"
        # Config and tokenizer only: all of the target that a served run has.
        away = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(given.target, self.bare, ignore=away, dirs_exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe()), encoding="utf-8")

    def run(self) -> list[str]:
        """Everything that is not as promised."""
        for stage in ("design", "synthesize"):
            self.stage("whole", stage)
        self.stage("killed", "design")
        self.synthesize_and_be_killed()
        for stage in ("synthesize", "align", "evaluate"):
            self.stage("killed", stage)
        return [*self.compare_rows(), *self.compare_with_weights(), *self.compare_replay()]

    def recipe(self) -> dict[str, Any]:
        """Prompts that a teller of stories can go on with, and a tiny draft."""
        given, prompts = self.given, self.folder / "prompts.jsonl"
        texts = (" ".join(words) for words in itertools.product(OPENINGS, VERBS, THINGS))
        lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
        prompts.write_text("".join(lines), encoding="utf-8")
        source = {"kind": "jsonl", "name": "stories", "path": str(prompts), "chat": False}
        engine = {"kind": "openai", "servers": [given.server], "logprobs": given.logprobs}
        sizes = {"hidden_size": 32, "num_layers": 1, "intermediate_size": 64, "num_heads": 2}
        synthesize = {"tokens": given.tokens, "max_new_tokens": given.max_new_tokens, "batch_rows": 16}
        synthesize |= {"temperatures": [0.0, 1.0] if given.logprobs == "raw" else [0.0, 0.6, 1.0]}
        synthesize |= {"prompts": [source], "engine": {**engine, "timeout": 120, "retries": 20}}
        run = {"name": "whole", "folder": str(self.folder / "runs"), "device": "cpu", "threads": 1}
        return {
            "run": {**run, "precision": "fp32"},
            "target": {"model": str(self.bare)},
            "design": {"draft": {"kind": "shape", **sizes}},
            "synthesize": synthesize,
            "align": {"tokens": 10 * given.tokens, "pretraining_share": 0},
            "evaluate": {"texts": {"kind": "synthesize"}, "checkpoints": ["design", "align"]},
        }

    def command(self, name: str, stage: str, *more: str) -> list[str]:
        program = [sys.executable, "-m", "fastdraft", stage, str(self.folder / "recipe.yaml")]
        return [*program, f"run.name={name}", *more]

    def stage(self, name: str, stage: str, *more: str) -> None:
        subprocess.run(self.command(name, stage, *more), check=True)

    def result(self, name: str, stage: str) -> StageFolder:
        return RunFolder(self.folder / "runs" / name).folder(stage)

    def rows(self, name: str) -> list[SyntheticRow]:
        return list(read_all(self.result(name, "synthesize")))

    def synthesize_and_be_killed(self) -> None:
        """Kills run and server `kills` times each, at different moments."""
        units = self.result("killed", "synthesize").path / "units"
        for kill in range(self.given.kills):
            process = subprocess.Popen(self.command("killed", "synthesize", "--quiet"))
            wanted = len(list(units.glob("unit-*"))) + 1 + kill
            if self.given.restart:
                time.sleep(1 + kill)
                subprocess.run(self.given.restart, shell=True, check=True)
            while process.poll() is None and len(list(units.glob("unit-*"))) < wanted:
                time.sleep(0.02)
            if process.poll() is not None:
                raise SystemExit("the run ended before it could be killed: raise --tokens")
            time.sleep(0.05 * kill)  # in the middle of a unit
            process.kill()
            process.wait()
            print(f"killed with {len(list(units.glob('unit-*')))} units written", flush=True)

    def compare_rows(self) -> list[str]:
        """The killed run's rows against the whole run's, and both against their accounts."""
        found, whole, killed = [], self.rows("whole"), self.rows("killed")
        for name, rows in (("whole", whole), ("killed", killed)):
            account = self.result(name, "synthesize").manifest()
            asked, written = account["asked"], account["written"]
            lost = asked - written - sum(account["filtered"].values()) - account["failed"]
            if lost or written != len(rows) or len({row.row_id for row in rows}) != len(rows):
                found.append(f"{name}: {asked} asked, {written} written, {len(rows)} rows: lost or doubled")
        if [row.prompt_ids for row in whole] != [row.prompt_ids for row in killed]:
            found.append(f"prompts differ: {len(whole)} rows of the whole run, {len(killed)} of the killed")
        pairs = list(zip(whole, killed, strict=False))
        equal = sum(a.response_ids == b.response_ids for a, b in pairs)
        print(f"rows: {len(killed)}, of which {equal} equal token by token to the whole run's")
        if any(a.temperature == 0 and a.response_ids != b.response_ids for a, b in pairs):
            found.append("greedy rows differ between the two runs")
        return found

    def compare_with_weights(self) -> list[str]:
        """What was logged against what the weights say of it."""
        target, rows = Target.at(self.given.target), self.rows("killed")
        model, greedy = target.model("cpu"), [row for row in rows if row.temperature == 0]
        engine, limit = (
            HuggingFaceEngine(model, target.vocabulary),
            max(len(row.response_ids) for row in rows),
        )
        own = engine.generate([row.prompt_ids for row in greedy], Sampling(0.0), limit, 0)
        same = sum(  # loops are cut off in rows
            text.response_ids[: len(row.response_ids)] == row.response_ids
            for row, text in zip(greedy, own, strict=True)
        )
        gaps = [0.0]
        for row in (row for row in rows if row.temperature > 0 and row.logprobs):
            text = Generation(row.prompt_ids, row.response_ids, row.logprobs, "length")
            scored = score(model, [text], Sampling(row.temperature, row.top_k, row.top_p))[0]
            gaps += [abs(a - b) for a, b in zip(row.logprobs, scored.logprobs, strict=True)]
        print(f"greedy rows that are the weights' own text: {same} of {len(greedy)}")
        print(f"log-probs differ from the weights' by up to {max(gaps):.2g} over {len(gaps) - 1} tokens")
        found = [] if same >= 0.98 * len(greedy) else ["greedy text is not the weights'"]
        return found if max(gaps) < 1e-3 else [*found, "log-probs differ"]

    def compare_replay(self) -> list[str]:
        """Replay rows with the weights away, which stand, against those with log-probs of the weights."""
        path = self.result("killed", "evaluate").path / "results.json"
        away = read_json(path)["rows"]
        for weights in self.given.target.glob("*.safetensors"):
            shutil.copy(weights, self.bare)
        self.stage("killed", "evaluate", "evaluate.texts.logprobs=target", "--redo=evaluate")
        here = read_json(path)["rows"]
        if self.given.logprobs == "none":
            here = [row for row in here if row["temperature"] == 0]
        if len(away) != len(here):
            return [f"{len(away)} replay rows without weights, {len(here)} with them"]
        worst, found = 0.0, []
        for a, b in zip(away, here, strict=True):
            for key, value in a.items():
                if (
                    key in CLOCKED
                    or not isinstance(value, int | float)
                    or not isinstance(b[key], int | float)
                ):
                    continue
                gap = abs(value - b[key]) / max(1.0, abs(value))
                worst = max(worst, gap)
                if gap and a["temperature"] == 0:
                    found.append(f"greedy {key}: {value} and {b[key]}")
        print(f"replay rows: {len(away)}; greedy ones equal, sampled ones within {worst:.2g}")
        return found if worst < 1e-3 else [*found, f"sampled replay rows differ by {worst:.2g}"]


if __name__ == "__main__":
    main()
