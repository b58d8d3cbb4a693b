"""A conversation as the target reads it, turn by turn, with its own earlier answers in it.

Decides that the history of a turn is rendered from messages as a server would render it (a template that strips earlier thinking
strips it here too), while a turn's answer is never rendered: it is the ids that the target wrote. A template that takes no system
message gets it at the head of the first user turn. Without a template a conversation is plain text:

    SYSTEM

    User: FIRST QUESTION
    Assistant: FIRST ANSWER

    User: SECOND QUESTION
    Assistant:

where an answer ends, for the history, before the first line that begins with `User:` (a base model goes on with the user's side).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastdraft.data.chat import has_chat_template, prompt_ids, render_prompt, render_text
from fastdraft.data.conversation import Conversation, Prompt
from fastdraft.errors import TargetError
from fastdraft.functional.generation import Generation, RenderedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USER, ASSISTANT = "User:", "Assistant:"
THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)
"""Marks between which models think, as published templates write them."""
CHANNEL, FINAL = "<|channel|>", "<|channel|>final<|message|>"
"""Models of the harmony format think in channels; the last one holds the answer."""
_WORDS = ("FASTDRAFTSYSTEMWORDS", "FASTDRAFTUSERWORDS", "FASTDRAFTANSWERWORDS")
"""Stand for what is said while a template is tried; no template writes them by itself."""


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
        """A word for the user about what is not as the log has it; empty for nothing."""
        return (
            "the chat template takes no system message, so it stands at the head of the first user turn"
            if self.folds_system
            else ""
        )

    def prompt_ids(self, conversation: Conversation, answers: Sequence[str]) -> list[int]:
        """Token ids of the conversation up to where answer number `len(answers)` begins; with a template they know their messages.

        Raises:
            TargetError: when the template refuses it.
        """
        users = list(conversation.users[: len(answers) + 1])
        if not self.template:
            return prompt_ids(self.tokenizer, _joined(conversation.system, users, answers), chat=False)
        messages = []
        if conversation.system and self.folds_system:
            users[0] = f"{conversation.system}\n\n{users[0]}"
        elif conversation.system:
            messages.append({"role": "system", "content": conversation.system})
        for place, words in enumerate(users):
            messages.append({"role": "user", "content": words})
            messages += [{"role": "assistant", "content": answer} for answer in answers[place : place + 1]]
        return RenderedPrompt(render_prompt(self.tokenizer, messages), messages)

    def answer(self, generation: Generation) -> str | None:
        """What the target said, for the history of later turns; None where nothing can follow: it is empty, or still thinking."""
        ids = generation.response_ids[:-1] if generation.finish_reason == "stop" else generation.response_ids
        text = self._text(ids)
        if not self.template:
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
        return str(
            self.tokenizer.decode(visible, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )


def dialogue_format(tokenizer: PreTrainedTokenizerBase, turns: int = 1) -> DialogueFormat:
    """Tries out the target's template.

    Args:
        tokenizer: The target's.
        turns: The most turns that will be asked of it.

    Raises:
        TargetError: when the template refuses a user message, or, for more than one turn, a second one.
    """
    if not has_chat_template(tokenizer):
        return DialogueFormat(tokenizer, False, False, "")
    system, user, answer = _WORDS
    first = {"role": "user", "content": user}
    begin = render_text(tokenizer, [first])
    if turns > 1:
        rule, remedy = "must render earlier answers", "use prompts of one turn, or correct the template"
        try:
            second = render_text(tokenizer, [first, {"role": "assistant", "content": answer}, first])
        except TargetError as error:
            raise TargetError(tokenizer.name_or_path, error.found, rule, remedy) from None
        if answer not in second:
            raise TargetError(tokenizer.name_or_path, "chat template drops earlier answers", rule, remedy)
    try:
        folds = system not in render_text(tokenizer, [{"role": "system", "content": system}, first])
    except TargetError:
        folds = True
    tail = begin.rpartition(user)[2]
    opened = next((tail[tail.rindex(marks[0]) :] for marks in THINKING if _is_open(tail, *marks)), "")
    return DialogueFormat(tokenizer, True, folds, opened)


@dataclass(frozen=True)
class ConversationPlan:
    """What a source of conversations adds to the plan of its units."""

    format: DialogueFormat
    fields: dict[str, Any]
    """Of `data.units.UnitPlan`."""


def conversation_plan(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> ConversationPlan | None:
    """How a source's conversations are asked; a text among them is a conversation of one turn. None for texts only.

    Raises:
        TargetError: when the target's template cannot render them.
    """
    if not any(isinstance(prompt, Conversation) for prompt in prompts):
        return None
    talks = [prompt if isinstance(prompt, Conversation) else Conversation((prompt,)) for prompt in prompts]
    form = dialogue_format(tokenizer, max(len(talk.users) for talk in talks))
    if not any(talk.system for talk in talks):
        form = replace(form, folds_system=False)
    fields = {"size": len(talks), "chat": form.template, "conversation": talks.__getitem__}
    return ConversationPlan(form, {**fields, "encode": lambda index: form.prompt_ids(talks[index], ())})


def first_prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool) -> list[int]:
    """Token ids of a prompt; of a conversation up to where its first answer begins.

    Args:
        tokenizer: The target's.
        prompt: Text or conversation; a conversation always goes through the template if there is one.
        chat: Puts text into the template as a user message.

    Raises:
        TargetError: when the template refuses it.
    """
    if isinstance(prompt, Conversation):
        return dialogue_format(tokenizer).prompt_ids(prompt, ())
    return prompt_ids(tokenizer, prompt, chat)


def _joined(system: str, users: Sequence[str], answers: Sequence[str]) -> str:
    parts = [system] if system else []
    for place, words in enumerate(users):
        said = answers[place] if place < len(answers) else ""
        blank = " " if said and not said[0].isspace() else ""
        parts.append(f"{USER} {words}\n{ASSISTANT}{blank}{said}")
    return "\n\n".join(parts)


def _is_open(text: str, begin: str, end: str) -> bool:
    return text.rfind(begin) > text.rfind(end)
