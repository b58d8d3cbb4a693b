"""A training step: transformers' Trainer, a plain loop and FastDraft, against the device's matrix products.

    python benchmarks/train_step.py --device cpu --shape 1.5m 7m 27m --output
    benchmarks/results/train_step_cpu.json python benchmarks/train_step.py --device cuda --shape
    phi-3-mini-50m llama-3.1-8b-150m python benchmarks/train_step.py --device cuda --follow

Tokens per optimiser step are equal, the micro-batch is each one's own; ratios are formed within a turn. `mfu`
is our useful rate divided by that of the model's own matrix products (stepping/worker.py), `mfu_data_sheet`
by the maker's figure. The Trainer needs `pip install accelerate` too and is left out without.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from machine import Report, options, ratio, spread, table, tell, turns_of
from stepping import worker
from stepping.contenders import SHAPES, WORDS
from stepping.follow import follow

NAME = "train_step"
DEFAULT = ["trainer", "plain_fp32", "plain_bf16", "plain_compiled", "ours", "ours_compiled"]
# Dense bf16 products, by a part of the device's name, as its maker promises.
DATA_SHEET_TFLOPS = {
    "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0,
    "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.0,
}  # fmt: skip
Turns = dict[str, list[dict[str, Any]]]
"""What each contender said after each of its turns."""


def main() -> None:
    given = parse()
    if given.worker:
        worker.main(json.loads(given.worker))
        return
    if given.dry_run:
        given.device, given.shape, given.turns, given.steps = "cpu", ["tiny"], 1, 1
        given.contender = [name for name in given.contender if name != "plain_fp32"]  # as plain_bf16
    device = torch.device(given.device)
    report = Report(given.output, NAME, device, given)
    if given.follow or given.dry_run:
        setting = ("tiny", device, 10, 64) if given.dry_run else (given.follow_shape, device, 200, 2048)
        follow(*setting, lambda found: report.put({"kind": "follow", **found}, "kind"))
        print({key: value for key, value in report.results[-1].items() if key != "losses"}, flush=True)
    for shape in [] if given.follow else given.shape:
        measure(shape, device, given, report)
    report.finish()


def parse() -> argparse.Namespace:
    parser = options(__doc__, NAME)
    add = parser.add_argument
    on_gpu = torch.cuda.is_available()
    shapes = ["phi-3-mini-50m", "llama-3.1-8b-150m"] if on_gpu else ["1.5m", "7m", "27m"]
    add("--shape", nargs="+", choices=SHAPES, default=shapes)
    add("--contender", nargs="+", choices=WORDS, default=DEFAULT)
    add("--turns", type=int, default=5, help="how often each contender has its turn")
    add("--steps", type=int, default=0, help="of a turn; 0: about 32k tokens on a CPU, 3 steps elsewhere")
    add("--batch-tokens", type=int, default=0, help="tokens of an optimiser step; 0: the shape's")
    add("--rows", type=int, default=0, help="of the Trainer's and the plain loop's micro-batch; 0: 4")
    add("--our-rows", type=int, default=0, help="of FastDraft's micro-batch; 0: its default")
    add("--follow", action="store_true", help="200 steps on the CPU and on the device: do losses agree?")
    add("--follow-shape", choices=SHAPES, default="phi-3-mini-50m")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(shape: str, device: torch.device, given: argparse.Namespace, report: Report) -> None:
    """All contenders of one shape. On a CPU they take turns; an accelerator's memory is for one at a time."""
    batch, names = given.batch_tokens or SHAPES[shape].batch, given.contender
    if "trainer" in names and not importlib.util.find_spec("accelerate"):
        print("trainer: left out, it needs: pip install accelerate", flush=True)
        names = [name for name in names if name != "trainer"]
    steps = given.steps or (max(1, 32_768 // batch) if device.type == "cpu" else 3)
    turns: Turns = {}
    # What is cut off is missed least at the end: ours and what it is held against come first.
    alone = [[name] for name in (*names[:1], "matmuls", *names[1:])]
    for group in [[*names, "matmuls"]] if device.type == "cpu" else alone:
        side_by_side(group, shape, batch, steps, given, turns)
        for name in group:
            if name in WORDS and name in turns:
                last, rates = turns[name][-1], [batch / turn["seconds"] for turn in turns[name]]
                one = {"kind": "contender", "shape": shape, "contender": name, "batch_tokens": batch}
                one |= {key: last[key] for key in ("parameters", "micro_batch_tokens", "memory_gb")}
                report.add({**one, "turns": len(rates), "tokens_per_second": spread(rates)})
        report.put(summarize(shape, device, batch, turns), "kind", "shape")
    show(report.results[-1], turns, batch)


def side_by_side(
    names: list[str], shape: str, batch: int, steps: int, given: argparse.Namespace, turns: Turns
) -> None:
    """A turn to warm up, then turns that count, each beginning with another contender."""
    about = {"shape": shape, "device": given.device, "batch": batch, "threads": given.threads}
    about["backend"] = "aot_eager" if given.dry_run else "inductor"  # traced without minutes of compilers
    rows = {name: given.our_rows if name.startswith(("ours", "matmuls")) else given.rows for name in names}
    alive = {name: worker.Contender(Path(__file__), name, {**about, "rows": rows[name]}) for name in names}
    try:
        for name in names:
            if alive[name].turn(1) is None:
                print(f"{shape} {name}: ended by itself", flush=True)
                alive.pop(name).stop()
        for order in turns_of(list(alive), given.turns):
            for name in order:
                if (found := alive[name].turn(steps)) is not None:
                    turns.setdefault(name, []).append(found)
    finally:
        for contender in alive.values():
            contender.stop()


def summarize(shape: str, device: torch.device, batch: int, turns: Turns) -> dict[str, Any]:
    """Ratios to ours, and ours against the matrix products."""
    found: dict[str, Any] = {"kind": "summary", "shape": shape, "times_faster_than": {}}
    ours = [turn["seconds"] for turn in turns.get("ours", [])]
    for name, others in turns.items():
        if name in WORDS and name != "ours" and len(others) == len(ours) > 0:
            found["times_faster_than"][name] = ratio([turn["seconds"] for turn in others], ours)
    if ours and turns.get("matmuls"):
        flops = turns["ours"][-1]["flops_per_token"]
        products = flops - SHAPES[shape].attention_flops
        useful = [flops * batch / seconds / 1e12 for seconds in ours]
        own = [products / turn["all"] / 1e12 for turn in turns["matmuls"]]
        forward = [products / 3 / turn["forward"] / 1e12 for turn in turns["matmuls"]]
        count = min(len(ours), len(own))  # a contender that died has fewer turns
        found |= {"flops_per_token": flops, "useful_tflops": spread(useful)}
        found |= {"matmul_tflops": spread(own), "matmul_tflops_forward": spread(forward)}
        found["mfu"] = ratio(useful[:count], own[:count])
        found["mfu_of_forward_products"] = ratio(useful[:count], forward[:count])
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        sheet = next((value for part, value in DATA_SHEET_TFLOPS.items() if part in name), None)
        if sheet:
            found["mfu_data_sheet"] = spread([rate / sheet for rate in useful], 3)
    return found


def show(summary: dict[str, Any], turns: Turns, batch: int) -> None:
    """The table of one shape."""
    rows = []
    for name in (name for name in turns if name in WORDS):
        rates = spread([batch / turn["seconds"] for turn in turns[name]])
        factor, memory = summary["times_faster_than"].get(name), turns[name][-1]["memory_gb"]
        faster, size = tell(factor) if factor else "1", "-" if memory is None else f"{memory:.2f}"
        rows.append([WORDS[name], tell(rates, ",.0f"), faster, size, f"{1e10 / rates['median'] / 3600:,.1f}"])
    print(f"\n{summary['shape']}, {batch:,} tokens a step")
    print(table(["", "tokens/s", "ours is faster by", "GB", "hours for 10 B"], rows))
    print({key: value for key, value in summary.items() if "tflops" in key or "mfu" in key}, flush=True)


if __name__ == "__main__":
    main()
