"""A trained model with the vocabulary of another: each of its tokens is spelled in the model's own.

The usual start for a new token is the mean of the rows of its pieces (Gee et al., EMNLP 2022). Here the input
has the row of the last piece, which is what the model reads just before it goes on, and the head a mean in
which each piece weighs half of the one before it: the first decides whether the token is begun at all.
Embedding and head are then two matrices. Shapes: V the new vocabulary, D hidden.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fastdraft.target import Target

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # how sentencepiece writes it
_DECAY = 0.5
_CHARACTERS: dict[int, str] = bytes_to_unicode()  # of byte-level BPE
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}
_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def spell(target: Target, donor: Target) -> list[list[int]]:
    """For each of the target's ids, padding included, the donor's ids that spell it; empty where none do.

    A special token is the donor's of the same text or else of the same role, or its text.
    """
    reads, writes = target.tokenizer.backend_tokenizer, donor.tokenizer.backend_tokenizer
    size, by_bytes, own_bytes = donor.vocabulary.size, _is_byte_level(reads), _is_byte_level(writes)
    known = {str(token): int(i) for i, token in donor.tokenizer.added_tokens_decoder.items() if int(i) < size}
    added = {int(i): str(token) for i, token in target.tokenizer.added_tokens_decoder.items()}
    roles = {
        getattr(target.tokenizer, role): found
        for role in reversed(_ROLES)
        if (found := getattr(donor.tokenizer, role)) is not None and found < size
    }

    def pieces(token_id: int) -> list[int]:
        token = added.get(token_id, reads.id_to_token(token_id))
        if token is None:
            return []
        if token_id in added and token in known:
            return [known[token]]
        if token_id in added and token_id in roles:
            return [roles[token_id]]
        spelled = token.encode() if token_id in added else _as_bytes(token, by_bytes)
        return [found for found in _spelling(writes, spelled, own_bytes) if found < size]

    return [pieces(token_id) for token_id in range(target.vocabulary.size)]


def _is_byte_level(tokenizer: Any) -> bool:
    state = json.loads(tokenizer.to_str())
    return '"ByteLevel"' in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])


def _as_bytes(token: str, byte_level: bool) -> bytes:
    """What an ordinary token stands for in a text."""
    if byte_level:
        return b"".join(bytes([_BYTES[each]]) if each in _BYTES else each.encode() for each in token)
    if found := _BYTE.fullmatch(token):
        return bytes([int(found[1], 16)])
    return token.replace(_SPACE, " ").encode()


def _spelling(tokenizer: Any, text: bytes, byte_level: bool) -> list[int]:
    """The ids of a piece of text inside a text; byte by byte where it is none."""
    if byte_level:
        return [token.id for token in tokenizer.model.tokenize("".join(map(_CHARACTERS.__getitem__, text)))]
    try:
        found = tokenizer.model.tokenize(text.decode().replace(" ", _SPACE))
        return [token.id for token in found]
    except UnicodeDecodeError:
        ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text)
        return [token_id for token_id in ids if token_id is not None]


@torch.no_grad()
def transplant(model: PreTrainedModel, spelled: Sequence[Sequence[int]]) -> None:
    """Gives the model an embedding and a head [V, D] for these tokens, in place; mean rows where nothing
    spells one.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    inputs_VD = embedding.weight.mean(0).repeat(len(spelled), 1)
    outputs_VD = head.weight.mean(0).repeat(len(spelled), 1)
    found = [token_id for token_id, ids in enumerate(spelled) if ids]
    inputs_VD[found] = embedding.weight[[spelled[token_id][-1] for token_id in found]]
    for token_id in found:
        shares = _DECAY ** torch.arange(len(spelled[token_id]), dtype=head.weight.dtype)
        shares = (shares / shares.sum()).to(head.weight.device)
        outputs_VD[token_id] = shares @ head.weight[list(spelled[token_id])]
    embedding.weight, head.weight = nn.Parameter(inputs_VD), nn.Parameter(outputs_VD)
    embedding.num_embeddings = head.out_features = model.config.vocab_size = len(spelled)
    model.config.tie_word_embeddings = False
