"""A statistical test that text written with a proposer has the target's own distribution, and a toy pair for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import write_tokenizer
from fastdraft.decoding import speculative
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.decoding.reader import Readable
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.functional import verification
from fastdraft.functional.acceptance import add_counts
from fastdraft.functional.generation import Sampling
from fastdraft.functional.sampling import draw, probabilities, token_at
from fastdraft.functional.verification import verify_certain
from fastdraft.modeling.vocabulary import Vocabulary

SIZE, LENGTH = 5, 3  # ids of the toy; tokens whose joint distribution is tested
PROMPT = [0, 1, 2, 3, 4, 0, 1, 2, 3]


class TableReader:
    """Reads a `Table`; what is taken back is forgotten."""

    def __init__(self, table: Table, capacity: int) -> None:
        self.table, self.length = table, 0
        self.ids, self.phases = torch.full((capacity + 1,), SIZE), torch.arange(capacity) % LENGTH

    def read(self, ids_T: Tensor, keep: int = 1) -> Tensor:
        assert len(ids_T) >= keep
        start, self.length = self.length, self.length + len(ids_T)
        self.ids[start + 1 : self.length + 1] = ids_T
        self.table.num_read += len(ids_T)
        last = self.ids[self.length - keep : self.length + 1]
        return self.table.logits[self.phases[self.length - keep : self.length], last[:-1], last[1:]]

    def take_back(self, length: int) -> None:
        if length < self.length:
            self.ids[length + 1 : self.length + 1] = SIZE  # which no text holds
            self.length = length


class Table:
    """A `Readable` without a model: logits by the place and the last two tokens, [LENGTH, SIZE + 1, SIZE, SIZE].

    At every third place they begin afresh: a text behind a prompt of whole threes is of independent threes.
    """

    device = torch.device("cpu")
    columns: Tensor | None = None

    def __init__(self, logits: Tensor, context_length: int = 10_000) -> None:
        self.logits, self.context_length, self.num_read = logits, context_length, 0
        self.logits[2] = logits[2, 0, 0]
        self.logits[0] = logits[0, 0]

    def reader(self, capacity: int) -> TableReader:
        return TableReader(self, capacity)


def tables(context_length: int = 10_000) -> tuple[Table, Table]:
    """A target that mostly counts on, and a draft that is like it."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(LENGTH, SIZE + 1, SIZE, SIZE, generator=generator) for _ in range(2)]
    logits = 0.5 * noise[0] + 3.0 * torch.eye(SIZE).roll(1, 1)
    return Table(logits, context_length), Table(logits + 0.8 * noise[1], context_length)


TOY_SIZE, TOY_PROMPT = 6, [0, 1, 2, 3, 4, 0, 1]


def write_toy(folder: Path, seed: int) -> None:
    """A model of `TOY_SIZE` ids that mostly counts on; those of several seeds are like each other."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    sizes |= {"vocab_size": TOY_SIZE, "num_key_value_heads": 1, "max_position_embeddings": 32}
    torch.manual_seed(0)
    model, each = LlamaForCausalLM(LlamaConfig(**sizes, **none)), torch.eye(TOY_SIZE, 16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(each)
        noise = torch.randn(TOY_SIZE, 16, generator=generator)
        model.lm_head.weight.copy_(each.roll(1, 0) * 0.5 + 0.2 * noise)
    model.save_pretrained(folder)
    write_tokenizer(folder)


def recover_from_the_targets_own(patch: pytest.MonkeyPatch) -> None:
    """A wrong rule: what replaces a refused proposal is drawn from the target's probabilities as they are."""
    seen: list[Tensor] = []

    def remember(probs: Tensor, uniform: Tensor) -> Tensor:
        seen[:] = [probs]
        return token_at(probs, uniform)

    def verify(drawn: Tensor, proposed: Tensor) -> tuple[Tensor, Tensor]:
        accepted, _ = verify_certain(drawn, proposed)
        written = torch.cat([proposed, drawn[-1:]])
        written[accepted] = draw(seen[0][accepted][None])[0]
        return accepted, written

    patch.setattr(verification, "recovery", lambda target_probs, draft_probs: target_probs)
    patch.setattr(speculative, "token_at", remember)
    patch.setattr(speculative, "verify_certain", verify)


def accept_always(patch: pytest.MonkeyPatch) -> None:
    """Another wrong rule."""

    def drawn(target_probs: Tensor, draft_probs: Tensor, proposed: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        return torch.tensor(len(proposed)), torch.cat([proposed, draw(target_probs[-1:])])

    def certain(own: Tensor, proposed: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor(len(proposed)), torch.cat([proposed, own[-1:]])

    patch.setattr(speculative, "verify", drawn)
    patch.setattr(speculative, "verify_certain", certain)


WRONG_RULES: list[Callable[[pytest.MonkeyPatch], None]] = [recover_from_the_targets_own, accept_always]


@dataclass(frozen=True)
class Found:
    """What the test says of one way to write."""

    p_value: float  # of the texts, were they the target's own
    accepted_share: float  # of the proposals


def written(
    pair: tuple[Readable, Readable],
    sampling: Sampling,
    proposer: ProposerKind | None,
    texts: int = 2000,
    threes: int = 10,
    *,
    prompt: list[int] = PROMPT,
    size: int = SIZE,
    k: int = 3,
    **how: Any,
) -> Found:
    """Writes texts over `size` ids, each from its seed, and tests the joint distribution of three tokens.

    Of a model that has no `threes` in its texts write as many texts as there shall be samples, of one three.
    """
    vocabulary = Vocabulary(size, size, (), None, (), None, "")
    decoder = SpeculativeDecoder(*pair, vocabulary, k, proposer=proposer, **how)
    results = [decoder.generate(prompt, sampling, LENGTH * threes, seed) for seed in range(texts)]
    places = torch.tensor([result.generation.response_ids for result in results]).reshape(-1, LENGTH)
    cell = (places * size ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    seen, expected = cell.bincount(minlength=size**LENGTH), joint(pair[0], prompt, size, sampling)
    return Found(p_value(seen, expected), add_counts(result.counts for result in results).acceptance_rate)


def joint(target: Readable, prompt: list[int], size: int, sampling: Sampling) -> Tensor:
    """The probability of every text of `LENGTH` tokens, in the order of `itertools.product`."""
    probs = []
    for known in itertools.product(range(size), repeat=LENGTH - 1):
        ids = torch.tensor([*prompt, *known])
        logits = target.reader(len(ids)).read(ids, keep=LENGTH)
        each = probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p).double()
        chosen = [each[place, token] for place, token in enumerate(known)]
        probs.append(math.prod(chosen) * each[-1])
    return torch.cat(probs)


def p_value(seen: Tensor, expected_probs: Tensor) -> float:
    """Of the chi-squared statistic (Wilson and Hilferty, 1931); cells with few expected are joined."""
    expected, seen = expected_probs * seen.sum(), seen.double()
    if seen[expected < 1e-9].any():
        return 0.0
    rare = expected < 5
    counted = torch.cat([seen[~rare], seen[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = wanted > 1e-9
    statistic, freedom = float(((counted - wanted) ** 2 / wanted)[keep].sum()), int(keep.sum()) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    return 0.5 * math.erfc(z / 2**0.5)
