"""A draft for a target that is only there over HTTP, from a real server, with every promise checked.

    python benchmarks/served_target.py --target MODEL_FOLDER --server http://127.0.0.1:8000/v1
    python benchmarks/served_target.py --target MODEL_FOLDER --vllm VENV/bin/vllm

Synthesizes from the server with a process that is killed again and again (and, with --vllm, a server that is killed as often),
aligns, and evaluates over the logged text, all with the weights away. Decides pass or fail by content: the rows equal those of an
undisturbed run, nothing is lost or doubled, greedy text is that of the weights, every logged log-prob is that of the weights
within float32 rounding, and the replay rows equal those that the weights give. With --vllm the server gets a copy of the model
whose attention heads are padded to a width that vLLM's CPU kernels have (the same function, exactly, but for rounding).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HEAD_DIM = 32
TIMED = ("mbsu_latency", "predicted_speedup")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", type=Path, required=True, help="the target's folder, weights included: they are the judge"
    )
    parser.add_argument("--server", help="address of a server that serves it already")
    parser.add_argument("--vllm", help="the vllm program: a server is started, and killed --kills times")
    parser.add_argument("--logprobs", default="processed", choices=["processed", "raw", "none"])
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    arguments = parser.parse_args()
    if bool(arguments.server) == bool(arguments.vllm):
        parser.error("give --server or --vllm")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = check(arguments, folder)
    print("\n".join(f"FAILED: {line}" for line in found) or "passed")
    sys.exit(bool(found))


def check(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Everything that is not as promised."""
    bare = folder / "bare"  # config and tokenizer only: all of the target that a served run has
    shutil.copytree(
        arguments.target, bare, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
    )
    with serving(arguments, folder) as (url, restart):
        recipe = write_recipe(folder, bare, url, arguments)
        started = time.monotonic()
        run(recipe, "undisturbed", "synthesize")
        print(f"undisturbed: {time.monotonic() - started:.0f} s")
        disturbed(recipe, folder, arguments.kills, restart)
        run(recipe, "disturbed", "align")
        run(recipe, "disturbed", "evaluate")
    found = compare_rows(folder)
    found += compare_with_weights(folder, arguments.target)
    return found + compare_replay(recipe, folder, bare, arguments)


