"""One unit of prompts through an engine and the filters: what the target wrote, as rows, with an account of every prompt.

Decides that prompts which leave no room for an answer are counted and not asked, and how Magpie goes: the target writes
instructions at temperature 1 behind the template's beginning, those that are no use are counted, and the rest are
answered in a prompt rendered from their text, as a user's would be. Of a conversation every turn is a row (decoding/turns.py), all
with the key of the first prompt, so that they are held out together or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastdraft.data.chat import dialogue_format, render_prompt, special_ids
from fastdraft.data.filters import RowCounts, RowFilter, is_looping
from fastdraft.data.prompts import normalised
from fastdraft.data.rows import SyntheticRow, ids_hash
from fastdraft.data.units import Unit
from fastdraft.decoding.conversations import take_turns
from fastdraft.functional.generation import Engine, Generation, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdraft.decoding.logit_writer import LogitWriter

INSTRUCTION_TEMPERATURE = 1.0


@dataclass(frozen=True)
class UnitWriter:
    """Everything that turns a planned unit into rows."""

    engine: Engine
    instruction_engine: Engine
    """Ends a text at the end of the user's turn."""
    tokenizer: PreTrainedTokenizerBase
    row_filter: RowFilter
    max_new_tokens: int
    context_length: int
    top_k: int = 0
    top_p: float = 1.0
    is_evaluation: Callable[[str], bool] = lambda text: False
    """Whether a normalised text is a prompt of an evaluation task."""
    logit_writer: LogitWriter | None = None
    """Keeps the target's distribution at every response token; None keeps none."""

    def write_logits(self, unit: Path) -> None:
        """Adds the distributions of a unit whose rows stand, unless that is done or nobody asked for it.

        Raises:
            TargetError: when the target's numbers are not finite there.
        """
        if self.logit_writer:
            self.logit_writer.write(unit)

    def write(self, unit: Unit, seed: int) -> tuple[list[SyntheticRow], RowCounts]:
        """Asks the target; equal units, seeds and rows written before give equal rows.

        Raises:
            AssertionError: if a prompt is not accounted for, which would be a fault in this program.
        """
        if unit.conversations:
            return self._converse(unit, seed)
        counts = RowCounts(asked=len(unit.prompts))
        if unit.answers:
            return self._take(unit, counts)
        prompts: Sequence[list[int]] = unit.prompts
        if unit.instruction_tokens:
            prompts, seed = self._instructions(unit, seed, counts), seed + 1
        room = self.context_length - self.max_new_tokens
        fitting = [prompt for prompt in prompts if 0 < len(prompt) <= room]
        counts.leave_out("prompt_too_long", len(prompts) - len(fitting))
        sampling = (
            Sampling(unit.temperature, self.top_k, self.top_p) if unit.temperature > 0 else Sampling(0.0)
        )
        answers = self.engine.generate(fitting, sampling, self.max_new_tokens, seed)
        judged = [
            self.row_filter.judge(answer, unit.source, sampling, unit.chat, counts) for answer in answers
        ]
        assert counts.balance() == 0, f"unaccounted rows: {counts}"
        return [row for row in judged if row], counts

    def _take(self, unit: Unit, counts: RowCounts) -> tuple[list[SyntheticRow], RowCounts]:
        """Answers that stand already, through the same filters."""
        keyed = zip(unit.answers, unit.keys or [""] * len(unit.answers), strict=True)
        fitting = [
            (answer, key)
            for answer, key in keyed
            if len(answer.prompt_ids) + len(answer.response_ids) <= self.context_length
        ]
        counts.leave_out("too_long", len(unit.answers) - len(fitting))
        sampling = unit.sampling or Sampling(unit.temperature)
        judged = [
            (self.row_filter.judge(answer, unit.source, sampling, unit.chat, counts), key)
            for answer, key in fitting
        ]
        assert counts.balance() == 0, f"unaccounted rows: {counts}"
        return [replace(row, prompt_key=key or row.prompt_key) for row, key in judged if row], counts

    def _converse(self, unit: Unit, seed: int) -> tuple[list[SyntheticRow], RowCounts]:
        """Every turn of every conversation; asked counts turns."""
        counts = RowCounts(asked=sum(len(talk.users) for talk in unit.conversations))
        sampling = (
            Sampling(unit.temperature, self.top_k, self.top_p) if unit.temperature > 0 else Sampling(0.0)
        )
        found = take_turns(
            dialogue_format(self.tokenizer, unit.conversations),
            unit.conversations,
            lambda number, prompts: self.engine.generate(
                prompts, sampling, self.max_new_tokens, seed + number
            ),
            room=self.context_length - self.max_new_tokens,
            missing_ids=self.row_filter.missing_ids,
        )
        counts.leave_out("prompt_too_long", found.too_long)
        counts.leave_out("conversation_ended", found.ended)
        rows: list[SyntheticRow] = []
        for turn in found.turns:
            row = (
                self.row_filter.judge(turn.answer, unit.source, sampling, unit.chat, counts)
                if turn.answer
                else None
            )
            if row:
                rows.append(replace(row, prompt_key=ids_hash(unit.prompts[turn.conversation])))
        assert counts.balance() == 0, f"unaccounted rows: {counts}"
        return rows, counts

    def _instructions(self, unit: Unit, seed: int, counts: RowCounts) -> list[list[int]]:
        """Prompts around the instructions that the target invents; those of no use are counted in `counts`."""
        room = self.context_length - self.max_new_tokens - len(unit.prompts[0])
        longest = max(1, min(unit.instruction_tokens, room))
        written = self.instruction_engine.generate(
            unit.prompts, Sampling(INSTRUCTION_TEMPERATURE), longest, seed
        )
        prompts: list[list[int]] = []
        for generation in written:
            counts.generated += len(generation.response_ids)
            reason, text = self._read_instruction(generation)
            prompt = [] if reason else render_prompt(self.tokenizer, [{"role": "user", "content": text}])
            if not reason and (prompt in prompts or self.row_filter.has_prompt(prompt)):
                reason = "instruction_duplicate"
            if reason:
                counts.leave_out(reason)
            else:
                prompts.append(prompt)
        return prompts

    def _read_instruction(self, generation: Generation) -> tuple[str | None, str]:
        """(why it is of no use, its text)."""
        if generation.finish_reason == "length":
            looping = is_looping(generation.response_ids)
            return "instruction_looping" if looping else "instruction_too_long", ""
        body = generation.response_ids[:-1]
        if not (special_ids(self.tokenizer) | self.row_filter.missing_ids).isdisjoint(body):
            return "instruction_malformed", ""
        text = str(self.tokenizer.decode(body)).strip()
        if not any(character.isalpha() for character in text):
            return "instruction_empty", ""
        if self.is_evaluation(normalised(text)):
            return "instruction_evaluation", ""
        return None, text
