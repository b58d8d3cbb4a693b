"""At which temperature is a draft best sampled? Replays the draft of a run at several, over the same texts.

    python benchmarks/draft_temperature.py runs/smollm2

For decoders that sample the draft losslessly (transformers, our own; llama.cpp and vLLM take its likeliest
token): the target's distribution of the text stays whatever the draft's temperature is. Prints tokens per
target pass at K over the texts that evaluate wrote at temperatures above 0, and the paired difference to a
draft at the target's temperature with its 95 % bootstrap interval over prompts; then the best of each. The
best of few is flattered a little by its choice. Set it as `evaluate.draft_temperature`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from losses_compared import POOLED, read_texts, row_of
from machine import table
from numpy.typing import NDArray

from fastdraft.evaluation.work import replay_texts
from fastdraft.modeling.drafts import load_draft, set_threads
from fastdraft.recipe.recipe import load_recipe
from fastdraft.target import Target


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("run", type=Path, help="folder of a finished run, only read")
    add("--shares", type=float, nargs="+", default=[0, 0.5, 0.75, 1.25], help="of the target's temperature")
    add("--k", type=int, default=3, help="num_speculative_tokens")
    add("--prompts", type=int, default=0, help="of each task, from the front; 0: all")
    add("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    given = parser.parse_args()
    set_threads(given.threads)
    draft = load_draft(given.run / "align/checkpoint")
    vocabulary = Target(load_recipe(str(given.run / "recipe.yaml")).target).vocabulary
    written = read_texts(given.run / "evaluate/generations", given.prompts or None)
    texts = {place: rows for place, rows in written.items() if place[1] > 0}
    shares, tables = [1.0, *given.shares], dict[tuple[str, float], list[NDArray[np.float64]]]()
    for (task, t), rows in texts.items():
        own = [replay_texts(draft, rows, [given.k], vocabulary, share * t).by_k[0] for share in shares]
        tables[task, t] = own
        pooled = tables.get((POOLED, t))
        tables[POOLED, t] = (
            [np.concatenate(pair) for pair in zip(pooled, own, strict=True)] if pooled else own
        )
    cells = []
    for place, found in sorted(tables.items(), key=lambda item: item[0][0] == POOLED):
        rows = [row_of("", place, counts, found[0]) for counts in found]
        best = max(row["block_efficiency"] for row in rows)
        for share, row in zip(shares, rows, strict=True):
            ends = [row[f"block_efficiency_change{end}"] for end in ("", "_low", "_high")]
            told = [f"{row['block_efficiency']:.3f}", "{:+.3f} [{:+.3f}, {:+.3f}]".format(*ends)]
            mark = "best" if row["block_efficiency"] == best else ""
            cells.append([place[0], f"{place[1]:g}", f"{share * place[1]:g}", *told, mark])
    print(table(["task", "target's", "draft's", "tokens per pass", "change", ""], cells))


if __name__ == "__main__":
    main()
