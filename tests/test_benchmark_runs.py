"""Plans, runs in turn and rows of a benchmark, with a runtime that follows a script: every time is exact."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from fastdraft.benchmark.figures import rows_of
from fastdraft.benchmark.memory import measure_memory, resident
from fastdraft.benchmark.plan import (
    BenchmarkPlan,
    Measurement,
    PromptSet,
    make_plan,
    mixed_prompts,
    prompts_of_length,
    task_prompts,
)
from fastdraft.benchmark.rows import BenchmarkRow, PassesRow
from fastdraft.benchmark.runs import PairRuns
from fastdraft.decoding.speculative import Round
from fastdraft.errors import DataError
from fastdraft.functional.lookup import Lookups, look_up
from fastdraft.run_folder import StageFolder
from fastdraft.runtimes.runtime import Proposer, TimedText

FIRST = 0.5
TOKENS = 9
TEXT = list(range(TOKENS))
NAMED = {"target_weights": "int4", "draft_weights": "int8"}
SECONDS = {"draft_seconds": 0.25, "target_seconds": {1: 1.0, 2: 1.25, 4: 1.5}}
PASSES = PassesRow(**NAMED, **SECONDS, prefix_tokens=128, device="CPU", draft_device="CPU")


@dataclass
class Scripted:
    """A pair that answers every prompt with the same tokens, each K at a set pace by repeat, and logs it."""

    paces: dict[int, Sequence[float]] = field(default_factory=dict)
    texts: dict[int, list[int]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    timed: dict[int, int] = field(default_factory=dict)
    gaps: list[tuple[list[int], int, int]] = field(default_factory=list)
    lossless_sampling: ClassVar[bool] = False
    greedy_proposals: ClassVar[bool] = False

    def look_up(self, prompt: list[int], response: list[int], k: int) -> Lookups:
        return look_up(prompt, response, k)

    def open(self, target: Path, draft: Path) -> Scripted:
        return self

    def write(
        self, prompts: Any, _: Any, max_new_tokens: int, seed: int, by: Any = None, exact_counts: bool = False
    ) -> list[TimedText]:
        k, lookup = (by.num_speculative_tokens, by.kind == "lookup") if by else (0, False)
        exact_counts, k = exact_counts and k > 0, -k if lookup else k
        text = self.texts.get(k, TEXT)[:max_new_tokens]
        asked = ",".join(str(prompt[0]) for prompt in prompts)
        self.log.append(f"{k}{'*' if exact_counts else ''}:{asked}:{len(text)}")
        paces, done = self.paces.get(k, (1.0,)), self.timed.get(k, 0)
        pace = paces[min(done // 2, len(paces) - 1)]  # two prompts a repeat
        if k or len(self.log) > 6:  # the target alone has no exact counts: its first two answers are untimed
            self.timed[k] = done + (not exact_counts and len(text) == len(self.texts.get(k, TEXT)))
        seconds = FIRST + pace * (len(text) - 1)
        rounds = [Round(text[i : i + 4], [], abs(k), abs(k), 0.0, abs(k)) for i in (1, 5)] if k else []
        return [TimedText(text, seconds, FIRST, rounds) for _ in prompts]

    def gap(self, prefix_ids: list[int], first: int, second: int) -> float:
        self.gaps.append((prefix_ids, first, second))
        return -0.02


def work(ks: Sequence[int] = (1, 3), temperature: float = 0.0, **changes: Any) -> Measurement:
    """A K below 0 is one of prompt lookup."""
    prompts = replace(PromptSet("code", [("a", [10, 1, 2]), ("b", [20, 1])], TOKENS), **changes)
    proposers = [Proposer("draft", k) if k > 0 else Proposer("lookup", -k) for k in ks]
    return Measurement(prompts, "openvino", ("int4", "int8"), temperature, proposers, 0)


def rows(
    path: Path, pair: Any = None, what: Measurement | None = None, passes: Sequence[PassesRow] = (PASSES,)
) -> list[BenchmarkRow]:
    measured = runs(path, pair or Scripted({1: (0.5,), 3: (0.25,)})).measure(what or work())
    return rows_of(measured, passes, 0.1)


def runs(path: Path, pair: Scripted) -> PairRuns:
    plan = BenchmarkPlan([], [], [], "openvino", [("int4", "int8")], [0.0], [], 3, 0)
    return PairRuns(plan, ("int4", "int8"), path, path, pair, StageFolder(path))  # type: ignore[arg-type]


def test_all_answer_a_prompt_in_turn_and_every_second_repeat_goes_the_other_way(tmp_path: Path) -> None:
    pair = Scripted()
    rows(tmp_path, pair)
    forward = [f"{k}:{prompt}:9" for prompt in (10, 20) for k in (0, 1, 3)]
    backward = [f"{k}:{prompt}:9" for prompt in (10, 20) for k in (3, 1, 0)]
    exact = [entry if entry[0] == "0" else entry.replace(":", "*:", 1) for entry in forward]
    assert pair.log == exact + forward + backward + forward


def test_a_speedup_is_the_median_of_repeats_each_paired_with_its_own_baseline(tmp_path: Path) -> None:
    # A repeat writes 2 texts of 9 tokens: 2 * (0.5 + 8 * pace) seconds.
    row = rows(tmp_path, Scripted({0: (1.0, 2.0, 1.0), 1: (0.5, 1.0, 1.0)}))[0]
    seconds_alone, seconds_drafted = [17.0, 33.0, 17.0], [9.0, 17.0, 17.0]
    speedups = sorted(a / d for a, d in zip(seconds_alone, seconds_drafted, strict=True))
    assert [row.speedup_low, row.speedup, row.speedup_high] == pytest.approx(speedups, abs=1e-6)
    assert (row.seconds_alone, row.seconds_alone_low, row.seconds_alone_high) == (17.0, 17.0, 33.0)
    assert (row.seconds_with_draft, row.num_tokens_alone, row.num_tokens_with_draft) == (17.0, 18, 18)
    assert row.decode_speedup == 2.0
    assert row.tokens_per_second_alone == pytest.approx(18 / 17, abs=1e-6)
    assert row.first_token_seconds_alone == 0.5
    assert (row.seconds_per_output_token_alone, row.seconds_per_output_token_with_draft) == (1, 1)


def test_a_row_holds_counts_prediction_and_quotients(tmp_path: Path) -> None:
    row = rows(tmp_path)[1]
    assert (row.num_drafts, row.num_draft_tokens, row.num_accepted_tokens) == (4, 12, 12)
    assert (row.num_generated_tokens, row.texts, row.same_text, row.differences) == (16, 2, 2, [])
    assert row.num_accepted_tokens_per_pos == [4, 4, 4]
    assert (row.acceptance_rate, row.block_efficiency) == (1.0, 4.0)
    predicted = 4.0 * 1.0 / (3 * 0.25 + 1.5)
    assert row.predicted_speedup == pytest.approx(predicted, abs=1e-6)
    assert row.speedup is not None
    assert row.predicted_quotient == pytest.approx(row.speedup / predicted, abs=1e-5)
    assert row.decode_quotient == pytest.approx(4.0 / predicted, abs=1e-5)
    assert row.mbsu_bytes == pytest.approx(4.0 / 1.3, abs=1e-6)
    assert (row.looping_share, row.lossless, row.prompt_tokens) == (0.0, True, 2.5)
    assert (row.part, row.task, row.num_prompts, row.repeats) == ("tasks", "code", 2, 3)


def test_lookup_takes_its_turn_and_its_rows_claim_nothing_of_what_it_proposed(tmp_path: Path) -> None:
    pair = Scripted({3: (0.5,), -3: (0.25,)})
    drafted, found = rows(tmp_path, pair, work([3, -3]))
    assert pair.log[6:9] == ["0:10:9", "3:10:9", "-3:10:9"]
    assert (drafted.proposer, found.proposer, found.runtime) == ("draft", "lookup", "openvino")
    assert (found.num_drafts, found.num_accepted_tokens, found.block_efficiency) == (4, 12, 4.0)
    assert (found.num_draft_tokens, found.acceptance_rate, found.num_examined_tokens) == (None, None, None)
    # By replay lookup finds something in one of 16 rounds, which costs a pass over K + 1, half as much again.
    assert found.predicted_speedup == pytest.approx(4.0 / (1 + 0.5 / 16), abs=1e-6)
    assert found.mbsu_bytes is None
    assert (drafted.decode_speedup, found.decode_speedup) == (2.0, 4.0)
    assert BenchmarkRow.from_json(found.to_json()) == found


def test_counts_stand_beside_what_replay_predicts_for_the_very_texts(tmp_path: Path) -> None:
    def half(rows: Any) -> list[Any]:
        """Behind the first token every second one is the draft's own: 8 tokens in 4 rounds of 2."""
        assert [row.prompt_ids for row in rows] == [[10, 1, 2, 0], [20, 1, 0]]  # K 1 and 3 wrote the same
        return [np.array([1.0, 0.0] * 4) for _ in rows]

    def predicted(name: str, **changes: Any) -> list[tuple[Any, Any]]:
        pair = runs(tmp_path / name, Scripted())
        pair.accepts = half
        found = rows_of(pair.measure(work([1, 3, -3], **changes)), [PASSES], 0.1)
        return [(row.replayed_accepted_tokens, row.replayed_block_efficiency) for row in found]

    assert predicted("greedy") == [(8, 2.0), (8, 2.0), (0, 1.0)]  # lookup finds nothing in 0, 1, 2, ...
    assert predicted("warm", temperature=0.6) == [(None, None), (None, None), (0, 1.0)]
    assert [row.replayed_accepted_tokens for row in rows(tmp_path / "no draft")] == [None, None]


