"""The loss function alone, forward and backward: seconds and memory of the ways from hidden states to a loss.

    python benchmarks/loss_functions.py --device cuda
    python benchmarks/loss_functions.py --device cpu --tokens 2048

For each vocabulary: `plain` holds all logits (`linear`, then `cross_entropy` in float32); `torch` is its own
`linear_cross_entropy` in chunks (torch 2.13 and newer), `torch, not chunked` the same without; `chunked` is ours (functional/losses.py). With --distillation also the losses against a whole
distribution of the target (functional/distillation.py, dense), ours in chunks beside the same formula over all logits.

Decides that every contender starts from the same hidden states and weights (weights in float32, the products in --precision, as
in training under autocast) and ends at gradients of both; that its loss and gradients are compared with those of `plain`; that memory is
the most that stood at any moment beyond the inputs, gradients included, as torch's allocator counts it; that contenders take
turns; and that one that does not fit is written down as such. Needs torch and transformers; figures stand in the file as they come.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

import torch
from machine import Report, add_arguments, out_of_memory, ratio, spread, synchronize, table, take_turns
from torch import Tensor, nn

from fastdraft.functional.distillation import DenseTarget, chunked_distillation, token_loss
from fastdraft.functional.losses import chunked_cross_entropy

NAME = "loss_functions"
PLAIN, TORCH_WHOLE, TORCH, OURS = "plain", "torch, not chunked", "torch", "chunked"
DISTILLATION = ("forward_kl", "tvd", "lk_hybrid")
Loss = Callable[[], Tensor]
"""Summed over tokens."""


class Inputs:
    """Random hidden states, head, labels and, for distillation, the target's logits: the same for all contenders."""

    def __init__(self, arguments: argparse.Namespace, vocab: int) -> None:
        device, generator = arguments.device, torch.Generator().manual_seed(0)
        self.hidden_ND = (
            torch.randn(arguments.tokens, arguments.hidden, generator=generator).to(device).requires_grad_()
        )
        self.head_VD = (
            (torch.randn(vocab, arguments.hidden, generator=generator) / arguments.hidden**0.5)
            .to(device)
            .requires_grad_()
        )
        self.labels_N = torch.randint(vocab, (arguments.tokens,), generator=generator).to(device)
        self.device, self.dtype = (
            torch.device(device),
            {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.precision],
        )
        wanted = arguments.distillation
        self.target_NV = (
            torch.randn(arguments.tokens, vocab, generator=generator).to(device, torch.bfloat16)
            if wanted
            else None
        )

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def low(self) -> tuple[Tensor, Tensor]:
        """Hidden states and head in the type of the products, for kernels that know no autocast; gradients reach the originals."""
        return self.hidden_ND.to(self.dtype), self.head_VD.to(self.dtype)


def cross_entropies(inputs: Inputs) -> dict[str, Loss]:
    """Contenders by name; those that this installation does not have are left out."""
    labels = inputs.labels_N

    def plain() -> Tensor:
        with inputs.autocast():
            logits = nn.functional.linear(inputs.hidden_ND, inputs.head_VD)
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")

    def chunked() -> Tensor:
        with inputs.autocast():
            return chunked_cross_entropy(inputs.hidden_ND, inputs.head_VD, labels)

    found: dict[str, Loss] = {PLAIN: plain, OURS: chunked}
    own = getattr(nn.functional, "linear_cross_entropy", None)
    options = getattr(nn, "LinearCrossEntropyOptions", None)
    if own is not None:
        found[TORCH_WHOLE] = lambda: own(*inputs.low(), labels, reduction="sum")
        if options is not None:
            found[TORCH] = lambda: own(*inputs.low(), labels, reduction="sum", options=options())
    return found


def distillations(inputs: Inputs, name: str) -> dict[str, Loss]:
    """The named loss over all logits, and ours in chunks."""
    loss, target_NV = token_loss(name), inputs.target_NV
    assert target_NV is not None

    def plain() -> Tensor:
        with inputs.autocast():
            logits = nn.functional.linear(inputs.hidden_ND, inputs.head_VD)
        return loss.divergence(target_NV.float().log_softmax(-1), logits.float().log_softmax(-1)).sum()

    def chunked() -> Tensor:
        with inputs.autocast():
            return chunked_distillation(
                inputs.hidden_ND,
                inputs.head_VD,
                inputs.labels_N,
                DenseTarget(lambda rows: target_NV[rows].float()),
                loss,
            )

    return {PLAIN: plain, OURS: chunked}


