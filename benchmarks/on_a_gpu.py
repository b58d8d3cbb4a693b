"""Every benchmark for a GPU, one after the other, by one command, on a bare machine.

    python benchmarks/on_a_gpu.py
    python benchmarks/on_a_gpu.py --only train_step_150m loss_functions --minutes 5

Needs torch, triton and transformers, Python 3.12 or 3.11, and a checkout: nothing is installed, nothing is downloaded. Each script gets
--minutes of its own and writes its figures as they come, so one that is cut off leaves what it has. The results are gathered in
--folder (default benchmarks/results) as NAME_DEVICE.json, with the device's name in it, beside `on_a_gpu_DEVICE.json`: what ran, how long,
how it ended. The same command with --dry-run runs all of them on tiny shapes on the CPU, in a minute or two.

Decides the order (what the project's goals ask for comes first) and the options on a GPU; that every script is a process of its own, so
that no memory is left behind; that one failure does not end the others; and that scripts which this checkout lacks are skipped.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

import torch
from machine import ROOT, Report, describe_machine, table

NAME, HERE = "on_a_gpu", Path(__file__).resolve().parent


@dataclass(frozen=True)
class Job:
    """One benchmark and its options on a GPU."""

    script: str
    options: tuple[str, ...] = ()
    label: str = ""
    """Of the result, where one script runs twice."""

    @property
    def name(self) -> str:
        return self.label or self.script

    @property
    def path(self) -> Path:
        return HERE / f"{self.script}.py"


_NAMES = ("ours", "ours_compiled", "ours_masked", "plain_bf16", "plain_compiled", "trainer")
CONTENDERS = ("--contender", *_NAMES, "--turns", "3")
"""Ours first: what is cut off is missed least."""
JOBS = (
    Job("train_step", ("--shape", "llama-3.1-8b-150m", *CONTENDERS), "train_step_150m"),
    Job("train_step", ("--shape", "phi-3-mini-50m", *CONTENDERS), "train_step_50m"),
    Job("train_step", ("--follow",), "train_step_follow"),
    Job("step_memory"),
    Job("loss_functions", ("--distillation",)),
    Job("loss_functions", ("--precision", "fp32", "--turns", "3"), "loss_functions_fp32"),
    Job("decoder_against_assisted"),
    Job("decoder_against_assisted", ("--dtype", "bf16"), "decoder_against_assisted_bf16"),
    Job("replay_against_exact"),
)


def run(job: Job, arguments: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Runs one benchmark to its end or its limit; how it went."""
    where = ["--dry-run"] if arguments.dry_run else ["--device", arguments.device, *job.options]
    command = [sys.executable, str(job.path), *where, "--output", str(output)]
    output.unlink(missing_ok=True)  # what stands afterwards is of this run
    print(f"\n== {job.name}: python benchmarks/{job.script}.py {' '.join(where)}", flush=True)
    start = time.monotonic()
    # A session of its own, so that a script that is cut off takes the processes that it started with it.
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=os.name == "posix")
    try:
        code: int | str = process.wait(timeout=60 * arguments.minutes)
    except subprocess.TimeoutExpired:
        code = "cut off"
    finally:
        if process.poll() is None:
            end(process)
    written = output.name if output.exists() else None
    return {
        "name": job.name,
        "options": list(job.options),
        "exit": code,
        "seconds": round(time.monotonic() - start, 1),
        "file": written,
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a script and, where the system has process groups, all that it started."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def chosen(arguments: argparse.Namespace) -> list[Job]:
    """What was asked for; a dry run has no options, so each script runs once."""
    jobs = [job for job in JOBS if not arguments.only or job.name in arguments.only]
    return list({job.script: job for job in reversed(jobs)}.values())[::-1] if arguments.dry_run else jobs


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=HERE / "results", help="of the result files")
    parser.add_argument("--minutes", type=float, default=9.5, help="for each script")
    parser.add_argument("--only", nargs="+", choices=sorted({job.name for job in JOBS}), help="these alone")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: does everything run?")
    given = parser.parse_args()
    if given.dry_run:
        given.device = "cpu"
    elif not given.device.startswith("cpu") and not torch.accelerator.is_available():
        parser.error(
            f"torch {torch.__version__} sees no accelerator here; --dry-run shows on the CPU that the scripts run"
        )
    return given


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a script under way is ended too
    folder = arguments.folder.resolve()
    device = (
        "dry_run"
        if arguments.dry_run
        else re.sub(r"\W+", "_", describe_machine(arguments.device)["device"]).strip("_").lower()
    )
    report = Report(folder / f"{NAME}_{device}.json", NAME, arguments.device, arguments)
    for job in chosen(arguments):
        if not job.path.exists():
            report.add({"name": job.name, "exit": "not in this checkout", "seconds": 0.0, "file": None})
            continue
        report.add(run(job, arguments, folder / f"{job.name}_{device}.json"))
    report.finish()
    print(
        "\n"
        + table(
            ["benchmark", "exit", "seconds", "file"],
            [[r["name"], r["exit"], r["seconds"], r["file"]] for r in report.results],
        )
    )
    return int(any(result["exit"] not in (0, "not in this checkout") for result in report.results))


if __name__ == "__main__":
    sys.exit(main())
