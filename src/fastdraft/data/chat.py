"""Prompts and conversations as the target's chat template writes them, turn by turn, with its own answers.

chat = ChatTemplate(tokenizer, arguments, date); chat.prompt_ids("Why?"); chat.prompt_ids(talk, answers)
Without a template a conversation is plain text: the system's words, then turns of `User: WORDS` and
`Assistant:`, apart by a blank line.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdraft.errors import TargetError
from fastdraft.functional.generation import Generation, RenderedPrompt
from fastdraft.modeling.tokenizer import plain_prompt_ids, text_ids

Messages = Sequence[Mapping[str, str]]

# Marks between which models think, as templates write them; others are found among a tokenizer's tokens.
THINKING = [(f"<{w}>", f"</{w}>") for w in ("think", "thinking", "thought", "reasoning", "seed:think")]
THINKING.append(("[THINK]", "[/THINK]"))
_LONGEST_OPENING = 16  # tokens that a template may write behind the mark
# How a list of parts looks where a template writes it out instead of its text.
_WRITTEN_OUT = re.compile(r"""['"]type['"]: ?['"]text['"]""")
_THINKS, _BEGINS = re.compile("think|thought|reason"), re.compile("start|begin|open")
# Models of the harmony format think in channels; the last one holds the answer.
CHANNEL, FINAL = "<|channel|>", "<|channel|>final<|message|>"
# Stand for what each role says while a template is tried out; no template writes them by itself.
_MARKS = {role: f"FASTDRAFT{role.upper()}WORDS" for role in ("user", "system", "assistant")}


@dataclass(frozen=True)
class Conversation:
    """What is said to the target; its own answers are not part of it."""

    users: tuple[str, ...]  # turn by turn; empty where the log has none
    system: str = ""

    @property
    def text(self) -> str:
        return "\n\n".join(part for part in (self.system, *self.users) if part)


Prompt = str | Conversation


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """How one target reads prompts; every prompt is rendered here.

    What the template does with the words of a role is tried once, with a mark: it must stand in the prompt
    exactly once, given as text, or as the list of parts that templates of picture models take.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any] = field(default_factory=dict)  # variables of the template
    date: datetime.date | None = None  # what a template that asks for today is told; None: today
    _forms: dict[str, tuple[bool, str]] = field(default_factory=dict)  # by role, see `_form`

    @property
    def exists(self) -> bool:
        """Whether the tokenizer carries a template; without one prompts are plain text."""
        return bool(self._source)

    @property
    def _source(self) -> str:
        return str(getattr(self.tokenizer, "chat_template", None) or "")

    @property
    def settings(self) -> dict[str, Any]:
        """What prompts depend on besides the tokenizer's files, for manifests."""
        dated = self.date and "strftime_now" in self._source
        return {"arguments": dict(self.arguments), "date": str(self.date) if dated else None}

    @cached_property
    def _variables(self) -> dict[str, Any]:
        """The arguments, and the date for a template that takes it as one: so a server is told it too."""
        if self.date and "strftime_now" in self._source and "date_string" in self._source:
            return {"date_string": self.date.strftime("%d %b %Y"), **self.arguments}
        return dict(self.arguments)

    def prompt_ids(self, prompt: Prompt, answers: Sequence[str] = (), *, chat: bool = True) -> list[int]:
        """Token ids of a text, or of a conversation up to where answer number `len(answers)` begins.

        Conversations go through the template if there is one; a text does if `chat` as well.
        """
        if isinstance(prompt, str):
            if chat and self.exists:
                return self.render([{"role": "user", "content": prompt}])
            return plain_prompt_ids(self.tokenizer, prompt)
        system, users = prompt.system, list(prompt.users[: len(answers) + 1])
        if not self.exists:
            parts = [system] if system else []
            for words, said in zip(users, [*answers, ""], strict=False):
                blank = " " if said and not said[0].isspace() else ""
                parts.append(f"User: {words}\nAssistant:{blank}{said}")
            return self.prompt_ids("\n\n".join(parts), chat=False)
        messages = []
        if system and self.folds_system:
            users[0] = f"{system}\n\n{users[0]}"
        elif system:
            messages.append({"role": "system", "content": system})
        for turn, words in enumerate(users):
            messages.append({"role": "user", "content": words})
            messages += [{"role": "assistant", "content": answer} for answer in answers[turn : turn + 1]]
        # From messages, as a server would: a template that strips earlier thinking strips it here too.
        return self.render(messages)

    def render(self, messages: Messages, arguments: Mapping[str, Any] | None = None) -> RenderedPrompt:
        """Token ids of the messages up to where the answer begins; they know their messages.

        `arguments` are of these alone: the tools of their request, say, or `continue_final_message`.
        """
        self.require("user")
        given = [self._given(message["role"], message["content"]) for message in messages]
        own = arguments or {}
        return RenderedPrompt(
            text_ids(self.tokenizer, self._apply(given, own)), messages, {**self._variables, **own}
        )

    def note(self, talks: Sequence[Conversation]) -> str:
        """What the user should know of how these are rendered, empty for nothing; refuses a template that
        cannot hold their turns.
        """
        if not self.exists:
            return ""
        self.require("user")
        if any(len(talk.users) > 1 for talk in talks):
            self.require("assistant")
        if any(talk.system for talk in talks) and self.folds_system:
            return (
                "the chat template takes no system message, so it stands at the head of the first user turn"
            )
        return ""

    @property
    def folds_system(self) -> bool:
        """The template takes no system message."""
        return bool(self._form("system")[1])

    def require(self, role: str) -> None:
        """Refuses a template that drops the words of this role."""
        if why := self._form(role)[1]:
            found = f"{self.tokenizer.name_or_path}: chat template {why}"
            fix = "correct the template" + (", or use prompts of one turn" if role == "assistant" else "")
            raise TargetError(f"{found}; what is said must stand in the prompt once", fix)

    def _form(self, role: str) -> tuple[bool, str]:
        """Whether words of this role must be given as parts, and why the template takes them in no form."""
        if role not in _MARKS:
            return False, ""
        if role not in self._forms:
            self._forms[role] = self._tried(role)
        return self._forms[role]

    def _tried(self, role: str) -> tuple[bool, str]:
        words = {"user": "the user's words", "system": "system messages", "assistant": "earlier answers"}[
            role
        ]
        failed = found = ""
        for parts in (False, True):
            said: dict[str, Any] = {"role": role, "content": _content(_MARKS[role], parts)}
            user = said if role == "user" else self._given("user", _MARKS["user"])
            messages = {"user": [said], "system": [said, user], "assistant": [user, said, user]}[role]
            try:
                text = self._apply(messages)
            except TargetError as error:
                if error.__cause__ is None:
                    raise
                failed = failed or f"cannot render {words} ({str(error.__cause__)[:80]})"
                continue
            roles = [message["role"] for message in messages]
            counts = [text.count(_MARKS[each]) - roles.count(each) for each in roles]
            if _WRITTEN_OUT.search(text):
                counts.append(-1)
            if not any(counts):
                return parts, ""
            found = found or ("drops " if min(counts) < 0 else "repeats ") + words
        return False, failed or found

    def _given(self, role: str, words: str) -> dict[str, Any]:
        return {"role": role, "content": _content(words, self._form(role)[0])}

    def _apply(
        self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any] | None = None
    ) -> str:
        name, variables = self.tokenizer.name_or_path, {**self._variables, **(arguments or {})}
        if not self.exists:
            fix = "leave out prompts of kind magpie, or use a target with a template"
            raise TargetError(f"{name}: no chat template; chat prompts need one", fix)
        named = self.tokenizer.chat_template
        if isinstance(named, dict) and variables.get("chat_template", "default") not in named:
            found = f"{name}: chat templates {', '.join(sorted(named))}; one must be the default"
            raise TargetError(found, "set target.chat_template_kwargs: {chat_template: NAME} to one of them")
        if self.date:
            variables["strftime_now"] = self.date.strftime
        try:
            options: dict[str, Any] = {"add_generation_prompt": True, **variables, "tokenize": False}
            return str(self.tokenizer.apply_chat_template([dict(m) for m in messages], **options))
        except Exception as error:  # templates are programs: whatever they raise is about the template
            found = f"{name}: chat template failed ({str(error)[:80]}); it must render these messages"
            raise TargetError(found, "correct the template") from error

    def _around_user_words(self) -> tuple[str, str]:
        self.require("user")
        before, _, after = self._apply([self._given("user", _MARKS["user"])]).partition(_MARKS["user"])
        return before, after

    def user_prefix_ids(self) -> list[int]:
        """The template's beginning, behind which a model writes an instruction (Magpie, arXiv 2406.08464)."""
        return text_ids(self.tokenizer, self._around_user_words()[0])

    def end_of_turn_ids(self) -> frozenset[int]:
        """The special token that the template puts right after the user's words, if there is one."""
        after = self._around_user_words()[1]
        return frozenset(text_ids(self.tokenizer, after.lstrip())[:1]) & special_ids(self.tokenizer)

    @cached_property
    def thinking(self) -> list[tuple[str, str]]:
        """The marks between which the target may think: of its tokens those named so, in pairs."""
        added = {str(token).lower(): str(token) for token in _added(self.tokenizer).values()}
        names = [name for name in added if _THINKS.search(name) and _end_of(name) in added]
        return list(dict.fromkeys([*((added[name], added[_end_of(name)]) for name in names), *THINKING]))

    @cached_property
    def _opened(self) -> str:
        """From the thinking mark that the template itself writes where an answer begins: answers lack it."""
        tail = self._around_user_words()[1]
        return next((tail[tail.rindex(marks[0]) :] for marks in self.thinking if _is_open(tail, *marks)), "")

    def lacks_thinking(self, prompt_ids: Sequence[int], answer: str) -> bool:
        """The prompt ends inside thinking that the answer does not end, as where a server cut it off."""
        plain: Any = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        asked = str(self.tokenizer.decode(list(prompt_ids)[-_LONGEST_OPENING:], **plain))
        opened = next((marks for marks in self.thinking if _is_open(asked, *marks)), None)
        return opened is not None and opened[1] not in answer

    def answer(self, generation: Generation) -> str | None:
        """What the target said, for later turns; None where none can follow: empty, or still thinking."""
        telling = {CHANNEL, "<|message|>", *(mark for marks in self.thinking for mark in marks)}
        added = _added(self.tokenizer).items()
        hidden = {int(i) for i, token in added if token.special and str(token) not in telling}
        visible = [token for token in generation.body if token not in hidden]
        plain: Any = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        text = str(self.tokenizer.decode(visible, **plain))
        if not self.exists:  # a base model goes on with the user's side
            text = text.split("\nUser:", maxsplit=1)[0].rstrip()
        elif CHANNEL in text:
            text = text.rpartition(FINAL)[2] if FINAL in text else ""
        else:
            text = f"{self._opened}{text}"
            if any(_is_open(text, *marks) for marks in self.thinking):
                return None
        return text if text.strip() else None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special and added tokens: none of them is part of what a user types."""
    return frozenset(map(int, [*tokenizer.all_special_ids, *_added(tokenizer)]))


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, Any]:
    found: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return found


def _content(words: str, parts: bool) -> str | list[dict[str, str]]:
    return [{"type": "text", "text": words}] if parts else words


def _end_of(mark: str) -> str:
    """`</think>` for `<think>`, `<|end_thinking|>` for `<|start_thinking|>`, in small letters."""
    named = _BEGINS.sub(lambda word: "close" if word[0] == "open" else "end", mark)
    return named if named != mark else re.sub(r"(?=\w)", "/", mark, count=1)


def _is_open(text: str, begin: str, end: str) -> bool:
    return text.rfind(begin) > text.rfind(end)