def test_the_prediction_takes_the_passes_measured_nearest_to_the_text(tmp_path: Path) -> None:
    far = replace(PASSES, draft_seconds=1.0, target_seconds={1: 1.0, 4: 9.0}, prefix_tokens=4)
    near = rows(tmp_path, passes=[PASSES, far])  # the texts lie around position 7
    assert near[1].predicted_speedup == pytest.approx(4 / 12, abs=1e-6)
    assert near[0].predicted_speedup is None, "K + 1 = 2 was not measured there"
    assert rows(tmp_path, passes=[])[1].predicted_speedup is None, "a runtime without single passes"


def test_several_texts_at_a_time_have_no_prediction_and_take_the_time_of_one(tmp_path: Path) -> None:
    pair = Scripted()
    [row] = rows(tmp_path, pair, work([3], part="concurrency", value=2))
    assert row.predicted_speedup is None
    assert row.mbsu_bytes is not None
    assert pair.log[:2] == ["0:10,20:9", "3*:10,20:9"]
    assert row.seconds_alone == 8.5


def test_a_text_that_leaves_the_targets_own_is_told_with_its_gap(tmp_path: Path) -> None:
    pair = Scripted(texts={1: [0, 1, 7, 3, 4, 5, 6, 7, 8]})
    [row] = rows(tmp_path, pair, work([1]))
    assert row.same_text == 0
    assert row.differences[0].to_json() == {"prompt": "a", "token": 2, "logprob_gap": 0.02}
    assert pair.gaps[0] == ([10, 1, 2, 0, 1], 2, 7)


