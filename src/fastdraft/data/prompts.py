"""Prompts as rows hold them: texts and conversations of a recipe's files and hub data sets, and of tasks.

`select_prompts` reads a source, refuses prompts of evaluation tasks and shuffles the rest by the seed.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdraft.data.chat import Conversation, Prompt
from fastdraft.data.corpora import hub_rows, open_hub
from fastdraft.data.files import ROWS, describe_data_set, describe_files, find_files
from fastdraft.data.messages import from_json, read_messages
from fastdraft.data.readers import missing_field, read_rows
from fastdraft.errors import DataError
from fastdraft.recipe.synthesize import HubPrompts, JsonlPrompts, TextPrompts

HUB_ROWS = 100_000  # read of a hub data set where the recipe sets no `count`: they are held in memory
# Where a prompt stands, by preference, where the recipe names no other field.
FIELDS = ("prompt", "messages", "conversations", "turns", "instruction", "question", "text")
# What stands beside a text, as published data sets call it.
_SYSTEM, _BELONGS = ("system", "system_prompt"), ("input", "context")
_SHOWN = 8  # names of fields


@dataclass(frozen=True)
class SelectedPrompts:
    """A source's prompts in the order asked, and how many were refused before the target saw them."""

    prompts: list[Prompt]
    # By reason: `evaluation` (also a prompt of a task), `empty`, `repeated`, `unsupported` (tools, pictures).
    refused: dict[str, int]
    digest: str  # of the prompts refused because of evaluation: what the result depends on of the tasks
    note: str  # which fields were read and which not, and what was unsupported


@dataclass
class RowReader:
    """Reads the prompts of rows from the first of `keys` that a row has, and remembers what it read."""

    keys: Sequence[str]
    read: dict[str, None] = field(default_factory=dict)
    left: dict[str, None] = field(default_factory=dict)

    def prompt(self, row: Mapping[str, Any], where: str) -> tuple[Prompt, str]:
        """The prompt, or why it cannot be asked. `where` names file and line in errors.

        What an instruction is about follows it behind a blank line; a system prompt makes a conversation.
        """
        told = {key: value for key, value in row.items() if value not in (None, "", [])}
        key = next((key for key in self.keys if key in told), None)
        if key is None:
            if not any(key in row for key in self.keys):
                if len(self.keys) == 1:
                    raise missing_field(where, self.keys[0], row)
                found = f"{where}: no '{FIELDS[0]}'; has {', '.join(list(row)[:_SHOWN]) or 'no field'}"
                raise DataError(f"{found}; one must be called {' or '.join(FIELDS)}", "rename the prompt's")
            return "", ""
        texts = {name: told[name] for name in (*_SYSTEM, *_BELONGS) if isinstance(told.get(name), str)}
        texts.pop(key, None)
        value, used = from_json(told[key]), [key]
        system = "\n\n".join(dict.fromkeys(texts[name] for name in _SYSTEM if name in texts))
        talk: Conversation | str
        if isinstance(value, str):
            # A text beside an instruction is the whole that somebody made of it.
            whole = key != "instruction" and "instruction" in told
            parts = [value, *(texts[name] for name in _BELONGS if name in texts and not whole)]
            used += [name for name in _BELONGS if name in texts and not whole]
            text = "\n\n".join(part for part in parts if part is value or part not in value)
            talk = Conversation((text,))
        elif key == "turns" and isinstance(value, list) and all(isinstance(turn, str) for turn in value):
            talk = Conversation(tuple(turn for turn in value if turn.strip()))
        else:
            talk = read_conversation(value, where)
        used += [name for name in _SYSTEM if name in texts]
        self.read |= dict.fromkeys(used)
        self.left |= dict.fromkeys(told)
        if isinstance(talk, str):
            return "", talk
        if isinstance(value, str) and not system:
            return talk.users[0], ""
        both = dict.fromkeys(part for part in (system, talk.system) if part)
        return Conversation(talk.users, "\n\n".join(both)), ""

    def note(self, known: Collection[str] = ()) -> str:
        """The fields read and not read, for the user; empty where there is nothing but the one asked for."""
        left = [key for key in self.left if key not in self.read and key not in known]
        if not left and list(self.read) == [self.keys[0]]:
            return ""
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        not_read = f"; not read: {', '.join(left[:_SHOWN])}{more}" if left else ""
        return f"fields read: {', '.join(self.read) or 'none'}{not_read}"


