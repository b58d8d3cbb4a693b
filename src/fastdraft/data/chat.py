"""Prompts and conversations as the target's chat template writes them, turn by turn, with its own answers.

Without a template a conversation is plain text: the system's words, then turns of `User: WORDS` and
`Assistant:`, apart by a blank line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdraft.errors import DataError, TargetError
from fastdraft.functional.generation import Generation, RenderedPrompt
from fastdraft.modeling.tokenizer import plain_prompt_ids, text_ids

Messages = Sequence[Mapping[str, str]]

ROLES = {role: role for role in ("system", "user", "assistant")}
ROLES |= {"developer": "system", "human": "user", "gpt": "assistant"}
# Marks between which models think, as published templates write them.
THINKING = [(f"<{w}>", f"</{w}>") for w in ("think", "thinking", "thought", "reasoning", "seed:think")]
THINKING.append(("[THINK]", "[/THINK]"))
# Models of the harmony format think in channels; the last one holds the answer.
CHANNEL, FINAL = "<|channel|>", "<|channel|>final<|message|>"
_TELLING = {mark for marks in THINKING for mark in marks} | {CHANNEL, "<|message|>"}
# Stand for what is said while a template is tried out; no template writes them by itself.
_SYSTEM, _WORDS, _ANSWER = "FASTDRAFTSYSTEMWORDS", "FASTDRAFTUSERWORDS", "FASTDRAFTANSWERWORDS"


@dataclass(frozen=True)
class Conversation:
    """What is said to the target; its own answers are not part of it."""

    users: tuple[str, ...]  # turn by turn; empty where the log has none
    system: str = ""

    @property
    def text(self) -> str:
        return "\n\n".join(part for part in (self.system, *self.users) if part)


Prompt = str | Conversation


def read_conversation(value: object, where: str) -> Conversation | None:
    """The conversation in a row's `messages` (OpenAI's role and content, or ShareGPT's from and value).

    Logged answers are passed over: the target gives its own. None for what cannot be asked again: tools,
    pictures, other roles, a system message after the beginning. `where` names the file and line in errors.
    """
    if not isinstance(value, list):
        found = f"{where}: a {type(value).__name__}; must be text or a list of messages"
        raise DataError(found, "set `field` to the one that holds them")
    system, users, follows_user = list[str](), list[str](), False
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
            users.append(f"{users.pop()}\n\n{content}" if follows_user else content)
            follows_user = True
    return Conversation(tuple(users), "\n\n".join(part for part in system if part.strip()))


def _message(message: object, where: str) -> tuple[str, str | None]:
    """Role and text; no text for what is more than text."""
    told: Mapping[str, Any] = message if isinstance(message, Mapping) else {}
    role, content = told.get("role", told.get("from")), told.get("content", told.get("value"))
    if isinstance(role, str):
        if told.get("tool_calls") or told.get("function_call"):
            return role, None
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            return role, "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
        if isinstance(content, str):
            return role, content
        if content is None and ROLES.get(role) == "assistant":
            return role, ""
    found = f"{where}: a message without role or text; each needs a `role` and a `content`"
    raise DataError(found, "correct or delete the line")


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer carries one."""
    return bool(getattr(tokenizer, "chat_template", None))


def render_text(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """The conversation as the template writes it, up to where the answer begins."""
    name = tokenizer.name_or_path
    if not has_chat_template(tokenizer):
        fix = "leave out prompts of kind magpie, or use a target with a template"
        raise TargetError(f"{name}: no chat template; chat prompts need one", fix)
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        found = f"chat templates {', '.join(sorted(tokenizer.chat_template))}; one must be the default"
        raise TargetError(f"{name}: {found}", "write the one to use to chat_template.jinja there")
    try:
        plain = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are programs: whatever they raise is about the template
        found = f"{name}: chat template failed ({str(error)[:80]}); it must render these messages"
        raise TargetError(found, "correct the template") from error


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> RenderedPrompt:
    """Token ids of the conversation up to where the answer begins; they know their messages."""
    return RenderedPrompt(text_ids(tokenizer, render_text(tokenizer, messages)), messages)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> list[int]:
    """One prompt: through the template if `chat` and there is one, else plain text behind BOS."""
    if chat and has_chat_template(tokenizer):
        return render_prompt(tokenizer, [{"role": "user", "content": text}])
    return plain_prompt_ids(tokenizer, text)


def first_prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool) -> list[int]:
    """A text, or a conversation (always through the template) up to where its first answer begins."""
    if isinstance(prompt, str):
        return prompt_ids(tokenizer, prompt, chat)
    first = Conversation(prompt.users[:1], prompt.system)
    return dialogue_format(tokenizer, [first]).prompt_ids(first, ())


