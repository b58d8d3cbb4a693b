"""Which of the target's responses are kept, and why the others are not.

Decides the reasons and their order (failed, unknown_id, empty, looping, truncated, duplicate), that a loop is cut off
behind its second round by default instead of taking the whole row with it, and that every row asked for is accounted for:
asked = written + filtered + failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fastdraft.data.looping import loop_start
from fastdraft.data.responses import SyntheticRow, ids_hash
from fastdraft.functional.generation import Generation, Sampling

Looping = Literal["cut", "drop", "keep"]

ROUNDS_KEPT = 2


@dataclass
class RowCounts:
    """What became of the rows asked for. Counts are added; rates are derived when printed."""

    asked: int = 0
    written: int = 0
    failed: int = 0
    """Rows that the engine could not write: the target's numbers were not finite."""
    filtered: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    tokens: int = 0
    """Response tokens of the rows written."""
    generated: int = 0
    """Response tokens generated, also those of rows left out and of loops cut off; Magpie's instructions too."""
    stopped: int = 0
    """Rows written whose answer the target ended itself."""
    cut: int = 0
    """Rows written without the loop at their end."""

    def leave_out(self, reason: str, rows: int = 1) -> None:
        """Counts rows as filtered."""
        if rows:
            self.filtered[reason] = self.filtered.get(reason, 0) + rows

    def add(self, other: RowCounts) -> None:
        """Adds another's counts to these."""
        for reason, rows in other.filtered.items():
            self.leave_out(reason, rows)
        for name in ("asked", "written", "failed", "tokens", "generated", "stopped", "cut"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def total_filtered(self) -> int:
        return sum(self.filtered.values())

    def balance(self) -> int:
        """The rows not accounted for, asked - written - filtered - failed: 0 unless a row was lost or doubled."""
        return self.asked - self.written - self.total_filtered - self.failed

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form, reasons sorted."""
        return asdict(self) | {"filtered": dict(sorted(self.filtered.items()))}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> RowCounts:
        return cls(**value)


class RowFilter:
    """Judges responses one by one; remembers what was written, so that nothing is written twice.

    Args:
        missing_ids: Ids that the tokenizer has no token for. The target is free to draw them, but such text has no meaning.
        decode: Text of token ids, special tokens left out.
        looping: What happens to a row that ends in a loop: cut behind the loop's second round, drop, or keep.
        keep_truncated: Keeps chat answers that the limit on new tokens ended.
    """

    def __init__(
        self,
        missing_ids: Iterable[int],
        decode: Callable[[list[int]], str],
        looping: Looping = "cut",
        keep_truncated: bool = True,
    ) -> None:
        self.missing_ids, self.decode = frozenset(missing_ids), decode
        self.looping, self.keep_truncated = looping, keep_truncated
        self._rows: set[str] = set()
        self._prompts: set[str] = set()

    def remember(self, row_ids: Iterable[str], prompt_keys: Iterable[str]) -> None:
        """Takes rows of an earlier process as written."""
        self._rows.update(row_ids)
        self._prompts.update(prompt_keys)

    def has_prompt(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a row with this prompt was written."""
        return ids_hash(prompt_ids) in self._prompts

    def judge(
        self, generation: Generation, source: str, sampling: Sampling, chat: bool, counts: RowCounts
    ) -> SyntheticRow | None:
        """The row to write, or None; adds the outcome to `counts` (all but `asked`)."""
        counts.generated += len(generation.response_ids)
        if generation.fault:
            counts.leave_out(generation.fault)
            return None
        if any(map(math.isnan, generation.logprobs)):
            counts.failed += 1
            return None
        kept, was_cut = self._cut(generation)
        reason = self._reason(generation, kept, was_cut, chat)
        row = self._row(kept, source, sampling)
        if not reason and row.row_id in self._rows:
            reason = "duplicate"
        if reason:
            counts.leave_out(reason)
            return None
        self.remember([row.row_id], [row.prompt_key])
        counts.written += 1
        counts.tokens += len(kept.response_ids)
        counts.stopped += kept.finish_reason == "stop"
        counts.cut += was_cut
        return row

    def _cut(self, generation: Generation) -> tuple[Generation, bool]:
        """The response without the loop that it ends in, and whether there was one to cut."""
        if self.looping != "cut":
            return generation, False
        ids = generation.response_ids
        loop = loop_start(ids[:-1] if generation.finish_reason == "stop" else ids)
        if loop is None:
            return generation, False
        stop = loop[0] + ROUNDS_KEPT * loop[1]
        return Generation(generation.prompt_ids, ids[:stop], generation.logprobs[:stop], "length"), True

    def _reason(self, generation: Generation, kept: Generation, was_cut: bool, chat: bool) -> str | None:
        body = kept.response_ids[:-1] if kept.finish_reason == "stop" else kept.response_ids
        if not self.missing_ids.isdisjoint(generation.response_ids):
            return "unknown_id"
        if not self.decode(body).strip():
            return "empty"
        if self.looping == "drop" and loop_start(body):
            return "looping"
        if chat and not self.keep_truncated and generation.finish_reason == "length" and not was_cut:
            return "truncated"
        return None

    @staticmethod
    def _row(kept: Generation, source: str, sampling: Sampling) -> SyntheticRow:
        return SyntheticRow(
            row_id=ids_hash(kept.prompt_ids, kept.response_ids),
            source=source,
            prompt_key=ids_hash(kept.prompt_ids),
            prompt_ids=kept.prompt_ids,
            response_ids=kept.response_ids,
            logprobs=kept.logprobs,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            finish_reason=kept.finish_reason,
        )