def read_conversation(value: object, where: str) -> Conversation | str:
    """The conversation in a list of messages, or why it cannot be asked again.

    Logged answers are passed over: the target gives its own. Tools, pictures and a system message after the
    beginning cannot be asked again.
    """
    messages = read_messages(value, where)
    if isinstance(messages, str):
        return messages
    system, users, follows_user = list[str](), list[str](), False
    for message in messages:
        if message.beyond in ("tools", "media"):
            return message.beyond
        if message.role == "system":
            if users:
                return "late system message"
            system.append(message.text)
        elif message.role == "assistant":
            follows_user = False
        elif message.text.strip():  # messages of the user that follow each other are one turn
            users.append(f"{users.pop()}\n\n{message.text}" if follows_user else message.text)
            follows_user = True
    return Conversation(tuple(users), "\n\n".join(part for part in system if part.strip()))


def read_prompts(source: TextPrompts, reader: RowReader) -> Iterator[tuple[Prompt, str]]:
    """Every row's prompt, or why it cannot be asked."""
    rows: Iterator[tuple[str, dict[str, Any]]] = iter(())
    if isinstance(source, HubPrompts):
        name = f"data set {source.dataset}"
        read = itertools.islice(hub_rows(open_hub(source), name), source.count or HUB_ROWS)
        rows = ((f"{name}: row {number}", row) for number, row in read)
    if isinstance(source, JsonlPrompts):
        rows = (row for file in find_files(source.path, ROWS).files.values() for row in read_rows(file))
    return (reader.prompt(row, where) for where, row in rows)


def describe(source: TextPrompts) -> dict[str, Any]:
    """The settings and what they point at now, for fingerprints."""
    found = source.model_dump(mode="json")
    if isinstance(source, HubPrompts):
        found |= describe_data_set(source.dataset)
    if isinstance(source, JsonlPrompts):
        found |= describe_files(find_files(source.path, ROWS).files)
    return found


def usable_prompts(source: TextPrompts) -> Iterator[Prompt]:
    """Those that can be asked; the first shows a wrong path, key or shape before hours of other work."""
    none = True
    for prompt, why in read_prompts(source, _reader(source)):
        said = (prompt,) if isinstance(prompt, str) else prompt.users
        if not why and any(map(str.strip, said)) and all(map(is_whole, said)):
            none = False
            yield prompt
    if none:
        found = f"prompts '{source.name}': no prompt that can be asked; at least one must be left"
        raise DataError(found, "add prompts or correct `path` and `field`")


def _reader(source: TextPrompts) -> RowReader:
    return RowReader(FIELDS if source.field == FIELDS[0] else [source.field])


def normalised(text: str) -> str:
    """A prompt's text for comparisons: lower case, runs of white space as one blank."""
    return " ".join(text.lower().split())


def is_whole(text: str) -> bool:
    """False for half a surrogate pair, which JSON can hold ("\\ud83d") and no tokenizer takes."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def select_prompts(source: TextPrompts, held_out: Collection[str], seed: int) -> SelectedPrompts:
    """Reads a source without evaluation prompts (`held_out`, normalised), empty and repeated ones."""
    seen, met, prompts = set[str](), set[str](), list[Prompt]()
    refused, unsupported = {"evaluation": 0, "empty": 0, "repeated": 0}, Counter[str]()
    reader = _reader(source)
    for prompt, found in read_prompts(source, reader):
        talk = Conversation((prompt,)) if isinstance(prompt, str) else prompt
        if why := found or ("" if is_whole(talk.text) else "half a character"):
            refused["unsupported"] = refused.get("unsupported", 0) + 1
            unsupported[why] += 1
            continue
        key, said = normalised(talk.text), {normalised(words) for words in talk.users}
        forbidden = said.intersection(held_out)
        met |= forbidden
        if not any(said):
            refused["empty"] += 1
        elif forbidden:
            refused["evaluation"] += 1
        elif key in seen:
            refused["repeated"] += 1
        else:
            seen.add(key)
            prompts.append(prompt)
    if not prompts:
        told = ", ".join(filter(None, (tell_counts(refused), tell_counts(unsupported)))) or "no prompt"
        found = f"prompts '{source.name}': {told}; at least one must be left"
        raise DataError(found, "add prompts or correct `path` and `field`")
    random.Random(f"{seed}/{source.name}").shuffle(prompts)
    notes = [reader.note(), f"unsupported: {tell_counts(unsupported)}" if unsupported else ""]
    if (
        isinstance(source, HubPrompts)
        and not source.count
        and sum(refused.values(), len(prompts)) >= HUB_ROWS
    ):
        notes.append(f"only the first {HUB_ROWS:,} rows are read; set `count` for more")
    return SelectedPrompts(prompts[: source.count], refused, digest_of(met), "; ".join(filter(None, notes)))


def tell_counts(counts: dict[str, int]) -> str:
    """`3 empty, 1 repeated`, without what is none."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)


def digest_of(texts: Iterable[str]) -> str:
    """Of a set of texts; empty for none."""
    found = sorted(set(texts))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:20] if found else ""
