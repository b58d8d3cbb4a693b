"""A model's tokenizer as its files say it, and texts as its ids.

Releases 5 of transformers let the class that tokenizer_config.json names put its own rules over those of
tokenizer.json. Here that file is read as it is, as llama.cpp and the library `tokenizers` read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from fastdraft.errors import TargetError
from fastdraft.modeling.model_files import ModelFiles, one_line, quiet

_ROWLESS = "tokens_without_row"
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
# What tokenizers differ in: words, digits, code, white space, scripts; text behind special tokens is added.
_PROBES = (
    "The lead, it's 1234567.",
    "def f(x):\n    return x != 0x1F\n",
    " a  b\t\tc\n\n\n  d",
    "数学は楽しい 😀é",
)
_AGAIN = "save it as tokenizer.json with the class that it was made with"


class UnknownId(TargetError):
    """A text holds a token for which the model has no row."""


def load_tokenizer(files: ModelFiles, size: int) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """A fast tokenizer for a model of `size` rows, and what was changed or chosen in reading it."""
    notes: list[str] = []
    with one_line(files.where):
        settings = _settings(files, "tokenizer_config.json")
        if files.find("tokenizer.json"):
            # A setting may have special tokens split, and with them those that the chat template writes.
            options: Any = {"revision": files.revision, "split_special_tokens": False}
            tokenizer = PreTrainedTokenizerFast.from_pretrained(files.location, **options)
        else:
            tokenizer = _build(files, notes)
        tokenizer.decode(tokenizer("A fox.").input_ids)  # a damaged one may load and fail at a text
        added = tokenizer.added_tokens_decoder
        setattr(tokenizer, _ROWLESS, {int(i): str(token) for i, token in added.items() if int(i) >= size})
        model = tokenizer.backend_tokenizer.model
        if dropout := getattr(model, "dropout", None):
            model.dropout = None
            notes.append(f"The tokenizer drops merges at random ({dropout:g}): that is switched off.")
        notes += _choose_template(files, tokenizer, settings)
    return tokenizer, notes


def _build(files: ModelFiles, notes: list[str]) -> Any:
    """What transformers makes of older files; it may take a class that cannot read them, without a word."""
    vocab, pieces = files.find("vocab.json"), files.find("tokenizer.model")
    if not (vocab and files.find("merges.txt")):
        if not pieces:
            fix = "copy the model's tokenizer files here"
            raise files.wrong("no tokenizer.json; a fast tokenizer is required", fix)
        # A sentencepiece model is a message that begins with its first piece; tiktoken's are lines of base64.
        library = "sentencepiece" if pieces.read_bytes()[:1] == b"\n" else "tiktoken"
        if find_spec(library) is None:
            found = f"no tokenizer.json; reading tokenizer.model needs {library}, which is not installed"
            raise files.wrong(found, f"pip install {library}, or {_AGAIN}")
    options = {"revision": files.revision, "trust_remote_code": False}
    tokenizer: Any = AutoTokenizer.from_pretrained(files.location, **options)
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise files.wrong(f"{name} is slow; a fast tokenizer is required", _AGAIN)
    read = "vocab.json and merges.txt" if vocab else "tokenizer.model"
    if vocab and len(tokenizer) < len(json.loads(vocab.read_text(encoding="utf-8"))):
        raise files.wrong(f"no tokenizer.json; transformers takes {name}, which does not read {read}", _AGAIN)
    notes.append(f"No tokenizer.json: the rules are those of transformers' {name}, over {read}.")
    return tokenizer


def _settings(files: ModelFiles, name: str) -> dict[str, Any]:
    """An optional JSON file of a model; empty where there is none, or where the hub cannot be asked."""
    missing = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    path = cached_file(files.location, name, revision=files.revision, **missing)
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except ValueError as error:
        raise TargetError(f"{path}: not JSON ({error})", "fetch the model again") from None
    if not isinstance(value, dict):
        raise TargetError(
            f"{path}: a JSON {type(value).__name__}; must be an object", "fetch the model again"
        )
    template = value.get("chat_template") or ""
    entries = template if isinstance(template, list) else []
    named = all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in entries)
    if not (named and isinstance(template, str | dict | list)):
        rule = "must be text, or a list of {name, template}"
        raise TargetError(f"{path}: chat_template {template!r:.40}; {rule}", "fetch the model again")
    return value


def _choose_template(files: ModelFiles, tokenizer: Any, settings: dict[str, Any]) -> Iterator[str]:
    """Joins the templates of all places by name, the tokenizer's own first; tells what is not plain."""

    def by_name(told: Any) -> dict[str, str]:
        if isinstance(told, list):
            return {entry["name"]: entry["template"] for entry in told}
        return dict(told) if isinstance(told, dict) else {"default": told} if told else {}

    named = by_name(settings.get("chat_template"))
    named |= by_name(tokenizer.chat_template)
    processor = by_name(_settings(files, "chat_template.json").get("chat_template"))
    if "default" in processor and "default" not in named:
        yield "The chat template is the processor's, of chat_template.json."
    elif processor.get("default", named.get("default")) != named.get("default"):
        yield "chat_template.json holds another chat template than the tokenizer's, which is the one used."
    named = processor | named
    tokenizer.chat_template = named if set(named) - {"default"} else named.get("default")
    names = ", ".join(sorted(named))
    if "default" in named and len(named) > 1:
        yield f"Several chat templates ({names}): `default` is used."
    elif named and "default" not in named:
        yield f"Chat templates {names}, and none is the default: chat prompts are refused."


