"""Peak memory of one training step of the 150 M draft at 8,192 tokens, for each way to compute the loss.

    python benchmarks/step_memory.py --output benchmarks/results/step_memory_cpu.json
    python benchmarks/step_memory.py --device cuda --output benchmarks/results/step_memory_cuda.json
    python benchmarks/step_memory.py --model runs/llama-3.1-8b/design/draft     # a draft that was designed

Needs torch, transformers and a checkout of this repository. Every row is a process of its own that builds the draft with random
weights (fp32, bf16 autocast), takes one small step, so that the optimiser has its state, and then one whole step with the product's own
`TrainStep`; only the loss differs between paths:

    plain     logits of all tokens [N, V], in fp32, then torch's cross_entropy (what transformers' own loss does)
    torch     torch.nn.functional.linear_cross_entropy, chunked (LinearCrossEntropyOptions), where this torch has it
    chunked   the product's

Memory "above weights, gradients and optimiser" is the peak during the step, less what the process held before it, less the gradients'
own bytes. On a CPU the peak is that of resident memory (VmHWM, reset before the step; where it cannot be reset, the highest since the
process began), on CUDA that of torch's allocator. GB are 1e9 bytes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from machine import Report, add_arguments, synchronize, table
from torch import Tensor, nn

from fastdraft.training.batches import Batch
from fastdraft.training.objective import CrossEntropy, Objective
from fastdraft.training.optimizer import build_optimizers
from fastdraft.training.step import TrainStep, autocast_dtype, default_micro_batch_tokens

PATHS = ("chunked", "torch", "plain")
SHAPE = {"vocab": 128_256, "hidden": 512, "layers": 6, "heads": 8, "ffn": 1792}
"""The preset llama-3.1-8b-150m in the vocabulary of Llama 3.1: 154,147,328 parameters."""
TINY = {"vocab": 512, "hidden": 32, "layers": 1, "heads": 2, "ffn": 64}
SEED, GB = 0, 1e9


@dataclass(frozen=True)
class PlainCrossEntropy:
    """All logits at once, in fp32."""

    def loss(self, hidden_ND: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
        logits_NV = nn.functional.linear(hidden_ND, head_VD).float()
        return nn.functional.cross_entropy(logits_NV, batch.labels, reduction="sum")


@dataclass(frozen=True)
class TorchCrossEntropy:
    """torch's own chunks, in autocast's type, which it does not take from autocast itself."""

    def loss(self, hidden_ND: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
        device = hidden_ND.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        own, options = nn.functional.linear_cross_entropy, nn.LinearCrossEntropyOptions()
        with torch.autocast(device, enabled=False):
            found = own(hidden_ND.to(low), head_VD.to(low), batch.labels, reduction="sum", options=options)
        return found.float()


OBJECTIVES: dict[str, Objective] = {
    "plain": PlainCrossEntropy(),
    "torch": TorchCrossEntropy(),
    "chunked": CrossEntropy(),
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child))))
        return
    report = Report(arguments.output, "step_memory", arguments.device, arguments)
    names = ("device", "tokens", "length", "precision", "model", "dry_run", "threads")
    given = {name: getattr(arguments, name) for name in names}
    for path, wanted in itertools.product(arguments.path, arguments.micro_batch_tokens):
        micro = min(wanted or default_micro_batch_tokens(torch.device(arguments.device)), arguments.tokens)
        if not any((row["path"], row["micro_batch_tokens"]) == (path, micro) for row in report.results):
            report.add(in_own_process({"path": path, "micro_batch_tokens": micro, **given}))
    report.finish()
    sizes = ("peak", "weights", "gradients", "optimizer", "above", "libraries")
    rows = [
        [row["path"], f"{row['micro_batch_tokens']:,}"]
        + ([row["error"]] if "error" in row else [f"{row[f'{name}_gb']:.2f}" for name in sizes])
        + ([] if "error" in row else [f"{row['seconds']:.1f}", f"{row['loss']:.4f}"])
        for row in report.results
    ]
    columns = ["path", "micro-batch", *(f"{name}, GB" for name in sizes), "seconds", "loss"]
    print(table(columns, [row + [""] * (len(columns) - len(row)) for row in rows]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, "step_memory")
    parser.add_argument("--path", nargs="+", choices=PATHS, default=[], help="default: all that can run here")
    parser.add_argument("--tokens", type=int, default=8192, help="of the step")
    parser.add_argument("--length", type=int, default=2048, help="of a row")
    parser.add_argument(
        "--micro-batch-tokens", nargs="+", type=int, default=[8192, 0], help="0: the product's default"
    )
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="bf16")
    parser.add_argument(
        "--model",
        default="",
        help="directory of a designed draft; default: the preset's shape, random weights",
    )
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.tokens, arguments.length, arguments.micro_batch_tokens = 256, 64, [128]
    known = [path for path in PATHS if path != "torch" or hasattr(nn, "LinearCrossEntropyOptions")]
    arguments.path = arguments.path or known
    return arguments


def in_own_process(setting: dict[str, Any]) -> dict[str, Any]:
    """One row; a process that dies, of lack of memory mostly, is a row too."""
    command = [sys.executable, __file__, "--child", json.dumps(setting)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    row = {"path": setting["path"], "micro_batch_tokens": setting["micro_batch_tokens"]}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed, most likely for lack of memory"])[-1]
        return row | {"error": f"exit code {done.returncode}: {last[:200]}"}
    return row | json.loads(done.stdout.strip().splitlines()[-1])


def measure(setting: dict[str, Any]) -> dict[str, Any]:
    """One step in this process; all sizes in GB."""
    device = torch.device(setting["device"])
    if setting["threads"]:
        torch.set_num_threads(setting["threads"])
    torch.manual_seed(SEED)
    model = build(setting).to(device).train()
    vocab, length = model.config.vocab_size, setting["length"]
    step = TrainStep(
        decoder=model.get_decoder(),
        head=model.get_output_embeddings().weight,
        parameters=list(model.parameters()),
        optimizers=build_optimizers(model, kind="adamw", learning_rate=1e-3),
        objective=OBJECTIVES[setting["path"]],
        device=device,
        autocast=autocast_dtype(setting["precision"], device),
    )
    step.gradients([random_batch(vocab, 1, 32)])  # the optimiser has its state from here on
    step.update(1.0)
    rows = max(1, setting["micro_batch_tokens"] // length)
    batches = [random_batch(vocab, rows, length) for _ in range(setting["tokens"] // (rows * length))]
    gc.collect()
    before = held(device)
    resettable = reset_peak(device)
    start = time.perf_counter()
    loss, _, trained = step.gradients(batches)
    step.update(1.0)
    synchronize(device)
    seconds, peak = time.perf_counter() - start, held(device, peak=True)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    values = [
        value
        for optimizer in step.optimizers
        for state in optimizer.state.values()
        for value in state.values()
    ]
    states = sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
    sizes = {
        "peak": peak, "libraries": before - gradients - states, "weights": gradients, "gradients": gradients,
        "optimizer": states, "above": peak - before - gradients, "before": before,
    }  # fmt: skip
    return {f"{name}_gb": size / GB for name, size in sizes.items()} | {
        "peak_was_reset": resettable,
        "tokens": trained,
        "loss": loss,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": str(step.autocast or torch.float32).removeprefix("torch."),
    }


def build(setting: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    if setting["model"]:
        return AutoModelForCausalLM.from_pretrained(setting["model"], dtype=torch.float32)
    shape = TINY if setting["dry_run"] else SHAPE
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def random_batch(vocab: int, rows: int, length: int) -> Batch:
    tokens = torch.randint(0, vocab, (rows, length + 1))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1), None, rows * length)


def held(device: torch.device, peak: bool = False) -> int:
    """Bytes in use now, or at most since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # no Linux: the highest since the process began
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak(device: torch.device) -> bool:
    """Forgets earlier peaks; False where the system cannot, and the peak is the highest since the process began."""
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
