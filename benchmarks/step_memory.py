"""Peak memory of one training step of the 150 M draft at 8,192 tokens, for each way to compute the loss.

    python benchmarks/step_memory.py --output benchmarks/results/step_memory_cpu.json
    python benchmarks/step_memory.py --device cuda --output benchmarks/results/step_memory_cuda.json

Every row is a process of its own that builds the draft with random weights (fp32, bf16 autocast), takes one
small step, so that the optimiser has its state, and then one whole step with the product's own `TrainStep`;
only the loss differs:

    plain     logits of all tokens [N, V], in fp32, then torch's cross_entropy (what transformers' own loss
    does) torch     torch.nn.functional.linear_cross_entropy, chunked (LinearCrossEntropyOptions), where this
    torch has it chunked   the product's

Memory "above" is the peak during the step, less what the process held before it, less the gradients' own
bytes. On a CPU the peak is that of resident memory (VmHWM, reset before the step; elsewhere than on Linux the
highest since the process began), on CUDA that of torch's allocator. GB are 1e9 bytes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from machine import Report, options, synchronize, table
from stepping.contenders import SHAPES
from stepping.worker import peak_memory
from torch import Tensor, nn

from fastdraft.training.batches import Batch, packed_batch
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.optimizer import build_optimizers
from fastdraft.training.step import TrainStep, autocast_dtype, default_micro_batch_tokens

GB = 1e9


def plain(hidden_ND: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
    """All logits at once, in fp32."""
    logits_NV = nn.functional.linear(hidden_ND, head_VD).float()
    return nn.functional.cross_entropy(logits_NV, batch.labels, reduction="sum")


def torch_own(hidden_ND: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
    """Torch's own chunks, in autocast's type, which it does not take from autocast itself."""
    device = hidden_ND.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    own, how = nn.functional.linear_cross_entropy, nn.LinearCrossEntropyOptions()
    with torch.autocast(device, enabled=False):
        return own(hidden_ND.to(low), head_VD.to(low), batch.labels, reduction="sum", options=how).float()


LOSSES = {"chunked": CrossEntropy().loss, "torch": torch_own, "plain": plain}
HERE = [name for name in LOSSES if name != "torch" or hasattr(nn, "LinearCrossEntropyOptions")]


def main() -> None:
    given = parse()
    if given.child:
        print(json.dumps(measure(argparse.Namespace(**json.loads(given.child)))))
        return
    report = Report(given.output, "step_memory", given.device, given)
    names = ("device", "tokens", "length", "precision", "dry_run", "threads")
    common, own = {name: getattr(given, name) for name in names}, torch.device(given.device)
    sizes = {min(size or default_micro_batch_tokens(own), given.tokens) for size in given.micro_batch_tokens}
    for path, micro in itertools.product(given.path, sorted(sizes, reverse=True)):
        row = {"path": path, "micro_batch_tokens": micro}
        command = [sys.executable, __file__, "--child", json.dumps({**row, **common})]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
        if done.returncode:  # a process that dies, of lack of memory mostly, is a row too
            last = (done.stderr.strip().splitlines() or ["killed, most likely for lack of memory"])[-1]
            report.add(row | {"error": f"exit code {done.returncode}: {last[:200]}"})
        else:
            report.add(row | json.loads(done.stdout.strip().splitlines()[-1]))
    report.finish()
    parts = ["peak_gb", "weights_gb", "gradients_gb", "optimizer_gb", "above_gb", "seconds", "loss"]
    rows = [[one["path"], one["micro_batch_tokens"], one.get("error", "")] for one in report.results]
    for row, one in zip(rows, report.results, strict=True):
        row += [f"{one[part]:.2f}" if part in one else "" for part in parts]
    print(table(["path", "micro-batch", "error", *parts], rows))


def parse() -> argparse.Namespace:
    parser = options(__doc__, "step_memory")
    add = parser.add_argument
    add("--path", nargs="+", choices=LOSSES, default=HERE, help="default: all that can run here")
    add("--tokens", type=int, default=8192, help="of the step")
    add("--length", type=int, default=2048, help="of a row")
    add("--micro-batch-tokens", nargs="+", type=int, default=[8192, 0], help="0: the product's default")
    add("--precision", choices=["auto", "bf16", "fp32"], default="bf16")
    add("--child", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.dry_run:
        given.device, given.tokens, given.length, given.micro_batch_tokens = "cpu", 256, 64, [128]
    return given


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """One step in this process; all sizes in GB."""
    device = torch.device(given.device)
    if given.threads:
        torch.set_num_threads(given.threads)
    model = SHAPES["tiny" if given.dry_run else "llama-3.1-8b-150m"].build().to(device)
    step = TrainStep(
        decoder=model.get_decoder(),
        head=model.get_output_embeddings().weight,
        parameters=list(model.parameters()),
        optimizers=build_optimizers(model, kind="adamw", learning_rate=1e-3),
        objective=SimpleNamespace(loss=LOSSES[given.path]),
        device=device,
        autocast=autocast_dtype(given.precision, device),
    )

    def batch(rows: int, length: int) -> Batch:
        return packed_batch(torch.randint(0, model.config.vocab_size, (rows, length + 1)).numpy())

    step.gradients([batch(1, 32)])  # the optimiser has its state from here on
    step.update(1.0)
    rows = max(1, given.micro_batch_tokens // given.length)
    batches = [batch(rows, given.length) for _ in range(given.tokens // (rows * given.length))]
    gc.collect()
    before, resettable, start = held(device), reset_peak(device), time.perf_counter()
    loss, _, trained = step.gradients(batches)
    step.update(1.0)
    synchronize(device)
    seconds, peak = time.perf_counter() - start, held(device, peak=True)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = [value for one in step.optimizers for state in one.state.values() for value in state.values()]
    states = sum(value.numel() * value.element_size() for value in kept if isinstance(value, Tensor))
    sizes = {"peak": peak, "before": before, "weights": weights, "gradients": weights, "optimizer": states}
    sizes |= {"above": peak - before - weights, "libraries": before - weights - states}
    found = {f"{name}_gb": size / GB for name, size in sizes.items()}
    found |= {"peak_was_reset": resettable, "tokens": trained, "loss": loss, "seconds": seconds}
    precision = str(step.autocast or torch.float32).removeprefix("torch.")
    return found | {"parameters": sum(p.numel() for p in model.parameters()), "precision": precision}


def held(device: torch.device, peak: bool = False) -> float:
    """Bytes in use now, or at most since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():  # no Linux: the highest since the process began
        return GB * (peak_memory(device) or 0)
    name = "VmHWM:" if peak else "VmRSS:"
    lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak(device: torch.device) -> bool:
    """Forgets earlier peaks; False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
