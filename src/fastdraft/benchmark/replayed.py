"""What replay predicts for the very texts that a runtime wrote, to stand beside what it counted.

Proposals are greedy whatever the temperature of the text; rows of a runtime whose are not have no prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastdraft.benchmark.plan import Measurement
from fastdraft.data.rows import SyntheticRow
from fastdraft.decoding.replay import accept_probabilities, counts_of_accepts
from fastdraft.errors import TargetError
from fastdraft.functional.acceptance import Floats, add_counts, counts_to_array
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.functional.lookup import lookup_counts
from fastdraft.modeling.drafts import load_draft
from fastdraft.runtimes.runtime import Proposer, Runtime
from fastdraft.target import Target

# The chance of each response token to be accepted, of texts; None where the draft cannot be read here.
Accepts = Callable[[Sequence[SyntheticRow]], list[Floats] | None]


def draft_accepts(file: Path, exported: Target, rows: Sequence[SyntheticRow]) -> list[Floats] | None:
    """Of greedy proposals of the draft, of a GGUF file itself, else of its export before conversion."""
    try:
        model = load_draft(file if file.is_file() else Path(exported.location))
    except TargetError:  # a file named by the recipe that llama.cpp runs and we cannot read
        return None
    return accept_probabilities(model, rows, exported.vocabulary)


def replayed_counts(
    work: Measurement, texts: dict[str, Any], runtime: Runtime, accepts: Accepts
) -> dict[str, list[float] | None]:
    """By label the counts (as `counts_to_array`) over the texts whose rounds the runtime told.

    Of lookup the last two columns of `lookup_counts` follow. As the runtime's do, they begin behind the first
    token, which the prompt's pass wrote. None where nothing is told, or replay cannot know what would have
    been proposed.
    """
    rows: dict[str, list[SyntheticRow]] = {}
    for label in map(str, work.proposers):
        told = zip(work.prompts.prompts, texts[label]["response_ids"], texts[label]["counts"], strict=True)
        written = [([*prompt, *ids[:1]], ids[1:]) for (_, prompt), ids, counted in told if counted]
        answers = [Generation(prompt, response, [], "length") for prompt, response in written]
        rows[label] = [SyntheticRow.of(answer, "", Sampling(0.0)) for answer in answers]
    known = work.temperature == 0 or runtime.greedy_proposals
    drafting = [str(each) for each in work.proposers if known and each.kind != "lookup"]
    # Most labels wrote the same texts.
    distinct = {row.row_id: row for label in drafting for row in rows[label]}
    chances = accepts(list(distinct.values())) if distinct else None
    by_text = dict(zip(distinct, chances, strict=True)) if chances is not None else {}
    found: dict[str, list[float] | None] = {}
    for proposer in work.proposers:
        label = str(proposer)
        drafted = [by_text[row.row_id] for row in rows[label]] if by_text and label in drafting else None
        found[label] = _counts(proposer, rows[label], runtime, drafted) if rows[label] else None
    return found


def _counts(
    proposer: Proposer, rows: Sequence[SyntheticRow], runtime: Runtime, accepts: Sequence[Floats] | None
) -> list[float] | None:
    k = proposer.num_speculative_tokens
    if proposer.kind == "draft":
        counts = add_counts(by_k[k] for by_k in counts_of_accepts(accepts, [k])) if accepts else None
        return None if counts is None else [float(value) for value in counts_to_array(counts)]
    n = proposer.lookup_tokens
    finds = [runtime.look_up(row.prompt_ids, row.response_ids, n) for row in rows]
    lookups = [each for each in finds if each is not None]
    if len(lookups) < len(finds) or (proposer.kind == "lookup_draft" and accepts is None):
        return None
    table = lookup_counts(lookups, [k], accepts if proposer.kind == "lookup_draft" else None, n)
    return [float(value) for value in table[0].sum(0)]
