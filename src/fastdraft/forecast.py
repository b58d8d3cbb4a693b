"""What to expect before anything is run: speed-up from costs, and time, disk and memory from sizes.

Decides the model of acceptance used for forecasts (each further token is accepted with one constant chance) and the
rough machine rates behind "about 5 minutes". Rates are orders of magnitude: a run prints its own as it goes.
"""

from __future__ import annotations

import os

PAPER_K = 3
"""The num_speculative_tokens at which the paper prints acceptance rates."""
RATES = (0.3, 0.45, 0.6)
"""Acceptance rates at that K for which forecasts are shown: of prose, between, of code."""
WORTH = 1.05
"""Measured speed-up from which on a second model in memory is worth its trouble."""

_TRAINING_FLOPS = {"cpu": 5e10, "cuda": 1.5e14, "xpu": 2e13, "mps": 4e12}
"""Floating-point operations a second that a training step reaches; for `cpu` of one core."""
_WRITING_SHARE = 0.3
"""Writing text reaches this share of the training rate: one token at a time, batched."""


def block_efficiency(acceptance: float, num_speculative_tokens: int) -> float:
    """Tokens per round when each examined proposal is accepted with the same chance: 1 + a + ... + a^K.

    Args:
        acceptance: Conditional acceptance rate, accepted / examined, 0..1.
        num_speculative_tokens: K.

    Leviathan et al. 2023 (arXiv 2211.17192), equation 1.
    """
    return sum(acceptance**position for position in range(num_speculative_tokens + 1))


def acceptance_rate(acceptance: float, num_speculative_tokens: int) -> float:
    """Accepted / proposed for the same constant chance: (block_efficiency - 1) / K."""
    return (block_efficiency(acceptance, num_speculative_tokens) - 1) / num_speculative_tokens


def conditional_acceptance_rate(rate: float, num_speculative_tokens: int = PAPER_K) -> float:
    """The constant chance that gives this accepted / proposed at this K: the inverse of `acceptance_rate`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if acceptance_rate(middle, num_speculative_tokens) < rate else (low, middle)
        )
    return (low + high) / 2


def mbsu(block_efficiency: float, num_speculative_tokens: int, cost_ratio: float) -> float:
    """Memory-bound speed-up: block_efficiency / (K * cost_ratio + 1), the cost ratio being draft / target.

    FastDraft (arXiv 2411.11055), its memory-bound speed-up; cost by parameters, bytes or latency.
    """
    return block_efficiency / (num_speculative_tokens * cost_ratio + 1)


def mbsu_at(rate: float, num_speculative_tokens: int, cost_ratio: float, known_at: int = PAPER_K) -> float:
    """Memory-bound speed-up at any K for an acceptance rate (accepted / proposed) known at K = `known_at`."""
    acceptance = conditional_acceptance_rate(rate, known_at)
    return mbsu(block_efficiency(acceptance, num_speculative_tokens), num_speculative_tokens, cost_ratio)


def predicted_speedup(
    block_efficiency: float,
    num_speculative_tokens: int,
    draft_seconds: float,
    target_seconds_1: float,
    target_seconds_k1: float,
) -> float:
    """Wall-clock speed-up from measured costs.

    Args:
        block_efficiency: Generated tokens per round.
        num_speculative_tokens: K.
        draft_seconds: One draft token.
        target_seconds_1: One target pass over one token.
        target_seconds_k1: One target pass over K + 1 tokens.
    """
    return block_efficiency * target_seconds_1 / (num_speculative_tokens * draft_seconds + target_seconds_k1)


def training_rate(parameters: int, device: str = "cpu", threads: int = 0) -> float:
    """Training tokens a second, roughly: 6 operations per parameter and token (Kaplan et al. 2020, section 2.1).

    Args:
        parameters: Those that a token passes through (`Architecture.read_parameters`).
        device: `cpu`, `cuda`, `xpu` or `mps`, with or without an index.
        threads: CPU cores used; 0 for all.
    """
    kind = device.partition(":")[0]
    cores = (threads or os.cpu_count() or 1) if kind == "cpu" else 1
    return _TRAINING_FLOPS.get(kind, _TRAINING_FLOPS["cpu"]) * cores / (6 * max(parameters, 1))


def training_seconds(
    tokens: float,
    parameters: int,
    device: str = "cpu",
    threads: int = 0,
    tokens_per_second: float | None = None,
) -> float:
    """Seconds to train on `tokens` tokens, from a measured rate when there is one."""
    return tokens / (tokens_per_second or training_rate(parameters, device, threads))


def writing_seconds(tokens: float, parameters: int, device: str = "cpu", threads: int = 0) -> float:
    """Seconds for a model of so many parameters to write `tokens` tokens in batches."""
    return tokens / (3 * _WRITING_SHARE * training_rate(parameters, device, threads))


def scoring_seconds(tokens: float, parameters: int, device: str = "cpu", threads: int = 0) -> float:
    """Seconds for a model of so many parameters to read `tokens` tokens, whole texts at a time: a third of a training step."""
    return tokens / (3 * training_rate(parameters, device, threads))


def tokenize_seconds(tokens: float, workers: int = 0) -> float:
    """Seconds to tokenise and pack, at about 250 thousand tokens a second and core."""
    return tokens / (250_000 * (workers or os.cpu_count() or 1))


def shard_bytes(tokens: float, vocab_size: int) -> float:
    """Disk for packed token ids: two bytes each, four for a vocabulary of more than 65,536."""
    return tokens * (2 if vocab_size <= 2**16 else 4)


def checkpoint_bytes(parameters: int, resumable: bool = False) -> float:
    """Disk for one fp32 checkpoint; with the optimiser's two moments when training can go on from it."""
    return 4.0 * parameters * (3 if resumable else 1)


def synthetic_bytes(tokens: float) -> float:
    """Disk for rows written by the target: an id and a log-probability per token, prompts beside them, compressed."""
    return tokens * 9.0


def training_memory_bytes(  # noqa: PLR0917
    parameters: int,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    micro_batch_tokens: int,
) -> float:
    """Memory of a training step: fp32 weights, gradients and two moments, activations, and one chunk of logits.

    Activations are counted as about 16 values of the width and 4 of the feed-forward for each layer and token in fp32;
    logits as three fp32 copies of a chunk of at most 1024 tokens.
    """
    states = 16.0 * parameters
    activations = 4.0 * micro_batch_tokens * num_layers * (16 * hidden_size + 4 * intermediate_size)
    return states + activations + 12.0 * min(micro_batch_tokens, 1024) * vocab_size


def loading_bytes(parameters: int, bytes_per_parameter: float = 4.0) -> float:
    """Memory to hold a model's weights."""
    return parameters * bytes_per_parameter