def user_prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The template's beginning, behind which a model writes an instruction (Magpie, arXiv 2406.08464)."""
    return text_ids(tokenizer, _around_user_words(tokenizer)[0])


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The special token that the template puts right after the user's words, if there is one."""
    after = _around_user_words(tokenizer)[1]
    return frozenset(text_ids(tokenizer, after.lstrip())[:1]) & special_ids(tokenizer)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special and added tokens: none of them is part of what a user types."""
    return frozenset(map(int, [*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})]))


def _around_user_words(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    before, mark, after = render_text(tokenizer, [{"role": "user", "content": _WORDS}]).partition(_WORDS)
    if not mark:
        found = f"{tokenizer.name_or_path}: chat template drops the user's words; it must contain them once"
        raise TargetError(found, "leave out prompts of kind magpie")
    return before, after


@dataclass(frozen=True)
class DialogueFormat:
    """How one target reads conversations; made by `dialogue_format`."""

    tokenizer: PreTrainedTokenizerBase
    template: bool  # or plain text
    folds_system: bool = False  # the template takes no system message
    # The thinking mark that the template itself writes where an answer begins, so that no answer holds it.
    opened: str = ""

    @property
    def note(self) -> str:
        """What the user should know of it; empty for nothing."""
        at = "the chat template takes no system message, so it stands at the head of the first user turn"
        return at if self.folds_system else ""

    def prompt_ids(self, conversation: Conversation, answers: Sequence[str]) -> list[int]:
        """Token ids of the conversation up to where answer number `len(answers)` begins."""
        system, users = conversation.system, list(conversation.users[: len(answers) + 1])
        if not self.template:
            parts = [system] if system else []
            for words, said in zip(users, [*answers, ""], strict=False):
                blank = " " if said and not said[0].isspace() else ""
                parts.append(f"User: {words}\nAssistant:{blank}{said}")
            return prompt_ids(self.tokenizer, "\n\n".join(parts), chat=False)
        messages = []
        if system and self.folds_system:
            users[0] = f"{system}\n\n{users[0]}"
        elif system:
            messages.append({"role": "system", "content": system})
        for turn, words in enumerate(users):
            messages.append({"role": "user", "content": words})
            messages += [{"role": "assistant", "content": answer} for answer in answers[turn : turn + 1]]
        # From messages, as a server would: a template that strips earlier thinking strips it here too.
        return render_prompt(self.tokenizer, messages)

    def answer(self, generation: Generation) -> str | None:
        """What the target said, for later turns; None where none can follow: empty, or still thinking."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        hidden = {int(i) for i, token in added.items() if token.special and str(token) not in _TELLING}
        visible = [token for token in generation.body if token not in hidden]
        plain: Any = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        text = str(self.tokenizer.decode(visible, **plain))
        if not self.template:  # a base model goes on with the user's side
            text = text.split("\nUser:", maxsplit=1)[0].rstrip()
        elif CHANNEL in text:
            text = text.rpartition(FINAL)[2] if FINAL in text else ""
        else:
            text = f"{self.opened}{text}"
            if any(_is_open(text, *marks) for marks in THINKING):
                return None
        return text if text.strip() else None


def dialogue_format(tokenizer: PreTrainedTokenizerBase, talks: Sequence[Conversation]) -> DialogueFormat:
    """Tries out the template for these conversations; refuses one that cannot render their later turns."""
    if not has_chat_template(tokenizer):
        return DialogueFormat(tokenizer, template=False)
    first, folds = {"role": "user", "content": _WORDS}, False
    tail = render_text(tokenizer, [first]).rpartition(_WORDS)[2]
    if any(len(talk.users) > 1 for talk in talks):
        try:
            two_turns = [first, {"role": "assistant", "content": _ANSWER}, first]
            found = "" if _ANSWER in render_text(tokenizer, two_turns) else "drops earlier answers"
        except TargetError as error:
            found = f"cannot render earlier answers ({str(error.__cause__)[:80]})"
        if found:
            fix = "use prompts of one turn, or correct the template"
            raise TargetError(f"{tokenizer.name_or_path}: chat template {found}", fix)
    if any(talk.system for talk in talks):
        try:
            folds = _SYSTEM not in render_text(tokenizer, [{"role": "system", "content": _SYSTEM}, first])
        except TargetError:
            folds = True
    opened = next((tail[tail.rindex(marks[0]) :] for marks in THINKING if _is_open(tail, *marks)), "")
    return DialogueFormat(tokenizer, True, folds, opened)


def _is_open(text: str, begin: str, end: str) -> bool:
    return text.rfind(begin) > text.rfind(end)