def write_recipe(folder: Path, target: Path, url: str, arguments: argparse.Namespace) -> Path:
    openings = [
        "Once upon a time",
        "One day",
        "There was a",
        "The little",
        "Lily",
        "Tom and his dog",
        "A big tree",
        "In the park",
    ]
    things = [
        "red ball",
        "small cat",
        "old house",
        "happy bird",
        "kind girl",
        "tall boy",
        "green frog",
        "blue hat",
        "warm cake",
        "new toy",
    ]
    prompts = folder / "prompts.jsonl"
    texts = [
        f"{opening} {word} {thing}"
        for opening in openings
        for thing in things
        for word in ("saw a", "had a", "and the")
    ]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    logprobs = arguments.logprobs
    temperatures = [0.0, 1.0] if logprobs == "raw" else [0.0, 0.6, 1.0]
    source = {"kind": "jsonl", "name": "stories", "path": str(prompts), "chat": False}
    recipe = {
        "run": {"name": "undisturbed", "folder": str(folder / "runs"), "device": "cpu", "threads": 1},
        "target": {"model": str(target)},
        "design": {
            "draft": {
                "kind": "shape",
                "hidden_size": 32,
                "num_layers": 1,
                "intermediate_size": 64,
                "num_heads": 2,
            }
        },
        "synthesize": {
            "tokens": arguments.tokens,
            "temperatures": temperatures,
            "max_new_tokens": arguments.max_new_tokens,
            "batch_rows": 16,
            "prompts": [source],
            "engine": {
                "kind": "openai",
                "servers": [url],
                "logprobs": logprobs,
                "timeout": 120,
                "retries": 20,
            },
        },
        "align": {"epochs": 20, "pretraining_share": 0, "precision": "fp32"},
        "evaluate": {"texts": {"kind": "synthesize"}, "checkpoints": ["design", "align"]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def command(recipe: Path, name: str, stage: str, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "fastdraft", stage, str(recipe), f"run.name={name}", *overrides]


def run(recipe: Path, name: str, stage: str, *overrides: str) -> None:
    if stage == "synthesize" and not (recipe.parent / "runs" / name / "design" / "manifest.json").exists():
        subprocess.run(command(recipe, name, "design"), check=True)
    subprocess.run(command(recipe, name, stage, *overrides), check=True)


def disturbed(recipe: Path, folder: Path, kills: int, restart: Any) -> None:
    """Synthesizes while run and server are killed `kills` times each at different moments, then lets the run finish."""
    subprocess.run(command(recipe, "disturbed", "design"), check=True)
    units = folder / "runs" / "disturbed" / "synthesize" / "units"
    for kill in range(kills):
        process = subprocess.Popen(command(recipe, "disturbed", "synthesize", "--quiet"))
        if restart:
            wait_for_units(process, units, 1)
            time.sleep(0.1 * kill)  # in the middle of a unit
            restart()
            print(f"killed the server with {len(list(units.glob('unit-*')))} units written", flush=True)
        wait_for_units(process, units, 1 + kill)
        time.sleep(0.05 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed the run with {len(list(units.glob('unit-*')))} units written", flush=True)
    subprocess.run(command(recipe, "disturbed", "synthesize"), check=True)


def wait_for_units(process: subprocess.Popen[bytes], units: Path, more: int) -> None:
    """Returns when the run has written `more` units than now."""
    wanted = len(list(units.glob("unit-*"))) + more
    while process.poll() is None and len(list(units.glob("unit-*"))) < wanted:
        time.sleep(0.02)
    if process.poll() is not None:
        raise SystemExit("the run ended before it could be killed: raise --tokens")


def read_rows(folder: Path, name: str) -> list[Any]:
    from fastdraft.data.rows import read_all
    from fastdraft.run_folder import RunFolder

    return list(read_all(RunFolder(folder / "runs" / name).folder("synthesize")))


def compare_rows(folder: Path) -> list[str]:
    """The killed run's rows against the undisturbed run's, and both against their accounts."""
    found, whole, killed = [], read_rows(folder, "undisturbed"), read_rows(folder, "disturbed")
    for name, rows in (("undisturbed", whole), ("disturbed", killed)):
        account = json.loads(
            (folder / "runs" / name / "synthesize" / "manifest.json").read_text(encoding="utf-8")
        )
        if (
            account["written"] != len(rows)
            or account["asked"] != len(rows) + sum(account["filtered"].values()) + account["failed"]
        ):
            found.append(
                f"{name}: {len(rows)} rows, account {account['asked']} asked, {account['written']} written"
            )
        if len({row.row_id for row in rows}) != len(rows):
            found.append(f"{name}: rows are doubled")
    if [row.prompt_ids for row in whole] != [row.prompt_ids for row in killed]:
        found.append(f"prompts differ: {len(whole)} rows undisturbed, {len(killed)} killed")
    equal = sum(a.response_ids == b.response_ids for a, b in zip(whole, killed, strict=False))
    print(f"rows: {len(killed)}, of which {equal} equal token by token to the undisturbed run's")
    greedy = [(a, b) for a, b in zip(whole, killed, strict=False) if a.temperature == 0]
    if any(a.response_ids != b.response_ids for a, b in greedy):
        found.append("greedy rows differ between the two runs")
    return found


def compare_with_weights(folder: Path, target: Path) -> list[str]:
    """What was logged against what the weights say of it."""
    from fastdraft.decoding.scoring import score
    from fastdraft.functional.generation import Generation, Sampling
    from fastdraft.runtimes.huggingface import HuggingFaceEngine
    from fastdraft.target import Target

    opened = Target.at(target)
    model, rows, gaps, same = opened.model("cpu"), read_rows(folder, "disturbed"), [0.0], 0
    greedy = [row for row in rows if row.temperature == 0]
    limit = max(len(row.response_ids) for row in rows)
    own = HuggingFaceEngine(model, opened.vocabulary).generate(
        [row.prompt_ids for row in greedy], Sampling(0.0), limit, 0
    )
    for row, generation in zip(greedy, own, strict=True):  # loops are cut off in rows
        same += generation.response_ids[: len(row.response_ids)] == row.response_ids
    for row in rows:
        if row.temperature > 0 and row.logprobs:
            sampling = Sampling(row.temperature, row.top_k, row.top_p)
            scored = score(
                model, [Generation(row.prompt_ids, row.response_ids, row.logprobs, "length")], sampling
            )[0]
            gaps += [abs(a - b) for a, b in zip(row.logprobs, scored.logprobs, strict=True)]
    print(f"greedy rows that are the weights' own text: {same} of {len(greedy)}")
    print(
        f"largest difference of a logged log-prob from the weights': {max(gaps):.2g} nats over {len(gaps) - 1} tokens"
    )
    return ([] if same >= 0.98 * len(greedy) else ["greedy text is not the weights'"]) + (
        [] if max(gaps) < 1e-3 else ["log-probs differ"]
    )


def compare_replay(recipe: Path, folder: Path, bare: Path, arguments: argparse.Namespace) -> list[str]:
    """Replay rows with the weights away, which stand already, against those with log-probs of the weights."""
    place = folder / "runs" / "disturbed" / "evaluate" / "results.json"
    away = json.loads(place.read_text(encoding="utf-8"))["rows"]
    for path in arguments.target.glob("*.safetensors"):
        shutil.copy(path, bare)
    run(recipe, "disturbed", "evaluate", "evaluate.texts.logprobs=target", "--redo=evaluate")
    here = [
        row
        for row in json.loads(place.read_text(encoding="utf-8"))["rows"]
        if row["temperature"] == 0 or arguments.logprobs != "none"
    ]
    if len(away) != len(here):
        return [f"{len(away)} replay rows without weights, {len(here)} with them"]
    worst, found = 0.0, []
    for a, b in zip(away, here, strict=True):
        for key, value in a.items():
            other = b[key]
            if key in TIMED or not isinstance(value, float):
                if (
                    key not in TIMED
                    and isinstance(value, str | int)
                    and value != other
                    and not isinstance(other, float)
                ):
                    found.append(f"{a['task']} at {a['temperature']}: {key} {value} and {other}")
                continue
            gap = abs(value - other)
            worst = max(worst, gap / max(1.0, abs(value)))
            if a["temperature"] == 0 and gap:
                found.append(f"greedy {key}: {value} and {other}")
    print(f"replay rows: {len(away)}; greedy ones equal, sampled ones within {worst:.2g}")
    shown = [r for r in away if r["num_speculative_tokens"] == 3]
    for row in shown:
        setting = f"{row['checkpoint']:8} T {row['temperature']:g} K 3"
        print(f"  {setting}: acceptance rate {row['acceptance_rate']:.3f}, {row['num_prompts']} texts")
    near = worst < 1e-3 and math.isfinite(worst)
    return found if near else [*found, f"sampled replay rows differ by {worst:.2g}"]


@contextlib.contextmanager
def serving(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Any]]:
    """The server's address, and how to kill and start it again (None for a server that somebody else runs)."""
    if arguments.server:
        yield arguments.server, None
        return
    wide, port = folder / "wide", 8023
    widen_heads(arguments.target, wide)
    process = [start_vllm(arguments.vllm, wide, port, folder)]

    def restart() -> None:
        stop(process[0])
        process[0] = start_vllm(arguments.vllm, wide, port, folder, wait=False)

    try:
        yield f"http://127.0.0.1:{port}/v1", restart
    finally:
        stop(process[0])


def start_vllm(
    program: str, model: Path, port: int, folder: Path, wait: bool = True
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    environment.pop("PYTHONPATH", None)
    options = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--served-model-name",
        "target",
        "--enforce-eager",
    ]
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(
            [
                program,
                "serve",
                str(model),
                *options,
                "--logprobs-mode",
                "processed_logprobs",
                "--max-num-seqs",
                "16",
            ],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    for _ in range(1800 if wait else 0):
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2),
        ):
            return process
        if process.poll() is not None:
            raise SystemExit(f"the server did not start: see {folder / 'server.log'}")
        time.sleep(0.5)
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and the processes that it started, all of one process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def widen_heads(source: Path, goal: Path) -> None:
    """A Llama with the same function whose heads are HEAD_DIM wide: zeros between the old entries, at the places of equal rotation."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, goal, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    width, hidden = (
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        config["hidden_size"],
    )
    tensors, step = load_file(source / "model.safetensors"), max(1, HEAD_DIM // width)
    half = torch.arange(width // 2) * step
    places, new = torch.cat([half, half + width * step // 2]), width * step
    for name, weight in tensors.items():
        heads = config[
            "num_attention_heads" if "q_proj" in name or "o_proj" in name else "num_key_value_heads"
        ]
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            wider = torch.zeros(heads, new, hidden, dtype=weight.dtype)
            # The kernel divides by the root of the new width.
            wider[:, places] = weight.view(heads, width, hidden) * (
                math.sqrt(step) if "q_proj" in name else 1.0
            )
            tensors[name] = wider.reshape(heads * new, hidden)
        elif name.endswith("o_proj.weight"):
            wider = torch.zeros(hidden, heads, new, dtype=weight.dtype)
            wider[:, :, places] = weight.view(hidden, heads, width)
            tensors[name] = wider.reshape(hidden, heads * new)
    save_file(tensors, goal / "model.safetensors", metadata={"format": "pt"})
    (goal / "config.json").write_text(json.dumps({**config, "head_dim": new}), encoding="utf-8")


if __name__ == "__main__":
    main()
