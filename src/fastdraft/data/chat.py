"""Prompts and conversations as the target's chat template writes them, turn by turn, with its own earlier answers.

`prompt_ids` renders text, `dialogue_format` conversations; `read_conversation` takes what the user said from a log. Without a template
a conversation is plain text: `User: WORDS`, then `Assistant:`, turns apart by a blank line, the system's words first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdraft.errors import DataError, TargetError
from fastdraft.functional.generation import Generation, RenderedPrompt

ROLES = {role: role for role in ("system", "user", "assistant")}
ROLES |= {"developer": "system", "human": "user", "gpt": "assistant"}
USER, ASSISTANT = "User:", "Assistant:"
# Marks between which models think, as published templates write them.
THINKING = [(f"<{w}>", f"</{w}>") for w in ("think", "thinking", "thought", "reasoning", "seed:think")]
THINKING.append(("[THINK]", "[/THINK]"))
# Models of the harmony format think in channels; the last one holds the answer.
CHANNEL, FINAL = "<|channel|>", "<|channel|>final<|message|>"
# Stand for what is said while a template is tried out; no template writes them by itself.
_SYSTEM, _WORDS, _ANSWER = "FASTDRAFTSYSTEMWORDS", "FASTDRAFTUSERWORDS", "FASTDRAFTANSWERWORDS"


@dataclass(frozen=True)
class Conversation:
    """What is said to the target; its own answers are not part of it."""

    users: tuple[str, ...]
    """The user's words, turn by turn; empty where the log has none."""
    system: str = ""

    @property
    def text(self) -> str:
        """Everything said, one paragraph each."""
        return "\n\n".join(part for part in (self.system, *self.users) if part)


Prompt = str | Conversation


def read_conversation(value: object, where: str) -> Conversation | None:
    """The conversation in a row's `messages` (OpenAI's role and content, or ShareGPT's from and value).

    Logged answers are passed over: the target gives its own at every turn. None for what cannot be asked again: tools, pictures, other
    roles, a system message after the beginning. `where` names the file and line in errors.
    """
    if not isinstance(value, list):
        raise DataError(
            f"{where}: a {type(value).__name__}; must be text or a list of messages",
            "set `field` to the one that holds them",
        )
    system: list[str] = []
    users: list[str] = []
    follows_user = False
    for message in value:
        role, content = _message(message, where)
        kind = ROLES.get(role)
        if content is None or kind is None or (kind == "system" and users):
            return None
        if kind == "system":
            system.append(content)
        elif kind == "assistant":
            follows_user = False
        elif content.strip():  # messages of the user that follow each other are one turn
            if follows_user:
                users[-1] += f"\n\n{content}"
            else:
                users.append(content)
            follows_user = True
    return Conversation(tuple(users), "\n\n".join(part for part in system if part.strip()))