def rowless_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Added tokens behind the model's last row, by id: they can be neither fed nor proposed."""
    found: dict[int, str] = getattr(tokenizer, _ROWLESS, {})
    return found


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text alone, special tokens in it read as such; a token without a row is refused."""
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
    rowless = rowless_tokens(tokenizer)
    if rowless and (unknown := next((i for i in ids if i in rowless), None)) is not None:
        found = f"{tokenizer.name_or_path}: a text holds {rowless[unknown]} (id {unknown})"
        raise UnknownId(f"{found}, for which the model has no row", "leave that text out")
    return ids


def ids_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text, such as BOS, and behind it, such as EOS; both empty for many."""
    whole, inner = [int(token) for token in tokenizer("a").input_ids], text_ids(tokenizer, "a")
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    return [], []


def plain_prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Plain text that a model goes on with: no EOS behind it, whatever the tokenizer adds to a text."""
    return [*ids_around(tokenizer)[0], *text_ids(tokenizer, text)]


def class_trap(files: ModelFiles, tokenizer: PreTrainedTokenizerBase) -> str:
    """Where transformers' own choice of a class reads text otherwise than tokenizer.json; else empty."""
    declared = _settings(files, "tokenizer_config.json").get("tokenizer_class")
    if declared in _PLAIN or not files.find("tokenizer.json"):
        return ""
    marks = [
        mark for mark in tokenizer.all_special_tokens[:4] if mark not in rowless_tokens(tokenizer).values()
    ]
    probes = [*_PROBES, *(f"x{mark}y {mark} z" for mark in marks)]
    says = f"tokenizer_class {declared}" if declared else "No tokenizer_class"
    try:
        with quiet():
            options = {"revision": files.revision, "trust_remote_code": False}
            other: Any = AutoTokenizer.from_pretrained(files.location, **options)
        differ = [text for text in probes if other(text).input_ids != tokenizer(text).input_ids]
    except Exception as error:  # each class has errors of its own
        return f"{says}: transformers fails at it ({str(error)[:60]}); tokenizer.json is read as it is."
    if not differ:
        return ""
    return (
        f"{says}: transformers 5 puts the rules of {type(other).__name__} over those of tokenizer.json and "
        f"reads {differ[0]!r} otherwise. Here the file counts, as in llama.cpp; a runtime on transformers 5 "
        "needs the class PreTrainedTokenizerFast in tokenizer_config.json, of target and exported draft."
    )
