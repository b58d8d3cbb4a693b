"""One of the processes of a training stage, started by torch's launcher: `python -m fastdraft.commands.worker FOLDER`.

Decides what such a process knows (the recipe and the stage, from a file in FOLDER; its number and device, from the environment), how it
answers (an error in a file, for the process that started it) and when it ends: with its work, when FOLDER or the starting process is gone,
or with exit code 1 when others are lost, so that the launcher starts all of them again from the last checkpoint.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fastdraft.console import Console
    from fastdraft.errors import FastDraftError
    from fastdraft.recipe.recipe import Recipe
    from fastdraft.training.distributed import World

JOB, STOP, OUTCOMES = "job.json", "stop", "outcome-*.json"
WATCH_SECONDS = 0.2
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|timed out", re.IGNORECASE)
"""How the backends say that another process is gone."""


def main(folder: Path) -> int:
    """Works at the job in `folder`; returns the exit code: 1 where all should begin again from the last checkpoint."""
    from fastdraft.console import Console
    from fastdraft.errors import FastDraftError
    from fastdraft.run_folder import read_json

    job = read_json(folder / JOB)
    # Which machine has process 0 is the launcher's choice; the user looks at the first machine.
    console = Console(quiet=job["quiet"]) if job["prints"] and os.environ["LOCAL_RANK"] == "0" else _silent()
    threading.Thread(target=_watch, args=(folder, console, os.getppid()), daemon=True).start()
    try:
        _work(job, folder, console)
    except FastDraftError as error:
        print(f"process {os.environ['RANK']}: {error}", file=sys.stderr)
        return 1
    except FastDraftError as error:
        _report(error, folder)
    except Exception as error:
        if not _LOST.search(str(error)):  # the launcher tells who was lost
            traceback.print_exc()
            found, rule = (
                f"{type(error).__name__} in process {os.environ['RANK']}",
                "a fault of the program, see the trace above",
            )
            _report(
                FastDraftError(job["stage"], found, rule, "progress is saved; report it, or try one process"),
                folder,
            )
        return 1
    return 0


def _report(error: FastDraftError, folder: Path) -> None:
    """Leaves an error to the process that started this one, and to those that would only meet it again."""
    from fastdraft.run_folder import write_json
    from fastdraft.training.distributed import error_record

    write_json(folder / OUTCOMES.replace("*", os.environ["RANK"]), error_record(error))


def _work(job: dict[str, Any], folder: Path, console: Console) -> None:
    from fastdraft.pipeline import STAGES, make_context
    from fastdraft.recipe.base import load_config
    from fastdraft.recipe.recipe import Recipe
    from fastdraft.training.distributed import join

    recipe = load_config(Recipe, job["recipe"])
    device = _own_device(recipe)
    _share_cores(recipe.run.threads)
    settings = recipe.run.model_copy(update={"device": str(device)})
    stage = next(stage for stage in STAGES if stage.name == job["stage"])
    with join(device) as world:
        if _met_earlier_error(world, folder):
            return
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if restarts:
            console.warn(
                f"{stage.name}: a process was lost; all go on from the last checkpoint (restart {restarts} of {job['restarts']})"
            )
        context = make_context(recipe.model_copy(update={"run": settings}), console)
        stage.run(recipe.sections()[stage.name], context)


def _met_earlier_error(world: World, folder: Path) -> bool:
    """Whether one process met an error before it took the others down with it: it is everyone's now, for it would only come again."""
    from fastdraft.errors import FastDraftError
    from fastdraft.run_folder import read_json
    from fastdraft.training.distributed import error_from

    records = [read_json(path) for path in sorted(folder.glob(OUTCOMES))]
    try:
        world.raise_first(error_from(records[0]) if records else None)
    except FastDraftError as error:
        _report(error, folder)
        return True
    return False


def _own_device(recipe: Recipe) -> torch.device:
    import torch

    from fastdraft.modeling.drafts import pick_device

    device = pick_device(recipe.run.device)
    if device.type == "cpu":
        return device
    device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
    torch.accelerator.set_device_index(device.index)
    return device


def _share_cores(threads: int) -> None:
    """The machine's cores in equal parts, unless the recipe or the environment says how many."""
    import torch

    if not threads and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))


def _silent() -> Console:
    from fastdraft.console import Console

    class Silent(Console):
        def warn(self, text: str) -> None:
            """Another process has said it."""

    return Silent(quiet=True)


def _watch(folder: Path, console: Console, parent: int) -> None:
    """Passes on the wish to stop, and ends this process with the one that started it."""
    while True:
        if not (folder / JOB).exists() or os.getppid() != parent:
            os._exit(1)
        console.stop.requested = console.stop.requested or (folder / STOP).exists()
        time.sleep(WATCH_SECONDS)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)  # without the backends' goodbyes, which wait for processes that are lost
