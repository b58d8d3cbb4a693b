"""Measures FastDraft's training step: tokens per second, memory, and how near it comes to what the device's matrix products allow.

    python benchmarks/train_step.py --device cuda --preset phi-3-mini-50m llama-3.1-8b-150m --output train_step.json
    python benchmarks/train_step.py --device cpu --preset 1.5m --micro-batch-tokens 2048 4096 8192

Needs torch, transformers and a checkout of this repository, nothing else. The step is the product's own (training/step.py with its
optimisers, precision and chunked loss) on random tokens. Every figure is written to the output file as soon as it is known.

Decides what is compared with what: `matmul_tflops_own_shapes` is the rate of the model's own matrix products, each timed alone with as many
rows as a micro-batch has; `mfu` is the step's useful rate divided by it, `mfu_square` by the rate of one large square product.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import nn

from fastdraft.functional.losses import default_chunk
from fastdraft.training.batches import Batch
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.optimizer import build_optimizers
from fastdraft.training.step import TrainStep, autocast_dtype, default_micro_batch_tokens

PRESETS: dict[str, dict[str, Any]] = {
    "1.5m": {
        "family": "llama", "vocab": 8192, "hidden": 128, "layers": 2, "heads": 2, "ffn": 384,
        "tied": True, "length": 512, "batch": 16_384,
    },
    "phi-3-mini-50m": {
        "family": "phi3", "vocab": 32064, "hidden": 512, "layers": 6, "heads": 8, "ffn": 1408,
        "tied": False, "length": 2048, "batch": 262_144,
    },
    "llama-3.1-8b-150m": {
        "family": "llama", "vocab": 128256, "hidden": 512, "layers": 6, "heads": 8, "ffn": 1792,
        "tied": False, "length": 2048, "batch": 524_288,
    },
}  # fmt: skip
TARGET_TOKENS = 10e9


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    report: dict[str, Any] = {"machine": describe_machine(device), "results": []}
    grid = itertools.product(arguments.preset, arguments.optimizer, arguments.micro_batch_tokens, arguments.chunk, arguments.attention)
    for preset, optimizer, micro, chunk, attention in grid:
        setting = {"preset": preset, "optimizer": optimizer, "micro_batch_tokens": micro, "chunk": chunk, "attention": attention}
        try:
            result = measure(setting, arguments, device)
        except torch.OutOfMemoryError:
            result = {**setting, "error": "out of memory"}
        report["results"].append(result)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        print(summary(result), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["1.5m"])
    parser.add_argument("--optimizer", nargs="+", choices=["adamw", "muon"], default=["adamw"])
    parser.add_argument("--micro-batch-tokens", nargs="+", type=int, default=[0], help="0: the product's default")
    parser.add_argument("--batch-tokens", type=int, default=0, help="0: the preset's, on a CPU at most 16384")
    parser.add_argument("--chunk", nargs="+", type=int, default=[0], help="rows of logits at a time; 0: the product's default")
    parser.add_argument("--attention", nargs="+", default=["sdpa"], help="sdpa, eager, flash_attention_2, ...")
    parser.add_argument("--length", type=int, default=0, help="tokens of a row; 0: the preset's")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoder")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time per setting")
    parser.add_argument("--output", type=Path, default=Path("train_step.json"))
    return parser.parse_args()


def describe_machine(device: torch.device) -> dict[str, Any]:
    import transformers

    machine: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if device.type == "cuda":
        machine |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return machine | {"device_type": device.type, "threads": torch.get_num_threads()}


def build_model(shape: dict[str, Any], attention: str) -> nn.Module:
    import transformers

    configs = {"llama": transformers.LlamaConfig, "phi3": transformers.Phi3Config}
    config = configs[shape["family"]](
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["ffn"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["heads"], max_position_embeddings=4096,
        tie_word_embeddings=shape["tied"], pad_token_id=0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model.train()


def measure(setting: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One setting: the whole step, then its parts alone."""
    shape = dict(PRESETS[setting["preset"]])
    shape["length"] = arguments.length or shape["length"]
    micro_tokens = setting["micro_batch_tokens"] or default_micro_batch_tokens(device)
    rows = max(1, micro_tokens // shape["length"])
    batch_tokens = arguments.batch_tokens or min(shape["batch"], 16_384 if device.type == "cpu" else shape["batch"])
    count = max(1, batch_tokens // (rows * shape["length"]))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = build_model(shape, setting["attention"]).to(device)
    step = build_step(model, setting, arguments, device)
    batches = [random_batch(shape, rows) for _ in range(count)]
    tokens = rows * count * shape["length"]

    def whole() -> None:
        step.gradients(batches)
        step.update(1.0)

    began = time.perf_counter()
    whole()
    first_seconds = time.perf_counter() - began
    seconds = timed(whole, arguments.seconds, device)
    memory = peak_memory(device)
    dtype = step.autocast or torch.float32
    micro = rows * shape["length"]
    head_rows = min(micro, setting["chunk"] or default_chunk(device.type, shape["vocab"]))
    own, square = matmul_rates(model, shape["vocab"], micro, head_rows, (dtype, device))
    useful = flops_per_token(model, shape) * tokens / seconds
    return {
        **setting, "micro_batch_tokens": micro, "batch_tokens": tokens, "length": shape["length"],
        "precision": str(dtype).removeprefix("torch."), "compile": arguments.compile,
        "parameters": sum(p.numel() for p in model.parameters()), "tokens_per_second": round(tokens / seconds, 1),
        "seconds_per_step": seconds, "first_step_seconds": first_seconds, "peak_memory_gb": memory, "tflops": useful / 1e12,
        "matmul_tflops_own_shapes": own / 1e12, "matmul_tflops_square": square / 1e12, "mfu": useful / own, "mfu_square": useful / square,
        "hours_for_10b_tokens": TARGET_TOKENS * seconds / tokens / 3600, "parts": measure_parts(step, batches, shape, arguments, device),
    }  # fmt: skip


def build_step(model: nn.Module, setting: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> TrainStep:
    optimizers = build_optimizers(model, kind=setting["optimizer"], learning_rate=1e-3)
    decoder = model.get_decoder()  # type: ignore[operator]
    return TrainStep(
        decoder=torch.compile(decoder) if arguments.compile else decoder,
        head=model.get_output_embeddings().weight,  # type: ignore[operator]
        parameters=list(model.parameters()),
        optimizers=optimizers,
        objective=CrossEntropy(z_loss=1e-5, chunk=setting["chunk"]),
        device=device,
        autocast=autocast_dtype(arguments.precision, device),
    )


def random_batch(shape: dict[str, Any], rows: int) -> Batch:
    tokens = torch.randint(0, shape["vocab"], (rows, shape["length"] + 1))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1), None, rows * shape["length"])


def measure_parts(
    step: TrainStep, batches: list[Batch], shape: dict[str, Any], arguments: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """Seconds per optimiser step of the loss alone (head, softmax, their gradients) and of the update alone."""
    batch = batches[0].to(device)
    hidden_ND = torch.randn(batch.num_trained, shape["hidden"], device=device, requires_grad=True)

    def loss() -> None:
        with torch.autocast(device.type, dtype=step.autocast or torch.bfloat16, enabled=step.autocast is not None):
            torch.autograd.backward(step.objective.loss(hidden_ND, step.head, batch))

    loss_seconds = timed(loss, arguments.seconds / 4, device) * len(batches)
    for parameter in step.parameters:
        parameter.grad = torch.zeros_like(parameter)

    def update() -> None:
        for optimizer in step.optimizers:
            optimizer.step()

    update_seconds = timed(update, arguments.seconds / 4, device)
    step.skip()
    return {"loss_seconds": loss_seconds, "update_seconds": update_seconds}


def timed(function: Callable[[], None], seconds: float, device: torch.device) -> float:
    """Median seconds per call over about `seconds`, at least three calls, after one that is not counted."""
    function()
    synchronize(device)
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        start = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_memory(device: torch.device) -> float | None:
    """GB: of the device for CUDA, of the whole process (all settings so far) on a CPU, None where it cannot be read."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def flops_per_token(model: nn.Module, shape: dict[str, Any]) -> float:
    """Useful operations of forward and backward: 6 per weight of a matrix product, and causal attention."""
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return 6.0 * matrices + 6.0 * shape["layers"] * shape["hidden"] * shape["length"]


Where = tuple[torch.dtype, torch.device]


def matmul_rates(model: nn.Module, vocab: int, rows: int, head_rows: int, where: Where) -> tuple[float, float]:
    """Operations per second of the model's matrix products timed one by one, weighted as the model uses them; and of a square one."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    layers = [(head_rows if module.out_features == vocab else rows, module.in_features, module.out_features) for module in linear]
    operations = seconds = 0.0
    for sizes in sorted(set(layers)):
        weight = layers.count(sizes) * rows / sizes[0]
        operations += weight * 2 * math.prod(sizes)
        seconds += weight * time_matmul(sizes, where)
    side = 1024 if where[1].type == "cpu" else 8192
    return operations / seconds, 2 * side**3 / time_matmul((side, side, side), where)


def time_matmul(sizes: tuple[int, int, int], where: Where) -> float:
    (m, k, n), (dtype, device) = sizes, where
    left, right = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    repeats = max(1, int(1e8 // (m * k * n))) if device.type == "cpu" else 20  # so that the launch and the clock do not count

    def product() -> None:
        for _ in range(repeats):
            left @ right.t()

    return timed(product, 0.2, device) / repeats


def summary(result: dict[str, Any]) -> str:
    name = f"{result['preset']:<18} {result['optimizer']:<6} micro {result['micro_batch_tokens']:>6} chunk {result['chunk']:>5}"
    name += f" {result['attention']:<6}"
    if "error" in result:
        return f"{name} {result['error']}"
    memory = "" if result["peak_memory_gb"] is None else f"{result['peak_memory_gb']:6.2f} GB "
    parts = result["parts"]
    shares = " ".join(f"{key.split('_')[0]} {seconds / result['seconds_per_step']:4.0%}" for key, seconds in parts.items())
    return (
        f"{name} {result['tokens_per_second']:>11,.0f} tokens/s {memory}MFU {result['mfu']:4.0%} (square {result['mfu_square']:4.0%}) "
        f"{shares} {result['hours_for_10b_tokens']:8.1f} h for 10 B"
    )


if __name__ == "__main__":
    main()