def test_texts_that_loop_are_left_out_of_a_speedup_beside_the_whole(tmp_path: Path) -> None:
    class Second(Scripted):
        """Loops on the first prompt only, and is fast there."""

        def write(self, prompts: Any, *asked: Any, **_: Any) -> list[TimedText]:
            k = asked[-1] and asked[-1].num_speculative_tokens
            looping = prompts[0][0] == 10
            pace = 1.0 if not k else 0.1 if looping else 0.5
            text = [7] * 48 if looping else list(range(48))
            rounds = [Round(text[:2], [], 1, 1, 0.0, 1)] if k else []
            return [TimedText(text, 48 * pace, pace, rounds)]

    [row] = rows(tmp_path, Second(), work([1], max_new_tokens=48))
    assert (row.looping_share, row.speedup_without_looping) == (0.5, 2.0)
    assert row.speedup == pytest.approx(96 / (4.8 + 24), abs=1e-6)


def test_sampled_text_of_a_runtime_that_is_not_lossless_is_marked_and_not_compared(tmp_path: Path) -> None:
    for row in rows(tmp_path, what=work(temperature=0.6)):
        assert (row.lossless, row.same_text, row.differences) == (False, None, [])


class Killed(Exception):
    pass


def test_a_killed_measurement_goes_on_and_neither_loses_nor_doubles_a_run(tmp_path: Path) -> None:
    whole = rows(tmp_path / "whole", Scripted())
    units = tmp_path / "killed" / "units"
    done = []
    for moment in range(1, 9):  # a kill after every batch, eight of them

        def on_batch(tokens: int, name: str, moment: int = moment) -> None:
            done.append(tokens)
            if len(done) == moment:
                raise Killed

        done.clear()
        kept = {path: path.read_bytes() for path in units.iterdir()} if units.exists() else {}
        killed = runs(tmp_path / "killed", Scripted())
        killed.on_batch = on_batch
        try:
            killed.measure(work())
        except Killed:
            assert len(list(units.iterdir() if units.exists() else ())) < 4
        assert kept == {path: path.read_bytes() for path in kept}
    assert rows(tmp_path / "killed", Scripted()) == whole
    assert len(list(units.iterdir())) == 5  # counts, three repeats, replay