def _message(message: object, where: str) -> tuple[str, str | None]:
    """Role and text; no text for what is more than text."""
    role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or not isinstance(role, str):
        raise DataError(
            f"{where}: a message without a role; each needs a `role` and a `content`",
            "correct or delete the line",
        )
    content = message.get("content", message.get("value"))
    if message.get("tool_calls") or message.get("function_call"):
        return role, None
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        return role, "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
    if content is None and ROLES.get(role) == "assistant":
        return role, ""
    if not isinstance(content, str):
        raise DataError(
            f"{where}: a message of '{role[:20]}' without text; each needs a `role` and a `content`",
            "correct or delete the line",
        )
    return role, content


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer carries one."""
    return bool(getattr(tokenizer, "chat_template", None))


def render_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """The conversation as the template writes it, up to where the answer begins."""
    if not has_chat_template(tokenizer):
        raise TargetError(
            f"{tokenizer.name_or_path}: no chat template; chat prompts need one",
            "leave out prompts of kind magpie, or use a target with a template",
        )
    try:
        plain = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are programs: whatever they raise is about the template
        found = f"chat template failed ({str(error)[:80]}); it must render one user message"
        raise TargetError(f"{tokenizer.name_or_path}: {found}", "correct the template") from error


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> RenderedPrompt:
    """Token ids of the conversation up to where the answer begins; they know their messages."""
    return RenderedPrompt(_encode(tokenizer, render_text(tokenizer, messages)), messages)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> list[int]:
    """Token ids of one prompt: through the template if `chat` and there is one, else plain text with the special tokens usual for it."""
    if chat and has_chat_template(tokenizer):
        return render_prompt(tokenizer, [{"role": "user", "content": text}])
    return [int(token) for token in tokenizer(text, verbose=False).input_ids]


def first_prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool) -> list[int]:
    """Token ids of a text, or of a conversation up to where its first answer begins (always through the template if there is one)."""
    if isinstance(prompt, str):
        return prompt_ids(tokenizer, prompt, chat)
    first = Conversation(prompt.users[:1], prompt.system)
    return dialogue_format(tokenizer, [first]).prompt_ids(first, ())


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
    """
    return _encode(tokenizer, _around_user_words(tokenizer)[0])


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The special token that the template puts right after the user's words, if there is one."""
    after = _around_user_words(tokenizer)[1]
    return frozenset(_encode(tokenizer, after.lstrip())[:1]) & special_ids(tokenizer)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special and added tokens: none of them is part of what a user types."""
    return frozenset(map(int, [*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})]))


def _around_user_words(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    before, mark, after = render_text(tokenizer, [{"role": "user", "content": _WORDS}]).partition(_WORDS)
    if not mark:
        raise TargetError(
            f"{tokenizer.name_or_path}: chat template drops the user's words; it must contain them once",
            "leave out prompts of kind magpie",
        )
    return before, after


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # Without adding special tokens: a template has written its own.
    return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False).input_ids]


@dataclass(frozen=True)
class DialogueFormat:
    """How one target reads conversations; made by `dialogue_format`."""

    tokenizer: PreTrainedTokenizerBase
    template: bool
    """False: plain text."""
    folds_system: bool
    """The template takes no system message: it stands at the head of the first user turn."""
    opened: str
    """The thinking mark that the template itself writes where an answer begins, so that no answer holds it; mostly empty."""

    @property
    def note(self) -> str:
        """What the user should know of how conversations are rendered; empty for nothing."""
        at = "the chat template takes no system message, so it stands at the head of the first user turn"
        return at if self.folds_system else ""

    def prompt_ids(self, conversation: Conversation, answers: Sequence[str]) -> list[int]:
        """Token ids of the conversation up to where answer number `len(answers)` begins."""
        users = list(conversation.users[: len(answers) + 1])
        if not self.template:
            return prompt_ids(self.tokenizer, _joined(conversation.system, users, answers), chat=False)
        messages = []
        if conversation.system and self.folds_system:
            users[0] = f"{conversation.system}\n\n{users[0]}"
        elif conversation.system:
            messages.append({"role": "system", "content": conversation.system})
        for turn, words in enumerate(users):
            messages.append({"role": "user", "content": words})
            messages += [{"role": "assistant", "content": answer} for answer in answers[turn : turn + 1]]
        # From messages, as a server would: a template that strips earlier thinking strips it here too.
        return render_prompt(self.tokenizer, messages)

    def answer(self, generation: Generation) -> str | None:
        """What the target said, for the history of later turns; None where nothing can follow: it is empty, or still thinking."""
        text = self._text(generation.body)
        if not self.template:  # a base model goes on with the user's side
            text = text.split(f"\n{USER}")[0].rstrip()
        elif CHANNEL in text:
            text = text.rpartition(FINAL)[2] if FINAL in text else ""
        else:
            text = f"{self.opened}{text}"
            if any(_is_open(text, *marks) for marks in THINKING):
                return None
        return text if text.strip() else None

    def _text(self, ids: Sequence[int]) -> str:
        """The answer as text, its special tokens left out except those that mark thinking."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        kept = {mark for marks in THINKING for mark in marks} | {CHANNEL, "<|message|>"}
        hidden = {int(i) for i, token in added.items() if token.special and str(token) not in kept}
        visible = [token for token in ids if token not in hidden]
        plain: Any = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(visible, **plain))


def dialogue_format(tokenizer: PreTrainedTokenizerBase, talks: Sequence[Conversation]) -> DialogueFormat:
    """Tries out the target's template for these conversations; refuses a template that cannot render their later turns."""
    if not has_chat_template(tokenizer):
        return DialogueFormat(tokenizer, False, False, "")
    first = {"role": "user", "content": _WORDS}
    begin = render_text(tokenizer, [first])
    if any(len(talk.users) > 1 for talk in talks):
        _check_later_turns(tokenizer, [first, {"role": "assistant", "content": _ANSWER}, first])
    folds = False
    if any(talk.system for talk in talks):
        try:
            folds = _SYSTEM not in render_text(tokenizer, [{"role": "system", "content": _SYSTEM}, first])
        except TargetError:
            folds = True
    tail = begin.rpartition(_WORDS)[2]
    opened = next((tail[tail.rindex(marks[0]) :] for marks in THINKING if _is_open(tail, *marks)), "")
    return DialogueFormat(tokenizer, True, folds, opened)


def _check_later_turns(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> None:
    fix = "use prompts of one turn, or correct the template"
    try:
        second = render_text(tokenizer, messages)
    except TargetError as error:
        found = f"chat template cannot render earlier answers ({str(error.__cause__)[:80]})"
        raise TargetError(f"{tokenizer.name_or_path}: {found}", fix) from None
    if _ANSWER not in second:
        raise TargetError(
            f"{tokenizer.name_or_path}: chat template drops earlier answers; it must render them", fix
        )


def _joined(system: str, users: Sequence[str], answers: Sequence[str]) -> str:
    parts = [system] if system else []
    for turn, words in enumerate(users):
        said = answers[turn] if turn < len(answers) else ""
        blank = " " if said and not said[0].isspace() else ""
        parts.append(f"{USER} {words}\n{ASSISTANT}{blank}{said}")
    return "\n\n".join(parts)


def _is_open(text: str, begin: str, end: str) -> bool:
    return text.rfind(begin) > text.rfind(end)
