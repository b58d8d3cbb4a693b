"""Tokenizers between GGUF fields and tokenizer.json, so that both give the ids of llama.cpp.

llama.cpp does not normalise text, so a tokenizer made from a file has no NFC even where the model's own has;
it matches control and user-defined tokens before anything else; it knows how to split a text by a name only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastdraft.modeling.gguf_files import PADDING_TOKEN, GGUFFile, adds

# Types of tokens, of the specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# llama.cpp's own for those two: it knows no case beyond ASCII.
_NO_LOWER, _NO_UPPER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"


def _by_case(upper: str, lower: str, ending: str, digits: str) -> str:
    start, rest = r"[^\r\n\p{L}\p{N}]?", _REST.replace(r"[\r\n]*", r"[\r\n/]*")
    return f"{start}{upper}*{lower}+{ending}|{start}{upper}+{lower}*{ending}|{digits}{rest}"


@dataclass(frozen=True)
class Splitting:
    """How a text falls into pieces before merging: by each pattern in turn, matches and what is between."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a piece that is a token is not merged
    published: tuple[str, ...] = ()  # the models' own patterns where llama.cpp's differ


# llama.cpp's names. The first of several for one splitting is what a new file gets.
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLITTINGS = {
    "gpt-2": Splitting((_GPT2,)),
    "smollm": Splitting((r"\p{N}", _GPT2)),
    "llama-bpe": Splitting((_WORDS + r"\p{N}{1,3}" + _REST,), whole_words=True),
    "dbrx": Splitting((_WORDS + r"\p{N}{1,3}" + _REST,)),
    "qwen2": Splitting((_WORDS + r"\p{N}" + _REST,)),
    "tekken": Splitting(
        (_by_case(_NO_LOWER, _NO_UPPER, "", r"\p{N}"),), True, (_by_case(_UPPER, _LOWER, "", r"\p{N}"),)
    ),
    "gpt-4o": Splitting(
        (_by_case(_NO_LOWER, _NO_UPPER, _ENDING, r"\p{N}{1,3}"),),
        published=(_by_case(_UPPER, _LOWER, _ENDING, r"\p{N}{1,3}"),),
    ),
}
_OTHER_NAMES = {
    "gpt-2": ("phi-2", "mpt", "olmo", "mellum", "a.x-4.0", "exaone4", "trillion"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"),
    "dbrx": ("smaug-bpe",),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "kormo"),
    "gpt-4o": ("llama4", "kanana2"),
}
_NAMED = SPLITTINGS | {other: SPLITTINGS[name] for name, others in _OTHER_NAMES.items() for other in others}

# At these a chat's turn or a text ends. llama.cpp takes them for control tokens whatever the file says.
_ENDS = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
}
_ENDS |= {"<|end_of_text|>", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<eos>", "<|return|>", "<|call|>"}
# After these of Phi-3 white space does not stand, but for the three.
_STRIPPED, _NOT_STRIPPED = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>")


def tokenizer_files(file: GGUFFile) -> dict[str, str]:
    """Names and contents of the tokenizer files of a Hugging Face directory."""
    tokens = [str(token) for token in _required(file, "tokens")]
    special = {name: file.value(f"tokenizer.ggml.{key}_token_id") for name, key in _NAMES.items()}
    if file.value("tokenizer.ggml.model") == "llama":  # llama.cpp's defaults
        special = {**special, **{k: v for k, v in _SPM_IDS.items() if special[k] is None}}
    config: dict[str, Any] = {
        f"{name}_token": tokens[index]
        for name, index in special.items()
        if index is not None and index < len(tokens)
    }
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"model_max_length": file.value("{arch}.context_length")}
    around = [config["bos_token"]] if adds(file.fields, "bos") and "bos_token" in config else []
    after = [config["eos_token"]] if adds(file.fields, "eos") and "eos_token" in config else []
    state = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        **_model(file, tokens),
        "post_processor": _template(around, after, tokens),
    }
    texts = {"tokenizer.json": state, "tokenizer_config.json": config}
    found = {name: json.dumps(text, ensure_ascii=False, indent=1) for name, text in texts.items()}
    template = file.value("tokenizer.chat_template")
    return found | ({"chat_template.jinja": template} if template else {})


_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SPM_IDS = {"bos": 1, "eos": 2, "unk": 0}


def _required(file: GGUFFile, key: str) -> Any:
    value = file.value(f"tokenizer.ggml.{key}")
    if value is None:
        fix = "take a file with the tokenizer inside"
        raise file.wrong(f"no tokenizer.ggml.{key}; a model's file holds its tokenizer", fix)
    return value


