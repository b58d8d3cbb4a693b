"""Every benchmark for a GPU, one after the other, by one command, on a bare machine.

    python benchmarks/on_a_gpu.py
    python benchmarks/on_a_gpu.py --only train_step_150m loss_functions --minutes 5

Each script is a process of its own, gets --minutes and writes its figures as they come, so one that is cut
off leaves what it has, and one failure does not end the others. Results: --folder (benchmarks/results) /
NAME_DEVICE.json, beside `on_a_gpu_DEVICE.json`: what ran, how long, how it ended. --dry-run runs all of them
on tiny shapes on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

import torch
from machine import ROOT, Report, describe_machine, options, table

HERE = Path(__file__).resolve().parent
# Ours first: what is cut off is missed least.
CONTENDERS = "--contender ours ours_compiled ours_masked plain_bf16 plain_compiled trainer --turns 3"
JOBS = {  # what the project's goals ask for comes first
    "train_step_150m": f"train_step --shape llama-3.1-8b-150m {CONTENDERS}",
    "train_step_50m": f"train_step --shape phi-3-mini-50m {CONTENDERS}",
    "train_step_follow": "train_step --follow",
    "step_memory": "step_memory",
    "loss_functions": "loss_functions --distillation",
    "loss_functions_fp32": "loss_functions --precision fp32 --turns 3",
    "decoder_against_assisted": "decoder_against_assisted",
    "decoder_against_assisted_bf16": "decoder_against_assisted --dtype bf16",
    "replay_against_exact": "replay_against_exact",  # needs the package: pyarrow
    "vllm_pair": "vllm_pair",  # needs the package and vLLM; without vLLM it says so and ends
}


def run(name: str, given: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Runs one benchmark to its end or its limit; how it went."""
    script, *chosen = JOBS[name].split()
    where = ["--dry-run"] if given.dry_run else ["--device", given.device, *chosen]
    command = [sys.executable, str(HERE / f"{script}.py"), *where, "--output", str(output)]
    output.unlink(missing_ok=True)  # what stands afterwards is of this run
    print(f"\n== {name}: python benchmarks/{script}.py {' '.join(where)}", flush=True)
    start = time.monotonic()
    # A session of its own, so that a script that is cut off takes the processes that it started with it.
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=os.name == "posix")
    try:
        code: int | str = process.wait(timeout=60 * given.minutes)
    except subprocess.TimeoutExpired:
        code = "cut off"
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
            process.wait()
    found = {"name": name, "options": chosen, "exit": code, "seconds": round(time.monotonic() - start, 1)}
    return {**found, "file": output.name if output.exists() else None}


def main() -> int:
    parser = options(__doc__, "on_a_gpu")
    parser.set_defaults(device="cuda")
    parser.add_argument("--folder", type=Path, default=HERE / "results", help="of the result files")
    parser.add_argument("--minutes", type=float, default=9.5, help="for each script")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS), help="these alone")
    given = parser.parse_args()
    device, names = "dry_run", given.only
    if given.dry_run:
        given.device = "cpu"
        # Without options, so each script runs once.
        names = list({JOBS[name].split()[0]: name for name in reversed(names)}.values())[::-1]
    else:
        if given.device != "cpu" and not torch.accelerator.is_available():
            parser.error(
                f"torch {torch.__version__} sees no accelerator here; --dry-run shows that it all runs"
            )
        device = re.sub(r"\W+", "_", describe_machine(given.device)["device"]).strip("_").lower()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a script under way is ended too
    folder = given.folder.resolve()
    report = Report(folder / f"on_a_gpu_{device}.json", "on_a_gpu", given.device, given)
    for name in names:
        report.add(run(name, given, folder / f"{name}_{device}.json"))
    report.finish()
    columns = ["name", "exit", "seconds", "file"]
    print("\n" + table(columns, [[one[name] for name in columns] for one in report.results]))
    return int(any(one["exit"] != 0 for one in report.results))


if __name__ == "__main__":
    sys.exit(main())
