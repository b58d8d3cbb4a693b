"""A Hugging Face tokenizer as the fields of a GGUF file, as llama.cpp's converter writes them.

llama.cpp knows how texts fall into pieces by a name only: a tokenizer that has none is refused, in words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastdraft.errors import TargetError
from fastdraft.modeling.gguf_files import ARRAY, PADDING_TOKEN, STRING, GGUFField
from fastdraft.modeling.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPLITTINGS, UNKNOWN, UNUSED, USER_DEFINED
from fastdraft.target import Target

PREFIX = "tokenizer."
_UINT, _INT, _FLOAT, _BOOL = 4, 5, 6, 7  # types of values, of the specification
_LOWEST = -1e9  # the score of a token that no merge makes


def tokenizer_fields(target: Target) -> dict[str, GGUFField]:
    """Every `tokenizer.` field: copied where the model is a GGUF file, else made of its tokenizer files.

    TargetError where llama.cpp has no name for the tokenizer.
    """
    if target.gguf is not None:
        return {key: field for key, field in target.gguf.fields.items() if key.startswith(PREFIX)}
    state = json.loads(target.tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _unknown(target, f"a {model['type']} model; must be BPE")
    tokens, types = _tokens(target, state)
    fields: dict[str, GGUFField] = {}
    if (name := pre_tokenizer_name(state)) is not None:
        fields |= {"ggml.model": _text("gpt2"), "ggml.pre": _text(name)}
    elif _is_sentence_pieces(state):
        fields |= {"ggml.model": _text("llama"), "ggml.pre": _text("default")}
        fields["ggml.scores"] = GGUFField(ARRAY, _FLOAT, _scores(tokens, _merges(model)))
        fields["ggml.add_space_prefix"] = GGUFField(_BOOL, None, _has_prefix(state))
    else:
        raise _unknown(target, "it splits texts in a way that llama.cpp has no name for")
    fields["ggml.tokens"] = GGUFField(ARRAY, STRING, tokens)
    fields["ggml.token_type"] = GGUFField(ARRAY, _INT, types)
    if name is not None:
        fields["ggml.merges"] = GGUFField(ARRAY, STRING, [f"{a} {b}" for a, b in _merges(model)])
    tokenizer, vocabulary = target.tokenizer, target.vocabulary
    ids = {"bos": vocabulary.bos_token_id, "padding": vocabulary.pad_token_id}
    # A file names one EOS; llama.cpp finds the others by their words.
    ids |= {"eos": next(iter(vocabulary.eos_token_ids), None), "unknown": tokenizer.unk_token_id}
    fields |= {f"ggml.{key}_token_id": GGUFField(_UINT, None, n) for key, n in ids.items() if n is not None}
    around = tokenizer("a").input_ids
    for key, adds in (("bos", around[0] == ids["bos"]), ("eos", around[-1] in vocabulary.eos_token_ids)):
        fields[f"ggml.add_{key}_token"] = GGUFField(_BOOL, None, bool(adds))
    if isinstance(tokenizer.chat_template, str):
        fields["chat_template"] = _text(tokenizer.chat_template)
    return {PREFIX + key: field for key, field in fields.items()}


def pre_tokenizer_name(state: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a byte-level tokenizer splits texts; None where it has none."""
    found = state.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    normalizer = (state.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp reads texts as they are; NFC matters to few
        return None
    patterns: list[str] = []
    for part in parts[:-1]:
        kind, pattern = part.get("type"), part.get("pattern") or {}
        if kind == "Digits" and part.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "Split" and part.get("behavior") == "Isolated" and "Regex" in pattern:
            patterns.append(pattern["Regex"])
        else:
            return None
    if parts[-1].get("use_regex", True):
        patterns += SPLITTINGS["gpt-2"].patterns
    whole = bool(state["model"].get("ignore_merges"))
    for name, splitting in SPLITTINGS.items():
        if splitting.whole_words == whole and tuple(patterns) in (splitting.patterns, splitting.published):
            return name
    return None


def _tokens(target: Target, state: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Texts and types by id, as many as the model has rows."""
    size = target.vocabulary.size
    tokens, types = [PADDING_TOKEN.format(n) for n in range(size)], [UNUSED] * size
    for token, n in state["model"]["vocab"].items():
        is_byte = state["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[n], types[n] = token, BYTE if is_byte else NORMAL
    for added in state.get("added_tokens") or ():
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = state["model"].get("unk_token")
    if unknown in state["model"]["vocab"]:
        types[state["model"]["vocab"][unknown]] = UNKNOWN
    return tokens, types


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in pairs]


def _is_sentence_pieces(state: Mapping[str, Any]) -> bool:
    """BPE over whole texts with blanks as "▁" and bytes for what is unknown."""
    text = json.dumps([state.get("normalizer"), state.get("pre_tokenizer")], ensure_ascii=False)
    return bool(state["model"].get("byte_fallback")) and "▁" in text and '"Split"' not in text


def _has_prefix(state: Mapping[str, Any]) -> bool:
    """Whether a text gets a blank before it."""
    text = json.dumps([state.get("normalizer"), state.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """llama.cpp joins the neighbours whose joint token has the highest score: the earliest merge's."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), rank)
    return [-float(first[token]) if token in first else _LOWEST for token in tokens]


def _text(value: str) -> GGUFField:
    return GGUFField(STRING, None, value)


def _unknown(target: Target, why: str) -> TargetError:
    found = f"{target.location}: its tokenizer cannot stand in a GGUF file: {why}"
    return TargetError(found, "leave gguf out of export.formats")
