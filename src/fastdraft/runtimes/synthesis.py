"""One unit of prompts through an engine and the filters, with an account of every prompt.

`UnitWriter(...).write(unit, seed)` gives the target's answers, equal for equal units and seeds wherever and
whenever it is done; `keep_rows` judges them in the order of the units; `unit_logits` scores what is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from transformers import PreTrainedModel

from fastdraft.data.chat import ChatTemplate, special_ids
from fastdraft.data.filters import RowCounts, RowFilter, is_looping
from fastdraft.data.prompts import normalised
from fastdraft.data.rows import SyntheticRow, ids_hash
from fastdraft.data.sparse_logits import SparseLogits
from fastdraft.data.synthesis_plan import Unit
from fastdraft.decoding.conversations import take_turns
from fastdraft.decoding.replay import TokenText, held_slices, pass_by_pass, response_hidden
from fastdraft.errors import TargetError
from fastdraft.functional.distillation import top_k_buckets
from fastdraft.functional.generation import Engine, Generation, Sampling
from fastdraft.modeling.heads import output_head
from fastdraft.runtimes.openvino_reader import OpenVINOModel

INSTRUCTION_TEMPERATURE = 1.0
_POSITIONS = 128  # of a pass whose logits are kept: 78 MB over 152 k ids
# What gives the distributions over a text.
Scorer: TypeAlias = PreTrainedModel | OpenVINOModel
# Answers, each with the prompt key of its row; empty: its own prompt's.
Keyed = list[tuple[Generation, str]]


@dataclass
class Answers:
    """What the target wrote to a unit, before anything is left out for what other units hold."""

    source: str
    sampling: Sampling
    temperature: float  # the unit's
    invented: bool  # whether the target wrote the prompts too
    counts: RowCounts = field(default_factory=RowCounts)  # of what was asked, and of what got no answer
    keyed: Keyed = field(default_factory=list)


@dataclass(frozen=True)
class UnitWriter:
    """Everything that turns a planned unit into answers, and rows into the distributions over them."""

    engine: Engine | None  # None where every answer is there already
    instruction_engine: Engine | None  # ends a text at the end of the user's turn
    chat: ChatTemplate
    missing_ids: Collection[int]
    max_new_tokens: int
    context_length: int
    top_k: int = 0
    top_p: float = 1.0
    held_out: Collection[str] = ()  # normalised texts of evaluation prompts, which no instruction may be
    scorer: Scorer | None = None

    def write(self, unit: Unit, seed: int) -> Answers:
        """The answers, and what became of the prompts without one."""
        sampling = (
            Sampling(unit.temperature, self.top_k, self.top_p) if unit.temperature > 0 else Sampling(0.0)
        )
        sampling = unit.transcripts[0].sampling if unit.transcripts else sampling
        found = Answers(unit.source, sampling, unit.temperature, bool(unit.instruction_tokens))
        if unit.transcripts:
            found.keyed = self._logged(unit, found.counts)
        elif unit.conversations:
            found.keyed = self._converse(unit, sampling, seed, found.counts)
        else:
            found.keyed = self._ask(unit, sampling, seed, found.counts)
        return found

    def logits(self, rows: Sequence[SyntheticRow], k: int) -> tuple[SparseLogits, int]:
        """The distributions over rows, and how many ids they are over."""
        assert self.scorer
        return unit_logits(self.scorer, rows, k), scored_ids(self.scorer)

    def _logged(self, unit: Unit, counts: RowCounts) -> Keyed:
        """Answers that stand already."""
        counts.asked = len(unit.transcripts)
        answers = [(row.generation, row.key) for row in unit.transcripts]
        fitting = [
            (answer, key)
            for answer, key in answers
            if len(answer.prompt_ids) + len(answer.response_ids) <= self.context_length
        ]
        counts.leave_out("too_long", counts.asked - len(fitting))
        return fitting

    def _ask(self, unit: Unit, sampling: Sampling, seed: int, counts: RowCounts) -> Keyed:
        assert self.engine
        counts.asked = len(unit.prompts)
        prompts: Sequence[list[int]] = unit.prompts
        if unit.instruction_tokens:
            prompts, seed = self._instructions(unit, seed, counts), seed + 1
        room = self.context_length - self.max_new_tokens
        fitting = [prompt for prompt in prompts if 0 < len(prompt) <= room]
        counts.leave_out("prompt_too_long", len(prompts) - len(fitting))
        return [(answer, "") for answer in self.engine.generate(fitting, sampling, self.max_new_tokens, seed)]

    def _converse(self, unit: Unit, sampling: Sampling, seed: int, counts: RowCounts) -> Keyed:
        """Every turn is a row, all of a conversation with the key of its first prompt: held out together."""
        engine = self.engine
        assert engine
        counts.asked = sum(len(talk.users) for talk in unit.conversations)
        found = take_turns(
            self.chat,
            unit.conversations,
            lambda number, prompts: engine.generate(prompts, sampling, self.max_new_tokens, seed + number),
            room=self.context_length - self.max_new_tokens,
            missing_ids=frozenset(self.missing_ids),
        )
        counts.leave_out("prompt_too_long", found.too_long)
        counts.leave_out("conversation_ended", found.ended)
        keys = [ids_hash(prompt) for prompt in unit.prompts]
        return [(turn.answer, keys[turn.conversation]) for turn in found.turns if turn.answer]

    def _instructions(self, unit: Unit, seed: int, counts: RowCounts) -> list[list[int]]:
        """Prompts around the instructions that the target invents; those of no use are counted."""
        assert self.instruction_engine
        room = self.context_length - self.max_new_tokens - len(unit.prompts[0])
        longest, drawn = max(1, min(unit.instruction_tokens, room)), Sampling(INSTRUCTION_TEMPERATURE)
        prompts: list[list[int]] = []
        for generation in self.instruction_engine.generate(unit.prompts, drawn, longest, seed):
            counts.generated += len(generation.response_ids)
            reason, text = self._read_instruction(generation)
            prompt = [] if reason else self.chat.prompt_ids(text)
            if not reason and prompt in prompts:
                reason = "instruction_duplicate"
            if reason:
                counts.leave_out(reason)
            else:
                prompts.append(prompt)
        return prompts

    def _read_instruction(self, generation: Generation) -> tuple[str, str]:
        """(why it is of no use, its text)."""
        if generation.finish_reason == "length":
            looping = is_looping(generation.response_ids)
            return "instruction_looping" if looping else "instruction_too_long", ""
        if not {*special_ids(self.chat.tokenizer), *self.missing_ids}.isdisjoint(generation.body):
            return "instruction_malformed", ""
        text = str(self.chat.tokenizer.decode(generation.body)).strip()
        if not any(character.isalpha() for character in text):
            return "instruction_empty", ""
        return ("instruction_evaluation" if normalised(text) in self.held_out else ""), text


def keep_rows(answers: Answers, row_filter: RowFilter) -> tuple[list[SyntheticRow], RowCounts]:
    """The rows to keep, and what became of all others, after the units before this one."""
    counts, rows = replace(answers.counts, filtered=dict(answers.counts.filtered)), list[SyntheticRow]()
    for answer, key in answers.keyed:
        if answers.invented and row_filter.has_prompt(answer.prompt_ids):
            counts.leave_out("instruction_duplicate")
            counts.generated += len(answer.response_ids)
        elif row := row_filter.judge(answer, answers.source, answers.sampling, counts):
            rows.append(replace(row, prompt_key=key) if key else row)
    assert counts.balance() == 0, f"unaccounted rows: {counts}"
    return rows, counts


@torch.inference_mode()
def sparse_logits(
    model: PreTrainedModel, rows: Sequence[TokenText], k: int, *, batch_tokens: int = 0
) -> list[SparseLogits]:
    """The k likeliest tokens at every response position and the mass of all others, at temperature 1.

    `batch_tokens` are the positions in one pass, padding included; 0 chooses by device.
    """
    found: dict[int, SparseLogits] = {}
    decoder, head = output_head(model)

    def keep_piece(chosen: Sequence[int]) -> None:
        hidden = response_hidden(decoder, [rows[i] for i in chosen], model.device)
        flat, parts = torch.cat(hidden), list[SparseLogits]()
        for held in held_slices(flat, head.vocab_size):  # only a few rows of logits exist at a time
            part = top_k_buckets(head.logits(flat[held]), k)
            parts.append(SparseLogits(part.ids.to(torch.int32).cpu().numpy(), part.logprobs.cpu().numpy()))
        kept, ends = joined(parts, k), np.cumsum([len(hidden_ND) for hidden_ND in hidden])[:-1]
        pieces = zip(np.split(kept.ids, ends), np.split(kept.logprobs, ends), strict=True)
        found.update(zip(chosen, (SparseLogits(*piece) for piece in pieces), strict=True))

    pass_by_pass(rows, model.device, keep_piece, batch_tokens)
    return [found[i] for i in range(len(rows))]


def joined(parts: Sequence[SparseLogits], k: int) -> SparseLogits:
    """One behind the other."""
    every = [SparseLogits(np.zeros((0, k), np.int32), np.zeros((0, k + 1), np.float32)), *parts]
    ids, logprobs = [part.ids for part in every], [part.logprobs for part in every]
    return SparseLogits(np.concatenate(ids), np.concatenate(logprobs))


@torch.inference_mode()
def deployed_logits(model: OpenVINOModel, rows: Sequence[TokenText], k: int) -> list[SparseLogits]:
    """The same of an export, at the weights and precision that run; several times as fast on a CPU."""
    found = []
    for row in rows:
        ids, parts = torch.tensor([*row.prompt_ids, *row.response_ids]), list[SparseLogits]()
        reader, before = model.reader(len(ids)), len(row.prompt_ids) - 1
        for start in range(0, len(row.response_ids), _POSITIONS):
            stop = min(start + _POSITIONS, len(row.response_ids))
            logits = reader.read(ids[reader.length : before + stop], keep=stop - start)
            part = top_k_buckets(logits, k)
            parts.append(SparseLogits(part.ids.to(torch.int32).numpy(), part.logprobs.numpy()))
        found.append(joined(parts, k))
    return found


def scored_ids(model: Scorer) -> int:
    """How many ids the model's distributions are over."""
    return model.vocab_size if isinstance(model, OpenVINOModel) else output_head(model)[1].vocab_size


def unit_logits(model: Scorer, rows: Sequence[SyntheticRow], k: int) -> SparseLogits:
    """The model's distributions over a unit's rows: one teacher-forced pass, whoever wrote the text."""
    score = deployed_logits if isinstance(model, OpenVINOModel) else sparse_logits
    logits = joined(score(model, rows, k), k)
    if not np.isfinite(logits.logprobs).all():
        found = "target.model: logits in the scoring pass are not finite; the target must compute finite ones"
        raise TargetError(found, "set target.dtype to bf16 or fp32")
    return logits
