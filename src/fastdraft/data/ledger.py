"""The account of a synthesis: what its committed units add up to, and which source is to be asked next.

Decides that the next unit follows from the committed ones alone, so that a run which was killed goes on as it would have; that the
source furthest behind its share comes next; and that a source which gives nothing is given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastdraft.data.filters import RowCounts
from fastdraft.data.units import Plan

DRY_UNITS = 4
"""A source is given up after this many units in a row of which no row was kept."""


@dataclass
class Ledger:
    """Filled with one unit after another, in the order of their commits."""

    plans: Sequence[Plan]
    units: int = 0
    total: RowCounts = field(default_factory=RowCounts)
    by_temperature: dict[str, RowCounts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [plan.name for plan in self.plans]
        self.by_source = {name: RowCounts() for name in names}
        self.units_of = dict.fromkeys(names, 0)
        self.dry = dict.fromkeys(names, 0)
        self.open = dict.fromkeys(names, True)

    def add(self, source: str, temperature: float, counts: RowCounts) -> None:
        """Enters a committed unit."""
        for account in (
            self.total,
            self.by_source[source],
            self.by_temperature.setdefault(f"{temperature:g}", RowCounts()),
        ):
            account.add(counts)
        self.units += 1
        self.units_of[source] += 1
        self.dry[source] = 0 if counts.written else self.dry[source] + 1
        self.open[source] &= self.dry[source] < DRY_UNITS

    def next_plan(self) -> Plan | None:
        """The source furthest behind its share that still has a unit; None when all are used up."""
        open_plans = [
            plan for plan in self.plans if self.open[plan.name] and plan.has_unit(self.units_of[plan.name])
        ]
        return min(open_plans, key=lambda plan: self.by_source[plan.name].tokens / plan.share, default=None)
