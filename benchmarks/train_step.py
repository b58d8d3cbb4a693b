"""Measures a training step: transformers' Trainer, a plain loop and FastDraft in turns, against what the device's matrix products allow.

    python benchmarks/train_step.py --device cpu --shape 1.5m 7m 27m --output benchmarks/results/train_step_cpu.json
    python benchmarks/train_step.py --device cuda --shape phi-3-mini-50m llama-3.1-8b-150m
    python benchmarks/train_step.py --device cuda --follow
    python benchmarks/train_step.py --device cpu --shape 27m --operators
    python benchmarks/train_step.py --dry-run

Needs torch, transformers and a checkout of this repository; the Trainer needs `pip install accelerate` too and is left out without.
Every figure is on the disk as soon as it is known; `--add` adds to a file that is there.

Decides what is compared with what: tokens per optimiser step are equal, the micro-batch is each one's own; ratios are formed within a
turn. `mfu` is our useful rate divided by that of the model's own matrix products (stepping/measure.py), `mfu_data_sheet` by the
maker's figure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import machine
import torch
from stepping import worker
from stepping.contenders import NAMES, WORDS
from stepping.follow import follow
from stepping.measure import ENVIRONMENT, data_sheet
from stepping.shapes import SHAPES

NAME = "train_step"
TARGET_TOKENS = 10e9
DEFAULT = ("trainer", "plain_fp32", "plain_bf16", "plain_compiled", "ours", "ours_compiled")


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        worker.main(json.loads(arguments.worker))
        return
    if arguments.dry_run:
        arguments.device, arguments.shape, arguments.turns, arguments.steps = "cpu", ["tiny"], 1, 1
        arguments.contender = [
            name for name in arguments.contender if name != "plain_fp32"
        ]  # the same code as plain_bf16
    device = torch.device(arguments.device)
    before = (
        json.loads(arguments.output.read_text(encoding="utf-8"))["results"]
        if arguments.add and arguments.output.exists()
        else []
    )
    report = machine.Report(arguments.output, NAME, device, arguments, dry_run=arguments.dry_run)
    report.add(*before)
    if arguments.follow or (arguments.dry_run and not arguments.operators):
        shape, steps, length = ("tiny", 10, 64) if arguments.dry_run else (arguments.follow_shape, 200, 2048)
        follow(shape, device, steps, length, lambda found: report.put({"kind": "follow", **found}, "kind"))
        print({key: value for key, value in report.results[-1].items() if key != "losses"}, flush=True)
    for shape in [] if arguments.follow else arguments.shape:
        if not arguments.operators:
            measure(shape, device, arguments, report)
        if device.type == "cpu" and (arguments.operators or arguments.dry_run):
            report.add(operators(shape, arguments))
    report.finish()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    machine.add_arguments(parser, NAME)
    on_gpu = torch.cuda.is_available()
    shapes = ["phi-3-mini-50m", "llama-3.1-8b-150m"] if on_gpu else ["1.5m", "7m", "27m"]
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--contender", nargs="+", choices=NAMES, default=list(DEFAULT))
    parser.add_argument("--turns", type=int, default=5, help="how often each contender has its turn")
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        help="optimiser steps of a turn; 0: about 32k tokens on a CPU, 3 steps elsewhere",
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=0, help="tokens of an optimiser step; 0: the shape's"
    )
    parser.add_argument(
        "--rows", type=int, default=0, help="rows of the Trainer's and the plain loop's micro-batch; 0: 4"
    )
    parser.add_argument(
        "--our-rows", type=int, default=0, help="rows of FastDraft's micro-batch; 0: its default"
    )
    parser.add_argument("--add", action="store_true", help="keep the results that the output file holds")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="200 steps of 1 x 2048 tokens on the CPU and on the device: do losses agree?",
    )
    parser.add_argument("--follow-shape", choices=SHAPES, default="phi-3-mini-50m")
    parser.add_argument(
        "--operators",
        action="store_true",
        help="only which operators a step of ours on a CPU spends its time in",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(shape: str, device: torch.device, arguments: argparse.Namespace, report: machine.Report) -> None:
    """All contenders of one shape. On a CPU they live side by side and take turns; an accelerator's memory is for one at a time."""
    batch = arguments.batch_tokens or SHAPES[shape].batch
    steps = arguments.steps or (max(1, 32_768 // batch) if device.type == "cpu" else 3)
    names = [name for name in arguments.contender if _possible(name, device)]
    turns: dict[str, list[dict[str, Any]]] = {}
    alone = device.type != "cpu"
    # What is cut off is missed least at the end: ours and what it is held against come first.
    groups = (
        [[name] for name in (*names[:1], "matmuls", "parts", *names[1:])]
        if alone
        else [[*names, "matmuls"], ["parts"]]
    )
    for group in groups:
        once = group == ["parts"]
        given = argparse.Namespace(**{**vars(arguments), "turns": 1}) if once else arguments
        _side_by_side(group, shape, batch, 1 if once else steps, given, turns)
        for name in group:
            _keep(report, shape, name, batch, turns)
        report.put(summarize(shape, device, batch, turns, names), "kind", "shape")
    show(report.results[-1], turns, names, batch)


def _possible(name: str, device: torch.device) -> bool:
    if name.startswith("trainer") and not importlib.util.find_spec("accelerate"):
        print(f"{name}: left out, it needs: pip install accelerate", flush=True)
        return False
    return True


def _side_by_side(  # noqa: PLR0917
    names: list[str],
    shape: str,
    batch: int,
    steps: int,
    arguments: argparse.Namespace,
    turns: dict[str, list[dict[str, Any]]],
) -> None:
    """A turn to warm up, then turns that count, each beginning with another contender."""
    options = {"shape": shape, "device": arguments.device, "batch": batch, "threads": arguments.threads}
    options["backend"] = (
        "aot_eager" if arguments.dry_run else "inductor"
    )  # traced all the same, without minutes of compilers
    rows = {
        name: arguments.our_rows if name.startswith(("ours", "matmuls", "parts")) else arguments.rows
        for name in names
    }
    alive = {name: worker.Contender(Path(__file__), name, {**options, "rows": rows[name]}) for name in names}
    try:
        for name in names:
            if alive[name].turn(1) is None:
                print(f"{shape} {name}: ended by itself", flush=True)
                alive.pop(name).stop()
        for number in range(arguments.turns):
            order = list(alive)
            first = number % max(1, len(order))
            for name in order[first:] + order[:first]:
                found = alive[name].turn(steps)
                if found is not None:
                    turns.setdefault(name, []).append(found)
    finally:
        for contender in alive.values():
            contender.stop()


def _keep(
    report: machine.Report, shape: str, name: str, batch: int, turns: dict[str, list[dict[str, Any]]]
) -> None:
    if name not in NAMES or name not in turns:
        return
    last, rates = turns[name][-1], [batch / turn["seconds"] for turn in turns[name]]
    fields = {key: last[key] for key in ("parameters", "micro_batch_tokens", "memory_gb")}
    report.add(
        {
            "kind": "contender",
            "shape": shape,
            "contender": name,
            "batch_tokens": batch,
            **fields,
            "turns": len(rates),
            "tokens_per_second": machine.spread(rates),
            "hours_for_10b_tokens": round(TARGET_TOKENS / machine.spread(rates)["median"] / 3600, 2),
        }
    )


def summarize(
    shape: str, device: torch.device, batch: int, turns: dict[str, list[dict[str, Any]]], names: list[str]
) -> dict[str, Any]:
    """Ratios to ours, and ours against the matrix products; ratios within a turn where contenders took turns."""
    found: dict[str, Any] = {
        "kind": "summary",
        "shape": shape,
        "parts_seconds": turns.get("parts", [None])[-1],
    }
    ours = turns.get("ours", [])
    seconds = [turn["seconds"] for turn in ours]
    found["times_faster_than"] = {
        name: machine.ratio([turn["seconds"] for turn in turns[name]], seconds)
        for name in names
        if name != "ours" and len(turns.get(name, [])) == len(ours) > 0
    }
    if ours and turns.get("matmuls"):
        flops = ours[-1]["flops_per_token"]
        attention = 6.0 * SHAPES[shape].layers * SHAPES[shape].hidden * SHAPES[shape].length
        own = [(flops - attention) / turn["all"] for turn in turns["matmuls"]]
        forward = [(flops - attention) / 3 / turn["forward"] for turn in turns["matmuls"]]
        useful = [flops * batch / turn["seconds"] for turn in ours]
        found |= {
            "flops_per_token": flops,
            "useful_tflops": machine.spread([rate / 1e12 for rate in useful]),
            "matmul_tflops": machine.spread([rate / 1e12 for rate in own]),
            "matmul_tflops_forward": machine.spread([rate / 1e12 for rate in forward]),
            "mfu": machine.spread(_divided(useful, own), 3),
            "mfu_of_forward_products": machine.spread(_divided(useful, forward), 3),
        }
        sheet = data_sheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if sheet:
            found["mfu_data_sheet"] = machine.spread([rate / sheet for rate in useful], 3)
    return found


def operators(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The profile of one shape (stepping/measure.py), shown and given back."""
    options = {
        "shape": shape,
        "device": arguments.device,
        "batch": SHAPES[shape].batch,
        "threads": arguments.threads,
        "rows": 0,
    }
    options["backend"] = "inductor"  # not used: what is profiled here is never compiled
    contender = worker.Contender(Path(__file__), "operators", options, ENVIRONMENT)
    try:
        found = contender.turn(1)
    finally:
        contender.stop()
    if found is None:
        raise SystemExit(f"{shape}: the profile's process ended without a profile; what it said stands above")
    rows = [
        [row["operator"], f"{row['seconds'] * 1e3:.1f}", f"{row['share']:.1%}", str(row["calls"])]
        for row in found["operators"]
    ]
    print(machine.table(["operator", "ms", "share", "calls"], rows[:20]), flush=True)
    return {"kind": "operators", "shape": shape, "batch_tokens": SHAPES[shape].batch, **found}


def _divided(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=False)]  # a contender that died has fewer turns


def show(
    summary: dict[str, Any], turns: dict[str, list[dict[str, Any]]], names: list[str], batch: int
) -> None:
    """The table of one shape."""
    rows = []
    for name in names:
        if name in turns:
            rates = machine.spread([batch / turn["seconds"] for turn in turns[name]])
            factor = summary["times_faster_than"].get(name)
            memory = turns[name][-1]["memory_gb"]
            rows.append(
                [
                    WORDS[name],
                    f"{rates['median']:,.0f}",
                    f"{rates['low']:,.0f}-{rates['high']:,.0f}",
                    f"{factor['median']:.2f} ({factor['low']:.2f}-{factor['high']:.2f})" if factor else "1",
                    "-" if memory is None else f"{memory:.2f}",
                    f"{TARGET_TOKENS / rates['median'] / 3600:,.1f}",
                ]
            )
    print(f"\n{summary['shape']}, {batch:,} tokens a step")
    print(machine.table(["", "tokens/s", "range", "ours is faster by", "GB", "hours for 10 B"], rows))
    keys = (
        "useful_tflops",
        "matmul_tflops",
        "matmul_tflops_forward",
        "mfu",
        "mfu_of_forward_products",
        "mfu_data_sheet",
    )
    print({key: summary[key] for key in keys if key in summary}, summary["parts_seconds"], flush=True)


if __name__ == "__main__":
    main()