def test_a_process_that_goes_on_warms_up_before_it_times_and_one_with_nothing_to_do_asks_nothing(
    tmp_path: Path,
) -> None:
    rows(tmp_path, Scripted())
    (tmp_path / "units" / "openvino-tasks-code-int4-int8-t0.repeat-2.json").unlink()
    again = Scripted()
    rows(tmp_path, again)
    assert again.log[:3] == ["0:10:8", "1:10:8", "3:10:8"]
    assert len(again.log) == 3 + 6
    idle = Scripted()
    rows(tmp_path, idle)
    assert idle.log == []


def task(name: str, lengths: Sequence[int], max_new_tokens: int = 8) -> PromptSet:
    prompts = [[1, 2, *range(100 + 100 * i, 98 + 100 * i + n)] for i, n in enumerate(lengths)]
    return PromptSet(name, [(f"p{i}", ids) for i, ids in enumerate(prompts)], max_new_tokens)


def test_prompts_that_do_not_fit_are_left_out_with_a_word() -> None:
    left_out: list[str] = []
    found = task_prompts(task("code", [5, 40, 6]), 3, 30, left_out)
    assert [name for name, _ in found.prompts] == ["p0", "p2"]
    assert left_out == ["code: 1 of 3 prompts are too long for the context"]
    task_prompts(task("code", [5, 40, 6]), 1, 30, left_out)
    assert len(left_out) == 1, "enough fit: nothing is missing"
    with pytest.raises(DataError, match="none of 1 prompts fits"):
        task_prompts(task("code", [40]), 3, 30, left_out)


def test_a_prompt_is_lengthened_by_others_in_front_and_keeps_its_words() -> None:
    left_out: list[str] = []
    found = prompts_of_length([task("code", [5, 4, 30])], 3, 12, 8, 100, left_out)
    assert [len(ids) for _, ids in found.prompts] == [12, 12], "the third is longer by itself"
    assert (found.prompts[0][1][0], found.prompts[0][1][-4:]) == (1, [2, 100, 101, 102])
    assert found.prompts[0][1][1:-4] == list(range(321, 328)), "the end of what the others hold"
    assert len(prompts_of_length([task("code", [5])], 1, 12, 8, 100, left_out).prompts[0][1]) == 12
    assert not prompts_of_length([task("code", [5])], 3, 95, 8, 100, left_out).prompts
    assert not left_out
    prompts_of_length([task("code", [50]), task("text", [5])], 3, 12, 8, 100, left_out)
    assert left_out == ["prompts of 12 tokens: all 1 of code are longer"]


