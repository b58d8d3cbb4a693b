"""What tests/test_distributed.py does in two gloo processes at once: `python two_processes.py FOLDER`,
started by torchrun.

One start of two interpreters for all of it; each process leaves what it saw in `seen-RANK.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdraft.console import Console
from fastdraft.errors import DataError, FastDraftError
from fastdraft.training.batches import AlignmentBatches, PackedBatches, plan_batches
from fastdraft.training.distributed import World, join
from fastdraft.training.trainer import Trainer, TrainingSchedule, Validation
from test_training import LENGTH, VOCAB, Model, Poisoned, Rows, make_step, sample

STEPS = 50


def packed(world: World, steps: int = STEPS) -> PackedBatches:
    """Five rows a step: three for the first process, two for the second."""
    return PackedBatches(Rows(5), steps, None, world.rank, world.size)


def aligned(world: World) -> AlignmentBatches:
    """Samples of every length, one packed step in five, and a last step of one sample, which leaves a process
    without work.
    """
    generator = np.random.default_rng(3)
    samples = [sample(ids(generator, 1 + i % 4), ids(generator, 2 + i % 9)) for i in range(161)]
    lengths = np.array([one.num_tokens for one in samples])
    plan = plan_batches(lengths, 40, 0, 2 * int(lengths.sum()))
    steps = [*plan[:39], plan[39][:1]]
    source = AlignmentBatches(samples, steps, packed(world, 0), 0.2, world.rank, world.size)
    assert source.steps == STEPS
    return source


def ids(generator: np.random.Generator, count: int) -> list[int]:
    return generator.integers(0, VOCAB, count).tolist()


def trainer(folder: Path, world: World, source: Any, objective: Any = None, **schedule: Any) -> Trainer:
    model = Model()
    chosen = TrainingSchedule("pretrain", lambda step: 1.0, 1e-2, 2 * LENGTH, **schedule)
    step = make_step(model, "muon", objective)
    return Trainer(folder, model, step, source, chosen, Console(quiet=True), world=world)


def packed_run(folder: Path, world: World) -> Trainer:
    """Its first weight is the score: as good a measure as any."""
    chosen = trainer(folder, world, packed(world), validate_every=10, checkpoint_every=25)
    chosen.validate = lambda: Validation(
        {"process": world.rank}, next(chosen.model.parameters())[0, 0].item()
    )
    return chosen


def stop_at(chosen: Trainer, step: int) -> Trainer:
    update = chosen.step.update

    def stopping(factor: float) -> None:
        update(factor)
        chosen.console.stop.requested = chosen.console.stop.requested or chosen.state.step + 1 >= step

    chosen.step.update = stopping  # type: ignore[method-assign]
    return chosen


def outcome(work: Any) -> str:
    try:
        work()
    except FastDraftError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Failing(PackedBatches):
    """Cannot read step 5."""

    def batches(self, step: int, micro_batch_tokens: int = 0) -> Any:
        if step == 5:
            raise DataError("shard 7: damaged")
        return super().batches(step, micro_batch_tokens)


def everything(folder: Path, world: World) -> dict[str, Any]:
    second = world.rank == 1
    best = packed_run(folder / "packed", world).run().best_step
    trainer(folder / "aligned", world, aligned(world)).run()
    bad = trainer(folder / "bad", world, packed(world, 6), objective=Poisoned({3}) if second else None)
    skipped = bad.run().skipped
    source = (Failing if second else PackedBatches)(Rows(5), 8, None, world.rank, world.size)
    unread = outcome(trainer(folder / "unread", world, source).run)
    # Two processes, then one, then two: a stop that only the second process was asked for ends both.
    first = trainer(folder / "stops", world, packed(world))
    stops = [outcome((stop_at(first, 15) if second else first).run), str(first.state.step)]
    if world.is_main:
        alone = stop_at(trainer(folder / "stops", World(), packed(World())), 30)
        stops += [outcome(alone.run), str(alone.state.step)]
    world.gather(None)
    stops += [str(trainer(folder / "stops", world, packed(world)).run().step)]

    def full_disk() -> None:
        raise FastDraftError("x: no space left", "free some")

    written = outcome(lambda: world.on_main(full_disk))
    told = world.on_main(lambda: {"score": 1.5, "none": None})
    return {
        "best": best,
        "skipped": skipped,
        "unread": unread,
        "stops": stops,
        "written": written,
        "told": told,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with join(torch.device("cpu"), "first") as world:
        assert world.gather(world.rank) == [0, 1]
    with join(torch.device("cpu"), "second") as world:  # a stage after a stage
        seen = everything(folder, world)
    (folder / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
