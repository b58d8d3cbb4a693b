"""Should prompt lookup look for a single token too? Tokens per pass by replay over the texts of a run.

    python benchmarks/lookup_ngrams.py RUN --json lookup_ngrams.json

RUN is the folder of a run whose evaluate is finished: its texts are counted anew with lookup of the last 3 or 2
tokens, and of 3, 2 or 1, alone and with the run's last draft behind it. `wins_below` is what a pass over K + 1
tokens may cost, over one of a single token, so that looking for one token is worth it: lookup alone reads a single
token where it finds nothing, and a draft costs --draft-cost of a target's pass for each of its tokens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path

from machine import Report, options, table

from fastdraft.data.rows import read_rows
from fastdraft.decoding.replay import accept_probabilities
from fastdraft.evaluation.results import EvaluationResults
from fastdraft.forecast import lookup_speedup
from fastdraft.functional import lookup
from fastdraft.functional.acceptance import TOTALS, counts_from_array
from fastdraft.modeling.drafts import load_draft, set_threads
from fastdraft.run_folder import read_json
from fastdraft.target import Target

WAYS = {"3, 2": (3, 2), "3, 2, 1": (3, 2, 1)}


def counted(rows: Any, k: int, accepts: Any) -> tuple[float, float]:
    """Tokens per pass, and the share of rounds with a find."""
    finds = [lookup.look_up(row.prompt_ids, row.response_ids, k) for row in rows]
    total = lookup.lookup_counts(finds, [k], accepts)[0].sum(0)
    counts = counts_from_array(total[: TOTALS + k])
    return counts.block_efficiency, total[-1] / counts.num_drafts


def wins_below(found: dict[str, tuple[float, float]], k: int, draft_cost: float) -> float:
    """The widest pass, in passes of one token, at which looking for one token too is as fast."""
    low, high = 1.0, 9.0
    for _ in range(40):
        middle = (low + high) / 2
        costs = ({1: 1.0, k + 1: middle}, draft_cost)
        plain, more = (lookup_speedup(tau, k, finds, *costs) for tau, finds in found.values())
        low, high = (middle, high) if more > plain else (low, middle)
    return low


def measure(given: argparse.Namespace, folder: Path, report: Report) -> None:
    results = EvaluationResults.from_json(read_json(folder / "evaluate" / "results.json"))
    place = folder / results.draft
    draft, vocabulary = load_draft(place), Target.at(str(place)).vocabulary
    for path in sorted((folder / "evaluate" / "generations").glob("*.parquet")):
        rows = read_rows(path)[: given.texts]
        accepts = accept_probabilities(draft, rows, vocabulary)
        for k in given.k:
            for proposer, behind in (("lookup", None), ("lookup_draft", accepts)):
                found = {}
                for way, lookup.NGRAMS in WAYS.items():
                    found[way] = counted(rows, k, behind)
                one: dict[str, Any] = {"run": folder.name, "texts": path.stem, "count": len(rows), "k": k}
                one |= {"proposer": proposer, "found": found}
                cost = given.draft_cost if behind else 0.0
                report.add(one | {"wins_below": wins_below(found, k, cost)})


def main() -> None:
    parser = options(__doc__, "lookup_ngrams", device=False)
    add = parser.add_argument
    add("runs", nargs="+", help="folders of runs")
    add("--texts", type=int, default=48, help="most of each task and temperature")
    add("--num-speculative-tokens", "-k", dest="k", type=int, nargs="+", default=[3, 5])
    add("--draft-cost", type=float, default=0.1)
    given = parser.parse_args()
    set_threads(given.threads)
    report = Report(given.output, "lookup_ngrams", "cpu", given)
    for folder in given.runs:
        measure(given, Path(folder), report)
    report.finish()
    columns = ["run", "texts", "count", "k", "proposer", "found", "wins_below"]
    rows = [[str(one[name]) for name in columns] for one in report.results]
    for one, row in zip(report.results, rows, strict=True):
        row[5] = ", ".join(f"{tau:.3f} ({finds:.2f})" for tau, finds in one["found"].values())
        row[6] = f"{one['wins_below']:.2f}"
    print(table(columns, rows))


if __name__ == "__main__":
    main()