def end_ids(file: GGUFFile) -> list[int]:
    """All ids that end a text: those that the file names, then control tokens by which chats end a turn."""
    named = [file.value(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    types = file.value("tokenizer.ggml.token_type") or []
    tokens = _required(file, "tokens")
    turns = [n for n, kind in enumerate(types) if kind == CONTROL and tokens[n] in _ENDS]
    return [n for n in dict.fromkeys([*named, *turns]) if n is not None and n < len(tokens)]


def _model(file: GGUFFile, tokens: list[str]) -> dict[str, Any]:
    """The parts of tokenizer.json that make ids: model, splitting, normaliser, added tokens, decoder."""
    kind = _required(file, "model")
    types = list(file.value("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise file.wrong(f"{len(types)} types of {len(tokens)} tokens; must be as many")
    for n, token in enumerate(tokens):
        if token in _ENDS:
            types[n] = CONTROL
        elif types[n] == UNUSED and token == PADDING_TOKEN.format(n):
            types[n] = 0
    stripped = any(word in str(file.value("general.name", "")).lower() for word in _STRIPPED)
    looked_for = (UNKNOWN, CONTROL, USER_DEFINED)
    flags = {"single_word": False, "lstrip": False, "normalized": False}
    added = [
        {"id": n, "content": token, **flags, "rstrip": stripped and token not in _NOT_STRIPPED}
        | {"special": types[n] != USER_DEFINED}
        for n, token in enumerate(tokens)
        if types[n] in looked_for
    ]
    # As published tokenizers have it: what was added behind the ordinary tokens stands beside them only.
    ordinary = 1 + max((n for n, kind in enumerate(types) if kind and kind not in looked_for), default=-1)
    behind = len([n for n in range(ordinary, len(tokens)) if types[n]])
    holes = not all(types[: ordinary + behind])
    vocab = {t: n for n, t in enumerate(tokens) if types[n] and (holes or n < ordinary)}
    if kind == "gpt2":
        return {"added_tokens": added, **_byte_level(file, vocab)}
    if kind == "llama":
        return {"added_tokens": added, **_sentence_pieces(file, vocab, tokens)}
    rule = "must be gpt2 (byte-level BPE) or llama (SentencePiece BPE)"
    raise file.wrong(f"tokenizer.ggml.model {kind!r}; {rule}", "choose another model")


_BPE: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False}
_BPE |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": False}


def _byte_level(file: GGUFFile, vocab: dict[str, int]) -> dict[str, Any]:
    name = file.value("tokenizer.ggml.pre")
    if name not in _NAMED:
        rule = f"must be one of {', '.join(_NAMED)}"
        raise file.wrong(f"tokenizer.ggml.pre {name!r}; {rule}", "take the model as a Hugging Face directory")
    splitting = _NAMED[name]
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in splitting.patterns
    ]
    merges = []
    for merge in _required(file, "merges"):
        cut = merge.find(" ", 1)
        first, second = merge[:cut], merge[cut + 1 :]
        if not vocab.keys() >= {first, second, first + second}:
            rule = "must be two tokens with a blank between, and a token together"
            raise file.wrong(f"tokenizer.ggml.merges: {merge!r:.40}; {rule}")
        merges.append((first, second))
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, bytes_only]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {**_BPE, "ignore_merges": splitting.whole_words, "vocab": vocab, "merges": merges},
    }


def _sentence_pieces(file: GGUFFile, vocab: dict[str, int], tokens: list[str]) -> dict[str, Any]:
    """llama.cpp merges the two neighbours whose joint token has the highest score; merges say the same."""
    scores, pairs = _required(file, "scores"), []
    if len(scores) != len(tokens):
        raise file.wrong(f"{len(scores)} scores of {len(tokens)} tokens; must be as many")
    unknown = file.value("tokenizer.ggml.unknown_token_id", _SPM_IDS["unk"])
    if unknown >= len(tokens):
        raise file.wrong(f"tokenizer.ggml.unknown_token_id {unknown}; must be below {len(tokens)}")
    for token, n in vocab.items():
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                pairs.append((-scores[n], n, left, right))
    merges = [(tokens[left], tokens[right]) for _, _, left, right in sorted(pairs)]
    prefix = bool(file.value("tokenizer.ggml.add_space_prefix", True))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    normalizers = [*([{"type": "Prepend", "prepend": "▁"}] if prefix else []), spaces]
    how = {"unk_token": tokens[unknown], "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {**_BPE, **how, "vocab": vocab, "merges": merges},
    }


def _template(before: list[str], after: list[str], tokens: list[str]) -> dict[str, Any]:
    """What puts BOS and EOS around a text."""

    def one(kind: str, number: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": kind, "type_id": number}}
        return [
            *({"SpecialToken": {"id": token, "type_id": number}} for token in before),
            text,
            *({"SpecialToken": {"id": token, "type_id": number}} for token in after),
        ]

    special = {
        token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]} for token in (*before, *after)
    }
    pair = one("A", 0) + one("B", 1)
    return {"type": "TemplateProcessing", "single": one("A", 0), "pair": pair, "special_tokens": special}
