"""Prompts as the target's chat template writes them.

Decides that a template is rendered to text first and encoded without adding special tokens (the template has written
them), that a target without a template gets plain text, and where inside a template a user's words would begin and end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastdraft.errors import TargetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "FASTDRAFTUSERWORDS"
"""Stands for the user's words while the template is taken apart; no template writes it by itself."""


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer carries a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """The conversation as the template writes it, up to where the answer begins.

    Raises:
        TargetError: when there is no template or it refuses these messages.
    """
    if not has_chat_template(tokenizer):
        remedy = "leave out prompts of kind magpie, or use a target with a template"
        raise TargetError(tokenizer.name_or_path, "no chat template", "chat prompts need one", remedy)
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates are programs: whatever they raise is about the template
        found = f"chat template failed ({str(error)[:80]})"
        raise TargetError(
            tokenizer.name_or_path, found, "must render one user message", "correct it"
        ) from error
    return str(text)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of the conversation, up to where the answer begins.

    Raises:
        TargetError: when there is no template or it refuses these messages.
    """
    return _encode(tokenizer, render_text(tokenizer, messages))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> list[int]:
    """Token ids of one prompt: through the template if `chat` and there is one, else plain text with the special tokens usual for it."""
    if chat and has_chat_template(tokenizer):
        return render_prompt(tokenizer, [{"role": "user", "content": text}])
    return [int(token) for token in tokenizer(text, verbose=False).input_ids]


def plain_prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before plain text, such as a BOS id; empty for many."""
    with_special = [int(token) for token in tokenizer("a").input_ids]
    without = _encode(tokenizer, "a")
    for length in range(len(with_special) - len(without) + 1):
        if with_special[length : length + len(without)] == without:
            return with_special[:length]
    return []


def user_prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The template's beginning, up to where a user's words would stand: given only this, a chat model writes an instruction.

    Source: Magpie (arXiv 2406.08464), section 2.1.

    Raises:
        TargetError: when there is no template, or it does not show where the user's words stand.
    """
    return _encode(tokenizer, _around_user_words(tokenizer)[0])


def user_words(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str | None:
    """What a user says in a rendered prompt, for servers that render it themselves; None unless rendering gives these very ids."""
    if not has_chat_template(tokenizer):
        return None
    before, after = _around_user_words(tokenizer)
    text = str(tokenizer.decode(list(prompt), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if not (text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)):
        return None
    words = text[len(before) : len(text) - len(after)]
    return words if render_prompt(tokenizer, [{"role": "user", "content": words}]) == list(prompt) else None


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The special token that the template puts right after the user's words, if there is one.

    Raises:
        TargetError: when there is no template, or it does not show where the user's words stand.
    """
    after = _around_user_words(tokenizer)[1]
    return frozenset(_encode(tokenizer, after.lstrip())[:1]) & special_ids(tokenizer)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special and added tokens: none of them is part of what a user types."""
    return frozenset(map(int, tokenizer.all_special_ids)) | frozenset(
        map(int, getattr(tokenizer, "added_tokens_decoder", {}))
    )


def _around_user_words(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    text = render_text(tokenizer, [{"role": "user", "content": _MARK}])
    before, mark, after = text.partition(_MARK)
    if not mark:
        found = "chat template drops the user's words"
        raise TargetError(
            tokenizer.name_or_path, found, "must contain them once", "leave out prompts of kind magpie"
        )
    return before, after


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
