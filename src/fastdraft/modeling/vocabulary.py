"""What a target and its draft must share: one vocabulary, padding rows included; `check_same` names the first
difference.

A tokenizer is reduced to two digests, of its ordinary and of its special tokens, so that a draft may serve
every fine-tune that only renames or adds special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastdraft.errors import TargetError
from fastdraft.run_folder import digest


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that a model scores and what its tokenizer makes of them."""

    size: int  # rows of the embedding, padding rows included
    num_tokens: int  # ids that the tokenizer has a token for
    missing_ids: tuple[int, ...]  # ids below `size` without a token, which must never be proposed
    bos_token_id: int | None  # the tokenizer's own, whatever the model's config says
    eos_token_ids: tuple[int, ...]  # all ids that end a text, the tokenizer's first
    pad_token_id: int | None
    digest: str  # of the ordinary tokens: text, ids, merges, normalisation and splitting rules
    special_digest: str = ""  # of the special and added tokens and their ids

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form for manifests: the missing ids as ranges, for there may be many."""
        lists = {"missing_ids": id_ranges(self.missing_ids), "eos_token_ids": list(self.eos_token_ids)}
        return asdict(self) | lists


def id_ranges(ids: Sequence[int]) -> list[list[int]]:
    """Sorted ids as closed ranges: `(3, 4, 5, 9)` -> `[[3, 5], [9, 9]]`."""
    ranges: list[list[int]] = []
    for token_id in ids:
        if ranges and ranges[-1][1] == token_id - 1:
            ranges[-1][1] = token_id
        else:
            ranges.append([token_id, token_id])
    return ranges


def describe(tokenizer_state: str) -> tuple[frozenset[int], str, str]:
    """Ids that have a token, digests of the ordinary and of the special ones, from a tokenizer's JSON."""
    state = json.loads(tokenizer_state)
    model, added = state["model"], state.get("added_tokens") or []
    vocab = model.get("vocab") or {}
    # A Unigram model lists its tokens in the order of their ids.
    ordinary = vocab if isinstance(vocab, dict) else {entry[0]: index for index, entry in enumerate(vocab)}
    rules = {key: state.get(key) for key in ("normalizer", "pre_tokenizer")}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    ids = frozenset(ordinary.values()) | {int(token["id"]) for token in added}
    special = sorted((int(token["id"]), token["content"]) for token in added)
    return ids, digest([model.get("type"), ordinary, merges, rules]), digest(special)


def check_same(
    target: Vocabulary, draft: Vocabulary, *, special_tokens: bool = True, where: str = "draft vocabulary"
) -> None:
    """Refuses a draft that could not speak for the target, naming the first rule that fails.

    Special tokens, BOS and EOS may differ where the draft is about to be trained for another fine-tune of the
    family.
    """
    rules: list[tuple[str, object, object]] = [
        ("vocab_size, padding included, must be equal", draft.size, target.size),
        ("ordinary tokens, merges and splitting rules must be equal", draft.digest, target.digest),
    ]
    if special_tokens:
        rules += [
            ("special tokens and their ids must be equal", draft.special_digest, target.special_digest),
            ("the BOS token must be equal", draft.bos_token_id, target.bos_token_id),
            ("the EOS tokens must be equal", sorted(draft.eos_token_ids), sorted(target.eos_token_ids)),
        ]
    for rule, found, wanted in rules:
        if found != wanted:
            fix = "use a draft that was made for this target's tokenizer"
            raise TargetError(f"{where}: draft {found}, target {wanted}; {rule}", fix)
