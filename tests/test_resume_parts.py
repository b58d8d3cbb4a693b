"""The small parts that carry a run over a crash, under any sequence of crashes: each ends in what an undisturbed one ends in.

A crash is everything since the last commit lost, bytes behind it left lying about, or the process simply gone. Derandomised.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdraft.console import Console
from fastdraft.training.batches import plan_batches
from fastdraft.training.checkpoint import Checkpoints, TrainingState
from fastdraft.training.metrics import FILE, Metrics

few = settings(max_examples=25, derandomize=True, deadline=None)


@few
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans()), max_size=6))
def test_metrics_over_any_crashes_are_those_of_one_run(attempts: list[tuple[int, int, bool]]) -> None:
    """Each attempt goes on some steps, of which the checkpoint missed the last few, and may tear the line it dies in."""
    with tempfile.TemporaryDirectory() as place:
        folder, saved = Path(place), 0
        for count, missed, torn in [*attempts, (99, 0, False)]:
            reached = min(12, saved + count)
            with Metrics(folder, saved) as metrics:
                for step in range(saved + 1, reached + 1):
                    metrics.write(step=step, loss=1 / step)
            if torn:
                with open(folder / FILE, "a", encoding="utf-8") as file:
                    file.write('{"step": 3, "lo')
            saved = max(saved, reached - missed)
        assert (folder / FILE).read_text(encoding="utf-8") == "".join(
            json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in range(1, 13)
        )


def trained(folder: Path, until: int, console: Console, save_at: int = 0) -> tuple[nn.Module, TrainingState]:
    """Goes on from the latest checkpoint; each step draws its rows and its noise from torch's own random state."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameters(), lr=0.1)]
    checkpoints = Checkpoints(folder, model, optimizers, console)
    state = checkpoints.load_latest()
    while state.step < until:
        optimizers[0].zero_grad()
        nn.functional.dropout(model(torch.randn(5, 4)), 0.2).square().mean().backward()
        optimizers[0].step()
        state.step += 1
        if state.step == save_at:
            checkpoints.save(state)
    return model, state


@settings(few, max_examples=15)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 3), st.integers(0, 3), st.sampled_from(["none", "weights", "state", "torn"])
        ),
        max_size=4,
    )
)
def test_training_over_any_crashes_ends_in_the_same_weights(attempts: list[tuple[int, int, str]]) -> None:
    """Each attempt saves after some steps, goes on some more, dies, and may leave its newest checkpoint damaged."""
    console = Console(quiet=True)
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "warn", lambda text: None)
        alone, _ = trained(Path(place) / "alone", 12, console)
        folder, whole, reached = Path(place) / "crashed", set[str](), 0
        for count, more, harm in attempts:
            save_at = min(12, reached + count)
            trained(folder, min(12, save_at + more), console, save_at)
            newest = folder / "steps" / f"step-{save_at:09d}"
            others = {path.name for path in (folder / "steps").glob("step-*")} & whole - {newest.name}
            if harm == "torn":
                (folder / "steps" / f".{newest.name}.1.tmp").mkdir(exist_ok=True)
            elif harm != "none" and others:
                path = newest / ("state.json" if harm == "state" else "model.safetensors")
                path.write_bytes(path.read_bytes()[:-3])
                whole.discard(newest.name)
                reached = max(int(name.removeprefix("step-")) for name in others)
                continue
            whole.add(newest.name)
            reached = save_at
        found, state = trained(folder, 12, console)
        assert state.step == 12
        for name, weight in alone.state_dict().items():
            assert torch.equal(found.state_dict()[name], weight)


@few
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.integers(1, 120),
    st.integers(0, 99),
    st.integers(1, 900),
)
def test_a_plan_of_batches_takes_every_sample_once_an_epoch_and_a_longer_one_begins_like_it(
    lengths: list[int], batch_tokens: int, seed: int, tokens: int
) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    plan = plan_batches(sizes, batch_tokens, seed, tokens=tokens)
    taken = np.concatenate(plan)
    for start in range(0, len(taken) - len(sizes) + 1, len(sizes)):
        assert sorted(taken[start : start + len(sizes)].tolist()) == list(range(len(sizes)))
    assert tokens <= sizes[taken].sum() < tokens + sizes.max()
    longer = np.concatenate(plan_batches(sizes, batch_tokens, seed, tokens=tokens + 300))
    assert np.array_equal(longer[: len(taken)], taken)
    assert all(len(numbers) == 1 or sizes[numbers[:-1]].sum() < batch_tokens for numbers in plan)