def test_a_mixture_takes_the_tasks_in_turn_and_fills_up_again() -> None:
    found = mixed_prompts([task("code", [5, 6]), task("text", [7])], 5, 8, 100, "concurrency", 2)
    names = ["code/p0", "text/p0", "code/p1", "code/p0", "text/p0"]
    assert (found.task, [name for name, _ in found.prompts]) == ("mixed", names)
    assert mixed_prompts([task("code", [5])], 1, 200, 100, "max_new_tokens", 200).prompts == []


def test_a_plan_names_every_measurement_once_and_leaves_out_what_does_not_fit() -> None:
    plan = make_plan(
        [task("code", [5, 6, 7]), task("text", [5, 9])],
        count=2,
        context_length=128,
        weights=[("int4", "int8"), ("int4", "int4")],
        temperatures=[0.0, 0.6],
        runtime="openvino",
        proposers=[Proposer("draft", 1), Proposer("draft", 2), Proposer("lookup", 2)],
        sweep={"prompt_tokens": [16, 500], "max_new_tokens": [4, 500], "concurrency": [1, 4]},
        repeats=2,
        seed=0,
    )
    everything = plan.everything(2)
    assert len({each.name for each in everything}) == len(everything) == 2 * 2 * 2 + 4
    assert [each.name for each in plan.of_sweeps(2)] == [
        "openvino-prompt_tokens-mixed-int4-int8-t0-16-draft-k2",
        "openvino-max_new_tokens-mixed-int4-int8-t0-4-draft-k2",
        "openvino-concurrency-mixed-int4-int8-t0-1-draft-k2",
        "openvino-concurrency-mixed-int4-int8-t0-4-draft-k2",
    ]
    asked = [[str(proposer) for proposer in each.proposers] for each in everything[::4]]
    assert asked == [["draft-k1", "draft-k2", "lookup-k2"], ["draft-k1", "draft-k2"], ["draft-k2"]]
    own = replace(plan, runtime="fastdraft", proposers=[*plan.proposers, Proposer("lookup_draft", 2)])
    assert (plan.apart, own.apart) == ([], [2])
    assert [str(each) for each in own.of_tasks(("int4", "int8"))[0].proposers] == asked[0]
    assert [each.name for each in own.of_both(1, 2)][::3] == [
        "fastdraft-tasks-code-int4-int8-t0-lookup_draft-k1-n2",
        "fastdraft-tasks-text-int4-int8-t0.6-lookup_draft-k1-n2",
    ]
    assert len({each.name for each in own.everything(1, 2)}) == len(everything) + 4
    assert len(plan.left_out) == 2
    assert [list(map(len, each.batches)) for each in plan.of_sweeps(2)[2:]] == [[1, 1, 1, 1], [4]]


def test_what_a_process_holds_and_held_at_most_counts_what_it_took() -> None:
    pytest.importorskip("psutil")
    before, _ = resident()
    # Pages of its own: the heap may have some left from earlier tests.
    with mmap.mmap(-1, 40_000_000) as held:
        held.write(bytes(1) * 40_000_000)
        now, highest = resident()
    assert highest >= now > before + 20_000_000


@dataclass(frozen=True)
class Broken:
    """A runtime that another process cannot find."""

    name: ClassVar[str] = "broken"


def test_a_process_that_fails_has_no_memory_to_tell(tmp_path: Path) -> None:
    assert measure_memory(Broken(), tmp_path, tmp_path, [1], 2) is None  # type: ignore[arg-type]
