"""Runs in turn, rows and verdicts of a benchmark, with runtimes that follow a script: every time is exact, none is measured."""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastdraft.decoding.latency import Latency
from fastdraft.decoding.speculative import Round
from fastdraft.errors import DataError, FastDraftError
from fastdraft.functional.generation import Sampling
from fastdraft.runtimes.wall_clock import TimedBatch, TimedText
from fastdraft.runtimes.wall_clock_bench import Pair, export_pairs, model_sizes
from fastdraft.runtimes.wall_clock_memory import PeakWatch
from fastdraft.runtimes.wall_clock_plan import make_plan
from fastdraft.runtimes.wall_clock_prompts import (
    EncodedTask,
    PromptSet,
    mixed_prompts,
    prompts_of_length,
    task_prompts,
)
from fastdraft.runtimes.wall_clock_rows import PairCosts, rows_of
from fastdraft.runtimes.wall_clock_runs import (
    Measurement,
    Setting,
    Units,
    as_settings,
    is_finished,
    measure,
    stored,
)
from fastdraft.runtimes.wall_clock_verdict import best, breakdown_entry, speaking_rows, summary_table, verdict

FIRST = 0.5
TOKENS = 9


class Scripted:
    """Answers every prompt with the same tokens at a set pace; each write is noted in a shared log."""

    lossless_sampling = False

    def __init__(
        self,
        label: str,
        pace: Sequence[float],
        log: list[str],
        k: int = 0,
        text: Sequence[int] = range(TOKENS),
    ) -> None:
        self.label, self.log, self.k, self.text = label, log, k, list(text)
        self.paces = list(pace)
        self.timed = 0

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        *,
        exact_counts: bool = False,
    ) -> TimedBatch:
        text = self.text[:max_new_tokens]
        self.log.append(
            f"{self.label}{'*' if exact_counts else ''}:{','.join(str(prompt[0]) for prompt in prompts)}:{len(text)}"
        )
        pace = self.paces[min(self.timed // 2, len(self.paces) - 1)]  # two prompts a repeat
        self.timed += not exact_counts and len(text) == len(self.text)
        seconds = FIRST + pace * (len(text) - 1)
        rounds = (
            [
                Round(text[1:5], [], self.k, self.k, 0.0, self.k),
                Round(text[5:9], [], self.k, self.k, 0.0, self.k),
            ]
            if self.k
            else []
        )
        return TimedBatch([TimedText(text, seconds, FIRST, rounds) for _ in prompts], seconds)


def work(**changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "part": "tasks",
        "prompts": PromptSet("code", ["a", "b"], [[10, 1, 2], [20, 1]], TOKENS),
        "target_weights": "int4",
        "draft_weights": "int8",
        "temperature": 0.0,
        "settings": [Setting(1), Setting(3)],
        "repeats": 3,
        "seed": 0,
    }
    return Measurement(**(values | changes))


def contenders(
    log: list[str],
    alone: Sequence[float] = (1.0,),
    k1: Sequence[float] = (0.5,),
    k3: Sequence[float] = (0.25,),
) -> Any:
    return {
        "alone": Scripted("alone", alone, log),
        "k1": Scripted("k1", k1, log, 1),
        "k3": Scripted("k3", k3, log, 3),
    }


def never(prefix: list[int], first: int, second: int) -> float:
    return pytest.fail("asked about equal texts")


LATENCY = Latency(0.25, {1: 1.0, 2: 1.25, 4: 1.5}, 128, "CPU", "int8", "int4")
COSTS = PairCosts([LATENCY], 0.1)


def rows(tmp_path: Path, log: list[str] | None = None, **paces: Sequence[float]) -> list[dict[str, Any]]:
    return rows_of(
        measure(work(), contenders(log if log is not None else [], **paces), Units(tmp_path), never), COSTS
    )


def test_all_settings_answer_a_prompt_in_turn_and_every_second_repeat_goes_the_other_way(
    tmp_path: Path,
) -> None:
    log: list[str] = []
    rows(tmp_path, log)
    forward = [f"{label}:{prompt}:9" for prompt in (10, 20) for label in ("alone", "k1", "k3")]
    backward = [f"{label}:{prompt}:9" for prompt in (10, 20) for label in ("k3", "k1", "alone")]
    assert log == [entry.replace(":", "*:", 1) for entry in forward] + forward + backward + forward


def test_a_speedup_is_the_median_of_repeats_each_paired_with_its_own_baseline(tmp_path: Path) -> None:
    # A repeat writes 2 texts of 9 tokens: 2 * (0.5 + 8 * pace) seconds.
    row = rows(tmp_path, alone=(1.0, 2.0, 1.0), k1=(0.5, 1.0, 1.0))[0]
    seconds_alone, seconds_drafted = [17.0, 33.0, 17.0], [9.0, 17.0, 17.0]
    speedups = sorted(a / d for a, d in zip(seconds_alone, seconds_drafted, strict=True))
    assert [row["speedup_low"], row["speedup"], row["speedup_high"]] == pytest.approx(speedups, abs=1e-6)
    assert (row["seconds_alone"], row["seconds_alone_low"], row["seconds_alone_high"]) == (17.0, 17.0, 33.0)
    assert (row["seconds_with_draft"], row["num_tokens_alone"], row["num_tokens_with_draft"]) == (
        17.0,
        18,
        18,
    )
    assert row["decode_speedup"] == 2.0
    assert row["tokens_per_second_alone"] == pytest.approx(18 / 17, abs=1e-6)
    assert (
        row["first_token_seconds_alone"],
        row["seconds_per_output_token_alone"],
        row["seconds_per_output_token_with_draft"],
    ) == (0.5, 1, 1)


def test_a_row_holds_counts_prediction_and_quotients(tmp_path: Path) -> None:
    row = rows(tmp_path)[1]
    assert (
        row["num_drafts"],
        row["num_draft_tokens"],
        row["num_accepted_tokens"],
        row["num_generated_tokens"],
    ) == (4, 12, 12, 16)
    assert (row["num_accepted_tokens_per_pos"], row["acceptance_rate"], row["block_efficiency"]) == (
        [4, 4, 4],
        1.0,
        4.0,
    )
    predicted = 4.0 * 1.0 / (3 * 0.25 + 1.5)
    assert row["predicted_speedup"] == pytest.approx(predicted, abs=1e-6)
    assert row["predicted_quotient"] == pytest.approx(row["speedup"] / predicted, abs=1e-5)
    assert row["decode_quotient"] == pytest.approx(4.0 / predicted, abs=1e-5)
    assert row["mbsu_bytes"] == pytest.approx(4.0 / 1.3, abs=1e-6)
    assert (row["texts"], row["same_text"], row["differences"], row["looping_share"], row["lossless"]) == (
        2,
        2,
        [],
        0.0,
        True,
    )
    assert (row["part"], row["task"], row["prompt_tokens"], row["num_prompts"], row["repeats"]) == (
        "tasks",
        "code",
        2.5,
        2,
        3,
    )


def test_the_prediction_takes_the_passes_measured_nearest_to_the_text(tmp_path: Path) -> None:
    far = Latency(1.0, {1: 1.0, 4: 9.0}, 4, "CPU", "int8", "int4")
    measured = measure(work(), contenders([]), Units(tmp_path), never)
    near = rows_of(measured, PairCosts([LATENCY, far], 0.1))  # the texts lie around position 7
    assert near[1]["predicted_speedup"] == pytest.approx(4 / 12, abs=1e-6)
    assert near[0]["predicted_speedup"] is None, "K + 1 = 2 was not measured there"


def test_thresholds_and_several_texts_at_a_time_have_no_prediction(tmp_path: Path) -> None:
    assert [setting.label for setting in as_settings([1, 4], [0.4])] == ["k1", "k4", "c0.4"]
    log: list[str] = []
    dynamic = work(settings=[Setting(3, 0.4)])
    alone, drafted = Scripted("alone", [1.0], log), Scripted("k3", [0.5], log, 3)
    row = rows_of(measure(dynamic, {"alone": alone, "c0.4": drafted}, Units(tmp_path / "a"), never), COSTS)[0]
    assert (row["confidence_threshold"], row["num_speculative_tokens"]) == (0.4, None)
    assert (row["predicted_speedup"], row["mbsu_bytes"], row["predicted_quotient"]) == (None, None, None)
    log.clear()
    several = work(part="concurrency", settings=[Setting(3)], concurrency=2, value=2)
    row = rows_of(measure(several, {"alone": alone, "k3": drafted}, Units(tmp_path / "b"), never), COSTS)[0]
    assert row["predicted_speedup"] is None
    assert row["mbsu_bytes"] is not None
    assert log[:2] == ["alone*:10,20:9", "k3*:10,20:9"]
    assert row["seconds_alone"] == 8.5, "both texts in the time of one"


def test_a_text_that_leaves_the_targets_own_is_told_with_its_gap(tmp_path: Path) -> None:
    asked: list[tuple[list[int], int, int]] = []

    def judge(prefix: list[int], first: int, second: int) -> float:
        asked.append((prefix, first, second))
        return -0.02

    log: list[str] = []
    found = {
        "alone": Scripted("alone", [1.0], log),
        "k1": Scripted("k1", [1.0], log, 1, [0, 1, 7, 3, 4, 5, 6, 7, 8]),
    }
    row = rows_of(measure(work(settings=[Setting(1)]), found, Units(tmp_path), judge), COSTS)[0]
    assert (row["same_text"], row["differences"][0]) == (0, {"prompt": "a", "token": 2, "logprob_gap": 0.02})
    assert asked[0] == ([10, 1, 2, 0, 1], 2, 7)


def test_texts_that_loop_are_left_out_of_a_speedup_beside_the_whole(tmp_path: Path) -> None:
    loops = PromptSet("code", ["a", "b"], [[10, 1], [20, 1]], 48)

    class Second(Scripted):
        """Loops on the first prompt only, and is fast there."""

        def write(self, prompts: Sequence[Sequence[int]], *rest: Any, **named: Any) -> TimedBatch:
            looping = prompts[0][0] == 10
            pace = 0.1 if looping and self.k else 1.0 if not self.k else 0.5
            text = [7] * 48 if looping else list(range(48))
            return TimedBatch(
                [TimedText(text, 48 * pace, pace, [Round(text[:2], [], 1, 1, 0.0, 1)] if self.k else [])],
                48 * pace,
            )

    found = {"alone": Second("alone", [1.0], []), "k1": Second("k1", [1.0], [], 1)}
    row = rows_of(measure(work(prompts=loops, settings=[Setting(1)]), found, Units(tmp_path), never), COSTS)[
        0
    ]
    assert (row["looping_share"], row["speedup_without_looping"]) == (0.5, 2.0)
    assert row["speedup"] == pytest.approx(96 / (4.8 + 24), abs=1e-6)


def test_sampled_text_of_a_runtime_that_is_not_lossless_gives_no_verdict(tmp_path: Path) -> None:
    found = rows_of(measure(work(temperature=0.6), contenders([]), Units(tmp_path), never), COSTS)
    assert [(row["lossless"], row["same_text"], row["differences"]) for row in found] == [
        (False, None, [])
    ] * 2
    assert speaking_rows(found, "int4", "int8") == []
    assert best([]) == {"num_speculative_tokens": None, "by_task": {}}
    assert verdict([], [LATENCY], None, "CPU")["sentence"].startswith("No verdict")


def test_a_killed_measurement_goes_on_and_neither_loses_nor_doubles_a_run(tmp_path: Path) -> None:
    whole = rows(tmp_path / "whole")
    total = len(list((tmp_path / "whole").iterdir()))
    units, log, done = Units(tmp_path / "killed"), [], []

    class Killed(Exception):
        pass

    for moment in range(1, 9):  # a kill after every batch, eight of them

        def on_batch(tokens: int, moment: int = moment) -> None:
            done.append(tokens)
            if len(done) == moment:
                raise Killed

        done.clear()
        before = sorted(path.name for path in units.folder.iterdir()) if units.folder.exists() else []
        kept = {name: (units.folder / name).read_bytes() for name in before}
        try:
            measure(work(), contenders(log), units, never, on_batch)
        except Killed:
            assert not is_finished(work(), units)
        assert kept == {name: (units.folder / name).read_bytes() for name in before}
    assert is_finished(work(), units)
    assert rows_of(stored(work(), units), COSTS) == whole
    assert len(list(units.folder.iterdir())) == total == 4


def test_a_process_that_goes_on_warms_up_before_it_times(tmp_path: Path) -> None:
    units, log = Units(tmp_path), []
    measure(work(), contenders([]), units, never)
    units.path(units.names(work())[2]).unlink()
    measure(work(), contenders(log), units, never)
    assert log[:3] == ["alone:10:8", "k1:10:8", "k3:10:8"]
    assert len(log) == 3 + 6


def test_a_unit_of_something_else_is_refused(tmp_path: Path) -> None:
    units = Units(tmp_path)
    measure(work(), contenders([]), units, never)
    path = units.path(units.names(work())[1])
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(value | {"measurement": {"part": "other"}}), encoding="utf-8")
    with pytest.raises(FastDraftError, match="about another measurement"):
        stored(work(), units)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(FastDraftError, match="unreadable"):
        stored(work(), units)


def task(name: str, lengths: Sequence[int], max_new_tokens: int = 8) -> EncodedTask:
    prompts = [[1, 2, *range(100 + 10 * i, 100 + 10 * i + n - 2)] for i, n in enumerate(lengths)]
    return EncodedTask(
        name,
        [f"p{i}" for i in range(len(lengths))],
        prompts,
        [[900 + i] * 5 for i in range(len(lengths))],
        max_new_tokens,
    )


def test_prompts_that_do_not_fit_are_left_out_with_a_word() -> None:
    found = task_prompts(task("code", [5, 40, 6]), 3, room=30)
    assert (found.names, len(found.left_out)) == (["p0", "p2"], 1)
    assert task_prompts(task("code", [5, 40, 6]), 1, room=30).left_out == [], (
        "enough prompts fit: nothing is missing"
    )
    talks = replace(task("talks", [5, 6]), later_turns=3)
    assert task_prompts(talks, 2, room=30).left_out == [
        "talks: 3 later turns of conversations; first turns are measured"
    ]
    with pytest.raises(DataError, match="none of 1 prompts fits"):
        task_prompts(task("code", [40]), 3, room=30)


def test_a_prompt_is_lengthened_behind_its_beginning_and_keeps_its_end() -> None:
    found = prompts_of_length([task("code", [5, 4, 30])], 3, tokens=12, max_new_tokens=8, room=100)
    assert [len(ids) for ids in found.prompt_ids] == [12, 12], "the third is longer by itself"
    assert found.prompt_ids[0][:2] == [1, 2]
    assert found.prompt_ids[0][-3:] == [100, 101, 102]
    assert set(found.prompt_ids[0][2:-3]) == {901, 902}, "filled with texts of the others"
    assert prompts_of_length([task("code", [50])], 3, 12, 8, room=100).left_out == [
        "prompts of 12 tokens: all 1 of code are longer"
    ]
    assert prompts_of_length([task("code", [5])], 3, 95, 8, room=100).prompt_ids == []
    alone = prompts_of_length([task("code", [5])], 1, 12, 8, room=100)
    assert len(alone.prompt_ids[0]) == 12, "a task of one prompt is filled with its own text"


def test_a_mixture_takes_the_tasks_in_turn_and_fills_up_again() -> None:
    found = mixed_prompts([task("code", [5, 6]), task("text", [7])], 5, max_new_tokens=8, room=100)
    assert (found.task, found.names) == ("mixed", ["code/p0", "text/p0", "code/p1", "code/p0", "text/p0"])
    assert mixed_prompts([task("code", [5])], 1, 200, room=100).left_out


def test_a_plan_names_every_measurement_once_and_leaves_out_what_does_not_fit() -> None:
    sweep = {"prompt_tokens": [16, 500], "max_new_tokens": [4, 500], "concurrency": [1, 4]}
    plan = make_plan(
        [task("code", [5, 6, 7]), task("text", [5, 9])],
        count=2,
        context_length=128,
        weights=[("int4", "int8"), ("int4", "int4")],
        temperatures=[0.0, 0.6],
        settings=as_settings([1, 2], []),
        sweep=sweep,
        repeats=2,
        seed=0,
    )
    names = [one.name for one in plan.everything]
    assert len(names) == len(set(names)) == 2 * 2 * 2 + 4
    assert [one.name for one in plan.of_sweeps(2)] == [
        "prompt_tokens-mixed-int4-int8-t0-16-k2",
        "max_new_tokens-mixed-int4-int8-t0-4-k2",
        "concurrency-mixed-int4-int8-t0-1-k2",
        "concurrency-mixed-int4-int8-t0-4-k2",
    ]
    assert len(plan.left_out) == 2
    assert [list(map(len, one.batches)) for one in plan.of_sweeps(2)[2:]] == [[1, 1, 1, 1], [4]]
    assert plan.planned_tokens == sum(3 * one.planned_tokens for one in plan.everything)


def speaking(speedup: float, task: str = "code", k: int = 3, **changes: Any) -> dict[str, Any]:
    row = {
        "part": "tasks",
        "task": task,
        "target_weights": "int4",
        "draft_weights": "int8",
        "temperature": 0.0,
        "num_speculative_tokens": k,
        "confidence_threshold": 0.0,
        "lossless": True,
        "speedup": speedup,
        "speedup_low": speedup - 0.1,
        "speedup_high": speedup + 0.1,
        "predicted_speedup": 2.0,
        "predicted_quotient": speedup / 2,
        "block_efficiency": 2.5,
        "acceptance_rate": 0.5,
        "conditional_acceptance_rate": 0.6,
    }
    return row | changes


def test_the_best_k_is_that_of_the_largest_geometric_mean() -> None:
    found = best(
        [speaking(3.0, k=1), speaking(2.0, k=3), speaking(0.5, "text", k=1), speaking(1.5, "text", k=3)]
    )
    assert found["num_speculative_tokens"] == 3
    assert found["by_task"] == {
        "code": {"num_speculative_tokens": 1, "speedup": 3.0},
        "text": {"num_speculative_tokens": 3, "speedup": 1.5},
    }


def test_only_deployed_greedy_rows_of_tasks_at_a_fixed_k_speak() -> None:
    others = [
        {"part": "concurrency"},
        {"draft_weights": "int4"},
        {"confidence_threshold": 0.4},
        {"temperature": 0.6},
        {"lossless": False},
    ]
    assert speaking_rows(
        [speaking(1.0), *(speaking(9.0, **change) for change in others)], "int4", "int8"
    ) == [speaking(1.0)]


CHEAP = Latency(0.05, {1: 1.0, 4: 1.2}, 128, "CPU", "int8", "int4")
DEAR = Latency(0.0004, {1: 0.0007, 4: 0.0012}, 128, "CPU", "int8", "int4")
SLOW_CHECK = Latency(0.0001, {1: 0.001, 4: 0.004}, 128, "CPU", "int8", "int4")


@pytest.mark.parametrize(
    ("found", "latency", "tone", "sentence"),
    [
        (
            [speaking(1.62), speaking(1.31, "text")],
            CHEAP,
            "good",
            "Use this draft with K = 3: measured 1.62x on code and 1.31x on text (CPU, int4 target, int8 draft).",
        ),
        (
            [speaking(1.2), speaking(1.07, "text")],
            CHEAP,
            "mixed",
            "Use this draft with K = 3: measured 1.20x on code and 1.07x on text (CPU, int4 target, int8 draft), but 0.97x in one repeat: "
            "measure again on a quiet machine.",
        ),
        (
            [speaking(1.62), speaking(0.9, "text", predicted_speedup=0.95, conditional_acceptance_rate=0.1)],
            CHEAP,
            "mixed",
            "Use this draft with K = 3 where it pays: measured 1.62x on code, but 0.90x on text (CPU, int4 target, int8 draft); there the "
            "acceptance is too low: 10 % of the proposals looked at, and costs ask for more than 12 %.",
        ),
        (
            [speaking(0.9, predicted_speedup=0.95, conditional_acceptance_rate=0.115)],
            CHEAP,
            "bad",
            "Do not use a draft here: measured 0.90x on code at best K = 3 (CPU, int4 target, int8 draft); the acceptance is too low: "
            "11.5 % of the proposals looked at, and costs ask for more than 11.7 %.",
        ),
        (
            [speaking(0.9, predicted_speedup=0.95, conditional_acceptance_rate=0.12)],
            CHEAP,
            "bad",
            "Do not use a draft here: measured 0.90x on code at best K = 3 (CPU, int4 target, int8 draft); the passes of a round cost "
            "as much as the accepted tokens gain (12 % of the proposals looked at).",
        ),
        (
            [speaking(0.54, k=1, predicted_speedup=0.7)],
            DEAR,
            "bad",
            "Do not use a draft here: measured 0.54x on code at best K = 1 (CPU, int4 target, int8 draft); the target answers in 0.7 ms a "
            "token and the draft needs 0.4 ms.",
        ),
        (
            [speaking(0.6, predicted_speedup=0.7)],
            SLOW_CHECK,
            "bad",
            "Do not use a draft here: measured 0.60x on code at best K = 3 (CPU, int4 target, int8 draft); verifying is too dear: a pass "
            "of the target over 4 tokens takes 4 ms, over one 1 ms.",
        ),
        (
            [speaking(0.8, predicted_speedup=1.5)],
            CHEAP,
            "bad",
            "Do not use a draft here: measured 0.80x on code at best K = 3 (CPU, int4 target, int8 draft); its passes alone promised "
            "1.50x, but 50 % of the time is the runtime's own, neither target nor draft.",
        ),
        (
            [speaking(1.01, predicted_speedup=1.5)],
            CHEAP,
            "mixed",
            "A draft brings next to nothing here: measured 1.01x on code at best K = 3 (CPU, int4 target, int8 draft); its passes alone "
            "promised 1.50x, but 50 % of the time is the runtime's own, neither target nor draft.",
        ),
    ],
)
def test_the_verdict_is_a_sentence_with_its_reason(
    found: list[dict[str, Any]], latency: Latency, tone: str, sentence: str
) -> None:
    breakdown = breakdown_entry(
        "int4", "int8", 3, {"target_seconds": 3.0, "draft_seconds": 2.0, "total_seconds": 10.0}
    )
    assert breakdown["other_seconds"] == 5.0
    assert verdict(found, [latency], breakdown, "CPU") == {"sentence": sentence, "tone": tone}


def test_the_table_shows_each_task_at_its_own_best_k_in_80_columns() -> None:
    from fastdraft.console import format_table

    found = [
        speaking(1.2, k=1),
        speaking(1.6, k=3),
        speaking(1.3, "a-task-with-a-long-name", k=1, predicted_speedup=None),
    ]
    table = format_table(*summary_table(found, best(found), "CPU, int4 target, int8 draft"))
    assert "1.60 [1.50, 1.70]" in table
    assert max(map(len, table.splitlines())) <= 79


def test_exports_that_stand_are_taken_and_others_made_once(tmp_path: Path) -> None:
    made: list[tuple[str, str, Path | None]] = []

    def export(role: str, weights: str, folder: Path, target: Path | None) -> None:
        made.append((role, weights, target))
        folder.mkdir()
        (folder / "openvino_model.bin").write_bytes(b"12345")

    standing = {("target", "int4"): tmp_path / "export"}
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "openvino_model.bin").write_bytes(b"123")
    asked = [("int4", "int8"), ("int4", "fp16"), ("int8", "int8")]
    pairs = export_pairs(asked, standing, tmp_path / "models", export)
    assert pairs[0] == Pair("int4", "int8", tmp_path / "export", tmp_path / "models" / "draft-int8")
    assert [entry[:2] for entry in made] == [("draft", "int8"), ("draft", "fp16"), ("target", "int8")]
    assert made[0][2] == tmp_path / "export"
    export_pairs(asked, standing, tmp_path / "models", lambda *_: pytest.fail("made twice"))
    assert model_sizes(pairs)[0] == {"role": "target", "weights": "int4", "bytes": 3}
    assert len(model_sizes(pairs)) == 4


def test_the_peak_of_memory_is_above_what_was_held_before() -> None:
    pytest.importorskip("psutil")
    watch = PeakWatch()
    with (
        watch.looking(),
        mmap.mmap(-1, 40_000_000) as held,
    ):  # pages of its own: the heap may have some left from earlier tests
        held.write(bytes(1) * 40_000_000)
        watch.look()
    assert watch.grown > 20_000_000
