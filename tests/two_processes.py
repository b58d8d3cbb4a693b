"""What tests/test_distributed.py does in two gloo processes at once: `python two_processes.py FOLDER RANK PORT`.

One start of two interpreters for all of it: each part leaves its records in FOLDER, and each process what it saw in `seen-RANK.json`.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdraft.console import Console
from fastdraft.errors import DataError, FastDraftError
from fastdraft.training import tensor_files
from fastdraft.training.batches import AlignmentBatches, PackedBatches, Sample, plan_batches
from fastdraft.training.distributed import World, current, join
from fastdraft.training.sharding import in_parts
from fastdraft.training.trainer import Plan, Trainer, Validation
from test_training import LENGTH, VOCAB, Model, Poisoned, Rows, make_step
from test_training_failures import small_device

STEPS, ROWS = 50, 5


def packed(steps: int = STEPS, share: Any = None) -> PackedBatches:
    """Five rows a step: two for the first process, three for the second."""
    return PackedBatches(Rows(), steps, LENGTH, ROWS, 2, share=share or current().share)


def aligned() -> AlignmentBatches:
    """Samples of every length, one packed step in five, and a last step of one sample, which leaves a process without work."""
    generator = np.random.default_rng(3)
    samples = [Sample(ids(generator, 1 + i % 4), ids(generator, 2 + i % 9)) for i in range(161)]
    lengths = np.array([sample.num_tokens for sample in samples])
    plan = plan_batches(lengths, 40, 0, epochs=2.0)
    plan = [*plan[:39], plan[39][:1]]
    source = AlignmentBatches(samples, plan, 0, 24, packed(0), 0.2, current().share)
    assert source.steps == STEPS
    return source


def ids(generator: np.random.Generator, count: int) -> list[int]:
    return generator.integers(0, VOCAB, count).tolist()


def trainer(folder: Path, source: Any, kind: str = "muon", objective: Any = None, **plan: Any) -> Trainer:
    model = Model()
    chosen = Plan(title="t", key="pretrain", factor=lambda step: 1.0, peak_rate=1e-2, **plan)
    return Trainer(folder, model, make_step(model, kind, objective), source, chosen, Console(quiet=True))


def validated(trainer: Trainer) -> Trainer:
    """Its first weight is the score: as good a measure as any."""
    trainer.validate = lambda: Validation(
        {"process": current().rank}, next(trainer.model.parameters())[0, 0].item()
    )
    return trainer


def packed_run(folder: Path) -> Trainer:
    return validated(trainer(folder, packed(), validate_every=10, checkpoint_every=25))


def in_parts_run(folder: Path, stop: int = 0) -> str:
    """FSDP2 over a toy with one layer; stopped after some steps, it goes on with whole weights in every process."""
    model = Layered()
    parts: Any = in_parts(model, "fsdp2", "adamw")  # type: ignore[arg-type]
    plan = Plan(title="t", key="pretrain", factor=lambda step: 1.0, peak_rate=1e-2, validate_every=10)
    chosen = Trainer(folder, model, make_step(parts), packed(), plan, Console(quiet=True), trained=parts)
    chosen.validate = lambda: Validation({"first": next(model.parameters())[0, 0].item()}, 0.0)
    return outcome(stop_at(chosen, stop).run if stop else chosen.run)


def in_parts_again(folder: Path, world: World) -> list[str]:
    """Two processes with parts, then one, then two with parts; before that one of two cannot write its part."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        if world.rank:
            patch.setattr(tensor_files, "save_file", no_space)
        seen += [in_parts_run(folder, 5)]
    world.all_agree(True)
    seen += [str(list(folder.glob("steps/*")))]
    seen += [in_parts_run(folder, 15)]
    if world.is_main:
        alone = stop_at(trainer(folder, packed(share=World().share), "adamw"), 30)
        alone.world = World()
        seen += [outcome(alone.run), str(alone.state.step)]
    world.all_agree(True)
    return [*seen, in_parts_run(folder)]


def no_space(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


class Layered(Model):
    """With what `in_parts` asks of a model."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.model.layers = torch.nn.ModuleList([self.model.matrix])

    def get_decoder(self) -> torch.nn.Module:
        return self.model


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


def reading_fails(source: PackedBatches, step: int) -> Any:
    class Failing:
        steps, tokens = source.steps, source.tokens

        def batches(self, number: int) -> Any:
            if number == step:
                raise DataError("shard 7", "damaged", "must be whole", "prepare it again")
            return source.batches(number)

    return Failing()


def interrupted_runs(folder: Path, world: World) -> list[str]:
    """Two processes, then one, then two: a stop that only the second process was asked for ends both."""
    first = trainer(folder, packed())
    seen = [outcome((stop_at(first, 15) if world.rank else first).run), str(first.state.step)]
    if world.is_main:
        alone = stop_at(trainer(folder, packed(share=World().share)), 30)
        alone.world = World()
        seen += [outcome(alone.run), str(alone.state.step)]
    world.all_agree(True)
    last = trainer(folder, packed())
    seen += [str(last.run().step)]
    return seen


def everything(folder: Path, world: World) -> dict[str, Any]:
    second = world.rank == 1
    best = packed_run(folder / "packed").run().best_step
    trainer(folder / "aligned", aligned()).run()
    small = trainer(folder / "small", packed())
    limit = (small_device(small, LENGTH) if second else small).run().micro_batch_limit
    tight = trainer(folder / "tight", packed(4))
    refused = outcome((small_device(tight, LENGTH - 1) if second else tight).run)
    bad = trainer(folder / "bad", packed(6), objective=Poisoned({3}) if second else None)
    skipped = bad.run().skipped
    source = packed(8)
    unread = outcome(trainer(folder / "unread", reading_fails(source, 5) if second else source).run)
    stops = interrupted_runs(folder / "stops", world)

    def full_disk() -> None:
        raise FastDraftError("x", "no space left", "must fit", "free some")

    written = outcome(lambda: world.on_main(full_disk))
    told = world.on_main(lambda: {"score": 1.5, "none": None})
    parts = [in_parts_run(folder / "parts"), in_parts_run(folder / "parts_stopped", 15)]
    trainer(folder / "parts_stopped", packed(), "adamw").run()
    again = in_parts_again(folder / "parts_again", world)
    return {
        "parts": parts,
        "again": again,
        "best": best,
        "limit": limit,
        "refused": refused,
        "skipped": skipped,
        "unread": unread,
        "stops": stops,
        "written": written,
        "told": told,
    }


def late_lack_of_memory(folder: Path, rank: int) -> str:
    """A step like one that fitted does not: it cannot be tried again, so the size is noted and the process ends."""
    late = trainer(folder / "late", packed(6))
    loss_sum = late.step.loss_sum

    def failing(batch: Any) -> torch.Tensor:
        if rank == 1 and late.state.step == 3:
            raise MemoryError
        return loss_sum(batch)

    late.step.loss_sum = failing  # type: ignore[method-assign]
    try:
        late.run()
    except FastDraftError as error:
        return str(error)
    except RuntimeError as error:
        return f"lost: {error}"
    return "no error"


def main(folder: Path, rank: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with join(torch.device("cpu")) as world:
        seen = everything(folder, world)
        seen["late"] = late_lack_of_memory(folder, rank)
        (folder / f"seen-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
        os._exit(0)  # the other one waits for this process no longer


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
