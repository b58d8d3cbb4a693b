"""Several crashes of different kinds, one after the other, in every stage: the last attempt ends in the undisturbed run's files.

Each attempt may end at any write: killed (the folder is copied as SIGKILL leaves it, and only the copy goes on), failing there (a
full disk), thrown out of it (a second Ctrl-C), or asked to stop, which it does at its next safe point. Derandomised.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdraft import pipeline
from fastdraft.console import Console
from fastdraft.errors import FastDraftError, Interrupted
from fastdraft.training.metrics import Metrics
from test_every_write import DEAD_PROCESS, copy_without, differing, recipe_in, result

KINDS = ("killed", "full disk", "thrown out", "asked to stop")
crashes = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 12)), min_size=2, max_size=4)
"""How each attempt ends, and at which of its writes; one with fewer writes comes to its end."""


class _KilledError(BaseException):
    """Ends this process's attempt once the copy is made: nothing that it still does counts."""


def crash_at(patch: pytest.MonkeyPatch, run: Path, kind: str, write: int, console: Console) -> Path:
    """Lets the given write of an attempt end in the given way; returns the folder in which the next attempt goes on."""
    copy, left = run.parent / f"crash-{uuid.uuid4().hex}", [write]

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and kind == "killed":
                shutil.copytree(run, copy)
                raise _KilledError
            if left[0] == 0 and kind == "thrown out":
                raise KeyboardInterrupt
            if left[0] <= 0 and kind == "full disk":
                raise OSError(errno.ENOSPC, "No space left on device", str(run))
            if left[0] == 0:
                console.stop.requested = True
            return real(*arguments, **named)

        return call

    patch.setattr(os, "getpid", lambda: DEAD_PROCESS)
    patch.setattr(os, "replace", before(os.replace))
    patch.setattr(Metrics, "write", before(Metrics.write))
    return copy


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "synthesize", "align", "evaluate"])
@settings(
    max_examples=3,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sequence=crashes)
def test_a_stage_that_crashes_again_and_again_ends_in_the_same_files(
    short_run: Path, stage: str, sequence: list[tuple[str, int]]
) -> None:
    runs = short_run.parent / "runs"
    run = runs / f"crash-{uuid.uuid4().hex}"
    copy_without(runs / "tiny", run, stage)
    earlier = {name: result(run / name) for name in pipeline.STAGE_NAMES if (run / name).is_dir()}
    for kind, write in sequence:
        console = Console(quiet=True)
        with pytest.MonkeyPatch.context() as patch:
            copy = crash_at(patch, run, kind, write, console)
            with contextlib.suppress(_KilledError, KeyboardInterrupt, FastDraftError, Interrupted):
                pipeline.run(recipe_in(short_run, run.name), console, only=[stage])
        if copy.exists():
            shutil.rmtree(run)
            run = copy
    pipeline.run(recipe_in(short_run, run.name), only=[stage])
    assert differing(result(run / stage), result(runs / "tiny" / stage)) == [], sequence
    assert {name: result(run / name) for name in earlier} == earlier
    assert not list(run.rglob("*.tmp"))
    shutil.rmtree(run)
