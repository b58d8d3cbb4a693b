"""Which of the target's responses are kept and why others are not: asked = written + filtered + failed.

A loop is a period of at most 32 tokens that fills the end of a text three times and for 32 tokens. A draft
predicts it easily, so acceptance flatters: evaluation reports the share of loops, synthesis cuts them off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from fastdraft.data.rows import SyntheticRow, ids_hash
from fastdraft.functional.generation import Generation, Sampling

MAX_PERIOD, MIN_TOKENS, MIN_TIMES = 32, 32, 3
ROUNDS_KEPT = 2  # a loop is cut off behind its second round


def loop_start(token_ids: Sequence[int]) -> tuple[int, int] | None:
    """Where the loop at the end of a text begins and its period, the shortest of several."""
    count = len(token_ids)
    for period in range(1, MAX_PERIOD + 1):
        needed = max(MIN_TOKENS, MIN_TIMES * period)
        if needed > count:
            return None  # longer periods need longer texts still
        start = count - period
        while start > 0 and token_ids[start - 1] == token_ids[start - 1 + period]:
            start -= 1
        if count - start >= needed:
            return start, period
    return None


def is_looping(token_ids: Sequence[int]) -> bool:
    """Whether a text ends in a loop."""
    return loop_start(token_ids) is not None


@dataclass
class RowCounts:
    """What became of the rows asked for. Counts are added; rates are derived when printed."""

    asked: int = 0
    written: int = 0
    failed: int = 0  # rows that the engine could not write: the target's numbers were not finite
    filtered: dict[str, int] = field(default_factory=dict)  # rows left out, by reason
    tokens: int = 0  # response tokens of the rows written
    generated: int = 0  # also those of rows left out and of loops cut off, and Magpie's instructions
    stopped: int = 0  # rows written whose answer the target ended itself
    cut: int = 0  # rows written without the loop at their end

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

    @property
    def reasons(self) -> str:
        """Why rows were left out, the most frequent first."""
        ordered = sorted({**self.filtered, "failed": self.failed}.items(), key=lambda item: -item[1])
        return ", ".join(f"{rows} {reason}" for reason, rows in ordered if rows) or "none filtered"

    def balance(self) -> int:
        """The rows not accounted for: 0 unless a row was lost or doubled."""
        return self.asked - self.written - self.total_filtered - self.failed


class RowFilter:
    """Judges responses one by one; remembers what was written, so that nothing is written twice.

    `missing_ids` have no token: such text has no meaning. `looping` is cut, drop or keep.
    """

    def __init__(
        self, missing_ids: Iterable[int], decode: Callable[[list[int]], str], looping: str = "cut"
    ) -> None:
        self.missing_ids, self.decode, self.looping = frozenset(missing_ids), decode, looping
        self._rows, self._prompts = set[str](), set[str]()

    def remember(self, row_ids: Iterable[str], prompt_keys: Iterable[str]) -> None:
        """Takes rows of an earlier process as written."""
        self._rows.update(row_ids)
        self._prompts.update(prompt_keys)

    def has_prompt(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a row with this prompt was written."""
        return ids_hash(prompt_ids) in self._prompts

    def judge(
        self, generation: Generation, source: str, sampling: Sampling, counts: RowCounts
    ) -> SyntheticRow | None:
        """The row to write, or None; adds the outcome to `counts` (all but `asked`)."""
        counts.generated += len(generation.response_ids)
        if any(map(math.isnan, generation.logprobs)) and not generation.fault:
            counts.failed += 1
            return None
        kept, loop = generation, loop_start(generation.body) if self.looping != "keep" else None
        if loop and self.looping == "cut":
            stop = loop[0] + ROUNDS_KEPT * loop[1]
            ids, logprobs = generation.response_ids[:stop], generation.logprobs[:stop]
            kept = replace(generation, response_ids=ids, logprobs=logprobs, finish_reason="length")
        row, reason = SyntheticRow.of(kept, source, sampling), generation.fault
        if not reason and not self.missing_ids.isdisjoint(generation.response_ids):
            reason = "unknown_id"
        elif not reason and not self.decode(kept.body).strip():
            reason = "empty"
        elif not reason and loop and self.looping == "drop":
            reason = "looping"
        elif not reason and row.row_id in self._rows:
            reason = "duplicate"
        if reason:
            counts.leave_out(reason)
            return None
        self.remember([row.row_id], [row.prompt_key])
        counts.written += 1
        counts.tokens += len(kept.response_ids)
        counts.stopped += kept.finish_reason == "stop"
        counts.cut += kept is not generation
        return row