def backward(loss: Loss, inputs: Inputs) -> Tensor:
    """Once forward and backward; the gradients stand afterwards."""
    inputs.hidden_ND.grad = inputs.head_VD.grad = None
    value = loss()
    torch.autograd.backward(value)
    return value.detach()


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most that torch's allocator held at once during `work`, beyond what it held before."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    # Every allocation (+) and release (-) of the CPU allocator, those inside an operation included.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def compare(  # noqa: PLR0917
    losses: dict[str, Loss],
    inputs: Inputs,
    turns: int,
    about: dict[str, Any],
    report: Report,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """Error, memory and seconds of each contender."""
    found: dict[str, dict[str, Any]] = {}
    standard: tuple[Tensor, Tensor] | None = None
    for name, loss in losses.items():
        found[name] = {**about, "contender": name}
        try:
            value = backward(loss, inputs)
            assert inputs.head_VD.grad is not None
            if name == PLAIN:
                standard = value, inputs.head_VD.grad.clone()
            if standard is not None:
                error = (inputs.head_VD.grad - standard[1]).abs().max() / standard[1].abs().max()
                found[name] |= {
                    "loss_difference": float((value / standard[0] - 1).abs()),
                    "gradient_difference": float(error),
                }
            inputs.hidden_ND.grad = inputs.head_VD.grad = (
                None  # else their release would count against what comes
            )
            found[name]["peak_bytes"] = peak_bytes(partial(backward, loss, inputs), inputs.device)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            found[name]["error"] = "out of memory"
    standard = None
    fitting = {
        name: partial(backward, losses[name], inputs) for name, row in found.items() if "error" not in row
    }
    seconds = take_turns(fitting, turns, inputs.device, clock)
    for name, taken in seconds.items():
        found[name] |= {
            "seconds": spread(taken),
            "tokens_per_second": round(len(inputs.labels_N) / spread(taken)["median"]),
        }
        if PLAIN in seconds:
            found[name]["times_faster_than_plain"] = ratio(seconds[PLAIN], taken)
    report.add(*found.values())
    return list(found.values())


def row_of(result: dict[str, Any]) -> list[str]:
    name = f"{result['vocabulary']:,} {result['loss']} {result['contender']}"
    if "error" in result:
        return [name, result["error"], "", "", "", ""]
    faster = result.get("times_faster_than_plain")
    seconds = result["seconds"]
    return [
        name,
        f"{1e3 * seconds['median']:.1f}",
        f"{1e3 * seconds['low']:.1f} to {1e3 * seconds['high']:.1f}",
        f"{faster['median']:.2f} ({faster['low']:.2f} to {faster['high']:.2f})" if faster else "-",
        f"{result['peak_bytes'] / 1e6:,.0f}",
        f"{result['gradient_difference']:.0e}" if "gradient_difference" in result else "-",
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, NAME)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32_064, 128_256])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument(
        "--precision", choices=["bf16", "fp32"], default="bf16", help="of the matrix products"
    )
    parser.add_argument(
        "--distillation", action="store_true", help=f"also {', '.join(DISTILLATION)} against dense logits"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--contender", nargs="+", choices=[PLAIN, OURS, TORCH_WHOLE, TORCH], help="only these"
    )
    parser.add_argument(
        "--thread-clock",
        action="store_true",
        help="CPU: seconds that the calling thread computes; set OMP_WAIT_POLICY=PASSIVE",
    )
    given = parser.parse_args(arguments)
    if given.dry_run:
        given.device, given.vocabularies, given.tokens, given.hidden, given.turns = "cpu", [64], 32, 16, 2
    return given


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report, shown = Report(arguments.output, NAME, arguments.device, arguments), []
    for vocab in arguments.vocabularies:
        inputs = Inputs(arguments, vocab)
        about = {
            "vocabulary": vocab,
            "tokens": arguments.tokens,
            "hidden": arguments.hidden,
            "precision": arguments.precision,
        }
        for loss in ("cross_entropy", *(DISTILLATION if arguments.distillation else ())):
            losses = cross_entropies(inputs) if loss == "cross_entropy" else distillations(inputs, loss)
            losses = {name: work for name, work in losses.items() if name in (arguments.contender or losses)}
            clock = time.thread_time if arguments.thread_clock else time.perf_counter
            shown += compare(losses, inputs, arguments.turns, {**about, "loss": loss}, report, clock)
    report.finish()
    columns = ["vocabulary, loss, contender", "ms", "range", "x plain (range)", "peak MB", "gradient off by"]
    print(table(columns, [row_of(result) for result in shown]))


if __name__ == "__main__":
    main()
