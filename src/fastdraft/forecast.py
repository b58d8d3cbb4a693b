"""What to expect before anything is run: speed-up from acceptance; time, disk, memory from sizes.

Each proposal is taken to be accepted with one constant chance. Rates are orders of magnitude.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

PAPER_K = 3  # the num_speculative_tokens at which the paper prints acceptance rates
RATES = (0.3, 0.45, 0.6)  # acceptance rates at that K for which forecasts are shown: prose, between, code
WORTH = 1.05  # measured speed-up from which on a second model in memory is worth its trouble

# Floating-point operations a second that a training step reaches; for `cpu` of one core.
_TRAINING_FLOPS = {"cpu": 5e10, "cuda": 1.5e14, "xpu": 2e13, "mps": 4e12}
# Of the training rate: one token at a time, batched. OpenVINO's whole numbers reach 1 to 2 times it on a CPU.
WRITING_SHARE, OPENVINO_SHARE = 0.3, 1.0
_TOKENS_PER_CORE = 250_000  # tokenised and packed a second


def block_efficiency(acceptance: float, num_speculative_tokens: int) -> float:
    """Tokens per round, 1 + a + ... + a^K, for a conditional acceptance rate a (arXiv 2211.17192, eq. 1)."""
    return sum(acceptance**position for position in range(num_speculative_tokens + 1))


def acceptance_rate(acceptance: float, num_speculative_tokens: int) -> float:
    """Accepted / proposed for the same constant chance: (block_efficiency - 1) / K."""
    return (block_efficiency(acceptance, num_speculative_tokens) - 1) / num_speculative_tokens


def conditional_acceptance_rate(rate: float, num_speculative_tokens: int = PAPER_K) -> float:
    """The constant chance of this accepted / proposed: the inverse of `acceptance_rate`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = acceptance_rate(middle, num_speculative_tokens) < rate
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def mbsu(block_efficiency: float, num_speculative_tokens: float, cost_ratio: float) -> float:
    """Memory-bound speed-up: block_efficiency / (K * cost_ratio + 1), cost draft : target (2411.11055)."""
    return block_efficiency / (num_speculative_tokens * cost_ratio + 1)


def mbsu_at(rate: float, num_speculative_tokens: int, cost_ratio: float, known_at: int = PAPER_K) -> float:
    """Memory-bound speed-up at any K for an acceptance rate (accepted / proposed) known at K = `known_at`."""
    acceptance = conditional_acceptance_rate(rate, known_at)
    return mbsu(block_efficiency(acceptance, num_speculative_tokens), num_speculative_tokens, cost_ratio)


def predicted_speedup(
    block_efficiency: float,
    num_speculative_tokens: float,
    draft_seconds: float,
    target_seconds_1: float,
    target_seconds_k1: float,
) -> float:
    """Wall-clock speed-up from measured costs: a draft token, a target pass over 1 token, over K + 1."""
    return block_efficiency * target_seconds_1 / (num_speculative_tokens * draft_seconds + target_seconds_k1)


def lookup_speedup(
    block_efficiency: float,
    num_speculative_tokens: int,
    finds: float,
    target_seconds: Mapping[int, float],
    draft_seconds: float = 0.0,
    caught_up_seconds: float = 0.0,
    num_lookup_tokens: int | None = None,
) -> float:
    """`predicted_speedup` of lookup alone, or with a draft in the rounds for which it finds nothing.

    `finds`: the share of rounds with a find; `target_seconds` by the tokens of a pass; `draft_seconds` of a
    draft's token, 0 without a draft; `caught_up_seconds` a round, for what the draft reads after lookup;
    `num_lookup_tokens`, None for K, are those of a find.
    """
    k, alone = num_speculative_tokens, target_seconds[1]
    found = target_seconds[(k if num_lookup_tokens is None else num_lookup_tokens) + 1]
    # Lookup alone reads a single token where it finds nothing; looking up costs nothing beside a pass.
    rest = target_seconds[k + 1] if draft_seconds else alone
    wide = finds * found + (1 - finds) * rest + caught_up_seconds
    return predicted_speedup(block_efficiency, k * (1 - finds), draft_seconds, alone, wide)


def training_seconds(tokens: float, parameters: int, device: str = "cpu", threads: int = 0) -> float:
    """One pass over tokens: 6 operations per parameter that each goes through (Kaplan et al. 2020)."""
    kind = device.partition(":")[0]
    cores = (threads or os.cpu_count() or 1) if kind == "cpu" else 1
    return tokens * 6 * max(parameters, 1) / (_TRAINING_FLOPS.get(kind, _TRAINING_FLOPS["cpu"]) * cores)


def scoring_seconds(tokens: float, parameters: int, device: str = "cpu", threads: int = 0) -> float:
    """For a model to read text, whole texts at a time: a third of a training step."""
    return training_seconds(tokens, parameters, device, threads) / 3


def writing_seconds(
    tokens: float, parameters: int, device: str = "cpu", threads: int = 0, share: float = WRITING_SHARE
) -> float:
    """For a model of so many parameters to write text in batches."""
    return scoring_seconds(tokens, parameters, device, threads) / share


def tokenize_seconds(tokens: float, threads: int = 0) -> float:
    """On this machine."""
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


def training_memory_bytes(
    parameters: int, vocab_size: int, hidden_size: int, intermediate_size: int, layers: int, micro_batch: int
) -> float:
    """Of a step: fp32 weights, gradients, two moments, activations, one chunk of logits three times."""
    activations = 4.0 * micro_batch * layers * (16 * hidden_size + 4 * intermediate_size)
    return 16.0 * parameters + activations + 12.0 * min(micro_batch, 1024) * vocab_size
