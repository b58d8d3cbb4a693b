"""Many processes against one: the same losses, the same data, the same end, whatever happens to one of them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import two_processes
from fastdraft.errors import FastDraftError
from fastdraft.training.batches import PackedBatches, Sample, Share
from fastdraft.training.checkpoint import optimizer_tensors
from fastdraft.training.distributed import current, error_from, error_record
from fastdraft.training.metrics import read_metrics
from fastdraft.training.tensor_files import StoredTensors, file_name
from fastdraft.training.trainer import Trainer, Validation
from test_training import LENGTH, Rows

HERE = Path(__file__).parent
SAME = 1e-5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Everything in tests/two_processes.py, done once."""
    folder, port = tmp_path_factory.mktemp("together"), free_port()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "src")])}
    command = [sys.executable, str(HERE / "two_processes.py"), str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank), str(port)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=280)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return folder, [
        json.loads((folder / f"seen-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs in this one process."""
    folder = tmp_path_factory.mktemp("alone")
    two_processes.packed_run(folder / "packed").run()
    two_processes.trainer(folder / "aligned", two_processes.aligned()).run()
    adamw = two_processes.trainer(folder / "adamw", two_processes.packed(), "adamw", validate_every=10)
    adamw.validate = lambda: Validation({"first": next(adamw.model.parameters())[0, 0].item()}, 0.0)
    adamw.run()
    return folder


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(folder) if "loss" in record}


def worst_difference(first: Path, second: Path) -> float:
    """The largest difference of loss or gradient norm at any step; both records must have each step once."""
    records = [[record for record in read_metrics(folder) if "loss" in record] for folder in (first, second)]
    assert (
        [r["step"] for r in records[0]]
        == [r["step"] for r in records[1]]
        == list(range(1, two_processes.STEPS + 1))
    )
    assert [r["tokens"] for r in records[0]] == [r["tokens"] for r in records[1]]
    pairs = [(a[key], b[key]) for a, b in zip(*records, strict=True) for key in ("loss", "grad_norm")]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("name", ["packed", "aligned"])
def test_two_processes_train_as_one_does_to_1e_5_over_50_steps(together: Any, alone: Path, name: str) -> None:
    assert worst_difference(alone / name, together[0] / name) < SAME
    assert (
        max(losses(alone / name).values()) - min(losses(alone / name).values()) > 0.1
    )  # the weights did move


def test_weights_in_parts_train_as_whole_ones_do(together: Any, alone: Path) -> None:
    folder, seen = together
    assert [process["parts"][0] for process in seen] == ["no error", "no error"]
    assert worst_difference(alone / "adamw", folder / "parts") < SAME
    first, second = (
        [r["first"] for r in read_metrics(which) if "first" in r]
        for which in (alone / "adamw", folder / "parts")
    )
    assert first == pytest.approx(second, abs=SAME)
    assert {path.suffix for path in (folder / "parts").rglob("*") if path.is_file()} == {
        ".safetensors",
        ".json",
        ".jsonl",
    }


def test_a_run_in_parts_goes_on_with_whole_weights(together: Any, alone: Path) -> None:
    folder, seen = together
    assert all(process["parts"][1].startswith("Interrupted") for process in seen)
    assert worst_difference(alone / "adamw", folder / "parts_stopped") < SAME


def test_parts_of_two_processes_go_on_in_one_and_in_two_again(together: Any, alone: Path) -> None:
    folder, seen = together
    first, second = (process["again"] for process in seen)
    assert first[2].startswith("Interrupted")
    assert first[3].startswith("Interrupted")
    assert (first[4], first[5], second[3]) == ("30", "no error", "no error")
    assert worst_difference(alone / "adamw", folder / "parts_again") < SAME


def test_a_part_that_one_process_cannot_write_is_the_error_of_all_and_leaves_no_folder(together: Any) -> None:
    first, second = (process["again"][:2] for process in together[1])
    assert first == second
    assert first[0].startswith("FastDraftError")
    assert "no space left" in first[0]
    assert first[1] == "[]"


def parts_of(together: Any, place: Path) -> tuple[Path, Trainer]:
    """A copy of the checkpoint of two processes at the last step, and one process that may go on from it."""
    steps = place / "steps"
    shutil.copytree(together[0] / "parts/steps/step-000000050", steps / "step-000000050")
    shutil.copytree(together[0] / "parts/steps/best-000000010", steps / "best-000000010")
    return steps / "step-000000050", two_processes.trainer(place, two_processes.packed(), "adamw")


def test_each_process_writes_its_rows_and_one_reads_them_all(
    together: Any, alone: Path, tmp_path: Path
) -> None:
    folder, trainer = parts_of(together, tmp_path)
    parts = [load_file(folder / f"model-0000{rank}-of-00002.safetensors") for rank in range(2)]
    whole = load_file(alone / "adamw/steps/step-000000050/model.safetensors")
    for name, tensor in whole.items():
        rows = [part[name].shape[0] for part in parts if name in part]
        assert sum(rows) == tensor.shape[0]
        assert max(rows) == -(-tensor.shape[0] // 2)
    assert trainer.checkpoints.load_latest().step == 50
    assert all(
        torch.allclose(parameter, whole[name], atol=SAME)
        for name, parameter in trainer.model.named_parameters()
    )
    moments = load_file(alone / "adamw/steps/step-000000050/optimizer.safetensors")
    found = optimizer_tensors(trainer.model, trainer.step.optimizers)
    assert found.keys() == moments.keys()
    assert all(torch.allclose(found[name], value, atol=SAME) for name, value in moments.items())


@pytest.mark.parametrize("harm", ["missing", "damaged", "unlisted", "gap"])
def test_a_part_that_is_missing_or_damaged_is_told_and_nothing_goes_on_from_the_rest(
    together: Any, tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, trainer = parts_of(together, tmp_path)
    part, state = (
        folder / "optimizer-00001-of-00002.safetensors",
        json.loads((folder / "state.json").read_text(encoding="utf-8")),
    )
    if harm == "missing":
        part.unlink()
    elif harm == "damaged":
        part.write_bytes(part.read_bytes()[:-2] + b"??")
    elif harm == "unlisted":
        del state["files"][part.name]
    else:
        next(entry for entry in state["parts"]["model"].values())["rows"][1][0] += 1
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(FastDraftError, match="every checkpoint is damaged"):
        trainer.checkpoints.load_latest()
    told = capsys.readouterr().err
    assert {
        "missing": part.name,
        "damaged": part.name,
        "unlisted": f"{part.name} is not listed",
        "gap": "is not all there",
    }[harm] in told


@pytest.mark.parametrize("cuts", [[0, 7], [0, 4, 7], [0, 3, 6, 7, 7]])
def test_any_rows_are_read_from_the_parts_of_any_number_of_processes(tmp_path: Path, cuts: list[int]) -> None:
    whole, size = torch.arange(21.0).reshape(7, 3), len(cuts) - 1
    for rank in range(size):
        own = {"w": whole[cuts[rank] : cuts[rank + 1]].clone()} if cuts[rank] < cuts[rank + 1] else {}
        save_file(
            own | ({"step": torch.tensor(5.0)} if rank == 0 else {}),
            tmp_path / file_name("model", rank, size),
        )
    spans = [list(span) for span in itertools.pairwise(cuts)]
    layout = {"w": {"shape": [7, 3], "rows": spans}, "step": {"shape": [], "rows": None}}
    record = {
        "files": {file_name("model", rank, size): {} for rank in range(size)},
        "parts": {"size": size, "model": layout},
    }
    with StoredTensors(tmp_path, "model", record) as stored:
        for first, behind in itertools.combinations_with_replacement(range(8), 2):
            assert torch.equal(stored.rows("w", first, behind), whole[first:behind])
        assert stored.like("step", torch.zeros(7, 3)) == 5
        assert torch.equal(stored.like("w", torch.zeros(7, 3)), whole)


def test_two_then_one_then_two_processes_see_the_same_data_in_the_same_order(
    together: Any, alone: Path
) -> None:
    folder, seen = together
    first, second = (process["stops"] for process in seen)
    assert first[0].startswith("Interrupted")
    assert first[2].startswith("Interrupted")
    assert (first[0], first[1]) == (second[0], second[1])  # both stopped, at one step
    assert 15 <= int(first[1]) <= 17
    assert (first[3], first[4], second[2]) == ("30", "50", "50")
    assert worst_difference(alone / "packed", folder / "stops") < SAME


def test_only_the_first_process_validates_and_all_know_the_best_step(together: Any, alone: Path) -> None:
    folder, seen = together
    validations = [record for record in read_metrics(folder / "packed") if "process" in record]
    assert [record["process"] for record in validations] == [0] * 5
    ours = [record["step"] for record in read_metrics(alone / "packed") if "process" in record]
    assert [record["step"] for record in validations] == ours
    assert seen[0]["best"] == seen[1]["best"] > 0


def test_the_checkpoint_of_two_processes_holds_the_weights_of_one(together: Any, alone: Path) -> None:
    first, second = (
        load_file(folder / "packed/steps/step-000000050/model.safetensors") for folder in (alone, together[0])
    )
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < SAME


def test_when_memory_runs_out_in_one_process_all_take_smaller_micro_batches(
    together: Any, alone: Path
) -> None:
    folder, seen = together
    assert [process["limit"] for process in seen] == [LENGTH, LENGTH]
    assert worst_difference(alone / "packed", folder / "small") < SAME
    assert {process["refused"] for process in seen} == {seen[0]["refused"]}
    assert "out of memory with one row of" in seen[0]["refused"]


def test_memory_that_runs_out_too_late_to_try_again_is_noted_for_the_restart(together: Any) -> None:
    folder, seen = together
    assert "out of memory in a step like one that fitted" in seen[1]["late"]
    assert seen[0]["late"].startswith("lost: ")
    noted = json.loads((folder / "late/steps/micro_batch_limit.json").read_text(encoding="utf-8"))
    assert noted == {"micro_batch_limit": LENGTH}
    resumed = two_processes.trainer(folder / "late", two_processes.packed(6))
    assert resumed.run().micro_batch_limit == LENGTH


def test_a_bad_number_in_one_process_leaves_the_step_out_in_all(together: Any) -> None:
    folder, seen = together
    assert [process["skipped"] for process in seen] == [1, 1]
    assert [record["step"] for record in read_metrics(folder / "bad") if record.get("skipped")] == [2]


def test_what_one_process_cannot_read_or_write_is_the_error_of_all(together: Any) -> None:
    _, seen = together
    for key, text in (
        ("unread", "DataError: shard 7: damaged"),
        ("written", "FastDraftError: x: no space left"),
    ):
        assert seen[0][key] == seen[1][key]
        assert seen[0][key].startswith(text)
    assert seen[0]["told"] == seen[1]["told"] == {"score": 1.5, "none": None}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12])
def test_the_shares_of_any_number_of_processes_are_the_step(size: int) -> None:
    whole = PackedBatches(Rows(), 3, LENGTH, 5, 2)
    shares = [PackedBatches(Rows(), 3, LENGTH, 5, 2, share=Share(rank, size)) for rank in range(size)]
    rows = [row for share in shares for batch in share.batches(1) for row in batch.input_ids.tolist()]
    assert rows == [row for batch in whole.batches(1) for row in batch.input_ids.tolist()]
    samples = [Sample([1] * (1 + i % 5), [2] * (1 + i % 17)) for i in range(40)]
    dealt = [Share(rank, size).deal(samples) for rank in range(size)]
    assert sorted(id(sample) for part in dealt for sample in part) == sorted(id(sample) for sample in samples)
    loads = [sum(sample.num_tokens for sample in part) for part in dealt]
    assert max(loads) - min(loads) <= max(sample.num_tokens for sample in samples)
    assert np.ptp([batch.num_tokens // LENGTH for batch in whole.batches(0)]) <= 2


def test_alone_nothing_is_joined() -> None:
    world = current()
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.gather([3, 4]) == [[3, 4]]
    assert world.on_main(lambda: 7) == 7
    world.raise_first(None)
    with pytest.raises(FastDraftError):
        world.raise_first(FastDraftError("x", "full", "rule", "remedy"))


def test_an_error_survives_the_way_to_another_process() -> None:
    error = FastDraftError("a", "b", "c", "d")
    again = error_from(json.loads(json.dumps(error_record(error))))
    assert type(again) is FastDraftError
    assert str(again) == str(error)
