"""Which of the target's responses are kept and why others are not, with an account: asked = written + filtered + failed.

Also what a loop is: a period of at most 32 tokens that fills the end of a text at least three times and for 32 tokens. A draft predicts
a loop easily, so acceptance on looping texts flatters: evaluation reports their share, and synthesis cuts loops off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fastdraft.data.rows import SyntheticRow, ids_hash
from fastdraft.functional.generation import Generation, Sampling

MAX_PERIOD, MIN_TOKENS, MIN_TIMES = 32, 32, 3
ROUNDS_KEPT = 2
"""A loop is cut off behind its second round."""


def loop_start(token_ids: Sequence[int]) -> tuple[int, int] | None:
    """Where the loop at the end of a text begins and its period, the shortest of several; None where it does not end in one."""
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

    @property
    def reasons(self) -> str:
        """Why rows were left out, the most frequent first."""
        counts = {**self.filtered, **({"failed": self.failed} if self.failed else {})}
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{rows} {reason}" for reason, rows in ordered) or "none filtered"

    def balance(self) -> int:
        """The rows not accounted for: 0 unless a row was lost or doubled."""
        return self.asked - self.written - self.total_filtered - self.failed

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form, reasons sorted."""
        return asdict(self) | {"filtered": dict(sorted(self.filtered.items()))}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> RowCounts:
        return cls(**value)


class RowFilter:
    """Judges responses one by one; remembers what was written, so that nothing is written twice.

    `missing_ids` have no token: the target is free to draw them, but such text has no meaning. `looping` is cut, drop or keep.
    """

    def __init__(
        self, missing_ids: Iterable[int], decode: Callable[[list[int]], str], looping: str = "cut"
    ) -> None:
        self.missing_ids, self.decode, self.looping = frozenset(missing_ids), decode, looping
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
        self, generation: Generation, source: str, sampling: Sampling, counts: RowCounts
    ) -> SyntheticRow | None:
        """The row to write, or None; adds the outcome to `counts` (all but `asked`)."""
        counts.generated += len(generation.response_ids)
        if generation.fault:
            counts.leave_out(generation.fault)
            return None
        if any(map(math.isnan, generation.logprobs)):
            counts.failed += 1
            return None
        kept = self._without_loop(generation)
        was_cut = kept is not generation
        row = SyntheticRow.of(kept, source, sampling)
        reason = self._reason(generation, kept)
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

    def _without_loop(self, generation: Generation) -> Generation:
        """The response up to the end of its loop's second round; itself where there is nothing to cut."""
        loop = loop_start(generation.body) if self.looping == "cut" else None
        if loop is None:
            return generation
        stop = loop[0] + ROUNDS_KEPT * loop[1]
        ids, logprobs = generation.response_ids[:stop], generation.logprobs[:stop]
        return replace(generation, response_ids=ids, logprobs=logprobs, finish_reason="length")

    def _reason(self, generation: Generation, kept: Generation) -> str:
        if not self.missing_ids.isdisjoint(generation.response_ids):
            return "unknown_id"
        if not self.decode(kept.body).strip():
            return "empty"
        if self.looping == "drop" and is_looping(kept.body):
            return "looping"
        return ""
