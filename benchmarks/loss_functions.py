"""The loss function alone, forward and backward: seconds and memory of the ways from hidden states to a loss.

    python benchmarks/loss_functions.py --device cuda
    python benchmarks/loss_functions.py --device cpu --tokens 2048

For each vocabulary: `plain` holds all logits (`linear`, then `cross_entropy` in float32); `torch` is its own
`linear_cross_entropy` in chunks (torch 2.13 and newer), `torch, not chunked` the same without; `chunked` is
ours. With --distillation also the losses against a whole distribution of the target, ours in chunks beside
the same formula over all logits. Every contender starts from the same hidden states and float32 weights
(products in --precision, as under autocast) and ends at gradients of both, which are compared with those of
`plain`. Memory is the most that stood at any moment beyond the inputs, gradients included, as torch's
allocator counts it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

import torch
from machine import Report, options, ratio, spread, synchronize, table, take_turns, tell
from torch import Tensor, nn

from fastdraft.functional.distillation import DenseTarget, chunked_distillation, token_loss
from fastdraft.functional.losses import chunked_cross_entropy

NAME = "loss_functions"
PLAIN, TORCH_WHOLE, TORCH, OURS = "plain", "torch, not chunked", "torch", "chunked"
DISTILLATION = ("forward_kl", "tvd", "lk_hybrid")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Loss = Callable[[], Tensor]
"""Summed over tokens."""


class Inputs:
    """Random hidden states, head, labels and, for distillation, the target's logits: the same for all."""

    def __init__(self, given: argparse.Namespace, vocab: int) -> None:
        tokens, width, generator = given.tokens, given.hidden, torch.Generator().manual_seed(0)
        self.device, self.dtype = torch.device(given.device), DTYPES[given.precision]

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden_ND = draw(tokens, width).to(self.device).requires_grad_()
        self.head_VD = (draw(vocab, width) / width**0.5).to(self.device).requires_grad_()
        self.labels_N = torch.randint(vocab, (tokens,), generator=generator).to(self.device)
        if given.distillation:
            self.target_NV = draw(tokens, vocab).to(self.device, torch.bfloat16)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def logits(self) -> Tensor:
        with self.autocast():
            return nn.functional.linear(self.hidden_ND, self.head_VD)

    def low(self) -> tuple[Tensor, Tensor]:
        """For kernels that know no autocast; gradients reach the originals."""
        return self.hidden_ND.to(self.dtype), self.head_VD.to(self.dtype)


def cross_entropies(inputs: Inputs) -> dict[str, Loss]:
    """Contenders by name; those that this installation does not have are left out."""
    labels = inputs.labels_N

    def chunked() -> Tensor:
        with inputs.autocast():
            return chunked_cross_entropy(inputs.hidden_ND, inputs.head_VD, labels)

    def plain() -> Tensor:
        return nn.functional.cross_entropy(inputs.logits().float(), labels, reduction="sum")

    found: dict[str, Loss] = {PLAIN: plain, OURS: chunked}
    own = getattr(nn.functional, "linear_cross_entropy", None)
    how = getattr(nn, "LinearCrossEntropyOptions", None)
    if own and how:
        found[TORCH_WHOLE] = lambda: own(*inputs.low(), labels, reduction="sum")
        found[TORCH] = lambda: own(*inputs.low(), labels, reduction="sum", options=how())
    return found


def distillations(inputs: Inputs, name: str) -> dict[str, Loss]:
    """The named loss over all logits, and ours in chunks."""
    loss, target_NV, hidden_ND, head_VD = token_loss(name), inputs.target_NV, inputs.hidden_ND, inputs.head_VD

    def plain() -> Tensor:
        draft_NV = inputs.logits().float().log_softmax(-1)
        return loss.divergence(target_NV.float().log_softmax(-1), draft_NV).sum()

    def chunked() -> Tensor:
        target = DenseTarget(lambda rows: target_NV[rows].float())
        with inputs.autocast():
            return chunked_distillation(hidden_ND, head_VD, inputs.labels_N, target, loss)

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
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        work()
    # Every allocation (+) and release (-) of the CPU allocator, those inside an operation included.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def compare(
    losses: dict[str, Loss], inputs: Inputs, turns: int, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Error, memory and seconds of each contender; one that does not fit is written down as such."""
    found: dict[str, dict[str, Any]] = {}
    plain: tuple[Tensor, Tensor] | None = None
    for name, loss in losses.items():
        found[name] = {**about, "contender": name}
        try:
            value, grad = backward(loss, inputs), inputs.head_VD.grad
            if name == PLAIN:
                plain = value, grad.clone()
            if plain is not None:
                error = float((grad - plain[1]).abs().max() / plain[1].abs().max())
                found[name]["loss_difference"] = float((value / plain[0] - 1).abs())
                found[name]["gradient_difference"] = error
            # Else their release would count against what comes.
            grad = inputs.hidden_ND.grad = inputs.head_VD.grad = None
            found[name]["peak_bytes"] = peak_bytes(partial(backward, loss, inputs), inputs.device)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "memory" not in str(error):
                raise
            found[name]["error"] = "out of memory"
    plain = None
    fitting = {name: partial(backward, losses[name], inputs) for name in found if "error" not in found[name]}
    seconds = take_turns(fitting, turns, inputs.device)
    for name, taken in seconds.items():
        found[name]["seconds"] = spread(taken)
        if PLAIN in seconds:
            found[name]["times_faster_than_plain"] = ratio(seconds[PLAIN], taken)
    return list(found.values())


def row_of(one: dict[str, Any]) -> list[str]:
    name = f"{one['vocabulary']:,} {one['loss']} {one['contender']}"
    if "error" in one:
        return [name, one["error"], "", "", ""]
    faster, off = one.get("times_faster_than_plain"), one.get("gradient_difference")
    seconds = {key: 1e3 * value for key, value in one["seconds"].items()}
    memory = f"{one['peak_bytes'] / 1e6:,.0f}"
    return [name, tell(seconds, ".1f"), tell(faster) if faster else "-", memory, f"{off:.0e}" if off else "-"]


def main() -> None:
    parser = options(__doc__, NAME)
    add = parser.add_argument
    add("--vocabularies", type=int, nargs="+", default=[8192, 32_064, 128_256])
    add("--tokens", type=int, default=8192)
    add("--hidden", type=int, default=512)
    add("--precision", choices=DTYPES, default="bf16", help="of the matrix products")
    add("--distillation", action="store_true", help=f"also {', '.join(DISTILLATION)} against dense logits")
    add("--turns", type=int, default=5)
    given = parser.parse_args()
    if given.dry_run:
        given.device, given.vocabularies, given.tokens, given.hidden, given.turns = "cpu", [64], 32, 16, 2
    if given.threads:
        torch.set_num_threads(given.threads)
    report = Report(given.output, NAME, given.device, given)
    for vocab in given.vocabularies:
        inputs = Inputs(given, vocab)
        about = {"vocabulary": vocab, "tokens": given.tokens, "hidden": given.hidden}
        for loss in ("cross_entropy", *(DISTILLATION if given.distillation else ())):
            losses = cross_entropies(inputs) if loss == "cross_entropy" else distillations(inputs, loss)
            about |= {"precision": given.precision, "loss": loss}
            report.add(*compare(losses, inputs, given.turns, about))
    report.finish()
    columns = ["vocabulary, loss, contender", "ms", "x plain", "peak MB", "gradient off by"]
    print(table(columns, [row_of(one) for one in report.results]))


if __name__ == "__main__":
    main()
