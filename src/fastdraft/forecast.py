"""What to expect before anything is run: speed-up from acceptance and costs; time, disk and memory from sizes.

Each further proposal is taken to be accepted with one constant chance. Rates are orders of magnitude: a run prints its own.
"""

from __future__ import annotations

import os

PAPER_K = 3
"""The num_speculative_tokens at which the paper prints acceptance rates."""
RATES = (0.3, 0.45, 0.6)
"""Acceptance rates at that K for which forecasts are shown: of prose, between, of code."""
WORTH = 1.05
"""Measured speed-up from which on a second model in memory is worth its trouble."""

# Floating-point operations a second that a training step reaches; for `cpu` of one core.
_TRAINING_FLOPS = {"cpu": 5e10, "cuda": 1.5e14, "xpu": 2e13, "mps": 4e12}
_WRITING_SHARE = 0.3  # of the training rate: one token at a time, batched
_TOKENS_PER_CORE = 250_000  # tokenised and packed a second


def block_efficiency(acceptance: float, num_speculative_tokens: int) -> float:
    """Tokens per round, 1 + a + ... + a^K, for a conditional acceptance rate a (Leviathan et al. 2023, equation 1)."""
    return sum(acceptance**position for position in range(num_speculative_tokens + 1))


def acceptance_rate(acceptance: float, num_speculative_tokens: int) -> float:
    """Accepted / proposed for the same constant chance: (block_efficiency - 1) / K."""
    return (block_efficiency(acceptance, num_speculative_tokens) - 1) / num_speculative_tokens


def conditional_acceptance_rate(rate: float, num_speculative_tokens: int = PAPER_K) -> float:
    """The constant chance that gives this accepted / proposed at this K: the inverse of `acceptance_rate`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if acceptance_rate(middle, num_speculative_tokens) < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def mbsu(block_efficiency: float, num_speculative_tokens: int, cost_ratio: float) -> float:
    """Memory-bound speed-up: block_efficiency / (K * cost_ratio + 1), the cost ratio being draft / target (arXiv 2411.11055)."""
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
    """Wall-clock speed-up from measured costs: one draft token, one target pass over 1 token, and over K + 1."""
    return block_efficiency * target_seconds_1 / (num_speculative_tokens * draft_seconds + target_seconds_k1)


def training_rate(parameters: int, device: str = "cpu", threads: int = 0) -> float:
    """Training tokens a second: 6 operations per parameter that a token passes through (Kaplan et al. 2020); 0 threads are all."""
    kind = device.partition(":")[0]
    cores = (threads or os.cpu_count() or 1) if kind == "cpu" else 1
    return _TRAINING_FLOPS.get(kind, _TRAINING_FLOPS["cpu"]) * cores / (6 * max(parameters, 1))


def training_seconds(tokens: float, parameters: int, device: str = "cpu", threads: int = 0) -> float:
    """For one pass over tokens."""
    return tokens / training_rate(parameters, device, threads)


def writing_seconds(tokens: float, parameters: int, device: str = "cpu", threads: int = 0) -> float:
    """For a model of so many parameters to write text in batches."""
    return tokens / (3 * _WRITING_SHARE * training_rate(parameters, device, threads))


def scoring_seconds(tokens: float, parameters: int, device: str = "cpu", threads: int = 0) -> float:
    """For a model to read text, whole texts at a time: a third of a training step."""
    return tokens / (3 * training_rate(parameters, device, threads))


def tokenize_seconds(tokens: float, threads: int = 0) -> float:
    """To tokenise and pack."""
    return tokens / (_TOKENS_PER_CORE * (threads or os.cpu_count() or 1))


def shard_bytes(tokens: float, vocab_size: int) -> float:
    """Packed token ids: two bytes each, four for a vocabulary of more than 65,536."""
    return tokens * (2 if vocab_size <= 2**16 else 4)


def checkpoint_bytes(parameters: int, resumable: bool = False) -> float:
    """One fp32 checkpoint; with the optimiser's two moments when training can go on from it."""
    return 4.0 * parameters * (3 if resumable else 1)


def synthetic_bytes(tokens: float) -> float:
    """Rows written by the target: an id and a log-probability per token, prompts beside them, compressed."""
    return tokens * 9.0


def training_memory_bytes(  # noqa: PLR0917
    parameters: int,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    micro_batch_tokens: int,
) -> float:
    """A training step: fp32 weights, gradients and two moments, activations, and one chunk of logits three times."""
    activations = 4.0 * micro_batch_tokens * num_layers * (16 * hidden_size + 4 * intermediate_size)
    return 16.0 * parameters + activations + 12.0 * min(micro_batch_tokens, 1024) * vocab_size


def loading_bytes(parameters: int, bytes_per_parameter: float = 4.0) -> float:
    """Memory to hold a model's weights."""
    return parameters * bytes_per_parameter
