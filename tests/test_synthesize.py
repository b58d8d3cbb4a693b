"""The stage in which the target writes: plan, filters, Magpie, resuming, accounts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastdraft import pipeline
from fastdraft.artifacts import Artifact
from fastdraft.console import Console
from fastdraft.data import filters
from fastdraft.data.chat import render_prompt, user_prefix_ids
from fastdraft.data.filters import RowCounts, RowFilter, loop_start
from fastdraft.data.prompts import JsonlPrompts, normalised, select_texts
from fastdraft.data.responses import SyntheticRow, read_all, read_metadata, read_rows, unit_path, unit_paths
from fastdraft.data.units import CorpusPrefixes, Unit, UnitPlan, unit_seed
from fastdraft.decoding.unit_writer import UnitWriter
from fastdraft.errors import ArtifactError, DataError, FastDraftError, Interrupted, RecipeError
from fastdraft.functional import looping
from fastdraft.interfaces import Generation, Sampling
from fastdraft.recipe import Recipe, load_recipe
from fastdraft.stages import synthesize

STAGES = ("design", "prepare", "synthesize")
WARM = Sampling(0.6)


# ---- filters


def judge(row_filter: RowFilter, response: list[int], reason: str = "length", *, chat: bool = True, counts: RowCounts | None = None) -> SyntheticRow | None:
    generation = Generation([1, 2], response, [-0.5] * len(response), reason)  # type: ignore[arg-type]
    return row_filter.judge(generation, "s", WARM, chat, counts if counts is not None else RowCounts())


def new_filter(**options: object) -> RowFilter:
    return RowFilter({300, 301}, lambda ids: " ".join("" if i == 9 else str(i) for i in ids), **options)  # type: ignore[arg-type]


def test_a_good_response_becomes_a_row_with_all_that_training_needs() -> None:
    counts = RowCounts(asked=1)
    row = judge(new_filter(), [5, 6, 3], "stop", counts=counts)
    assert row is not None
    assert (row.prompt_ids, row.response_ids, row.logprobs, row.temperature, row.finish_reason) == ([1, 2], [5, 6, 3], [-0.5] * 3, 0.6, "stop")
    assert (counts.written, counts.tokens, counts.stopped, counts.balance()) == (1, 3, 1, 0)


@pytest.mark.parametrize(
    ("response", "finish", "options", "reason"),
    [
        ([5, 301, 6], "length", {}, "unknown_id"),
        ([3], "stop", {}, "empty"),
        ([9, 9, 3], "stop", {}, "empty"),
        ([4, *[7, 8] * 40], "length", {"looping": "drop"}, "looping"),
        ([4, 5, 6], "length", {"keep_truncated": False}, "truncated"),
    ],
)
def test_each_filter_counts_its_reason(response: list[int], finish: str, options: dict[str, object], reason: str) -> None:
    counts = RowCounts(asked=1)
    assert judge(new_filter(**options), response, finish, counts=counts) is None
    assert counts.filtered == {reason: 1}
    assert counts.balance() == 0


def test_the_same_response_to_the_same_prompt_is_written_once() -> None:
    row_filter, counts = new_filter(), RowCounts(asked=2)
    assert judge(row_filter, [5, 6], counts=counts)
    assert judge(row_filter, [5, 6], counts=counts) is None
    assert counts.filtered == {"duplicate": 1}


def test_rows_of_an_earlier_process_count_as_written() -> None:
    row = judge(new_filter(), [5, 6])
    assert row is not None
    later = new_filter()
    later.remember([row.row_id], [row.prompt_key])
    assert judge(later, [5, 6]) is None
    assert later.has_prompt([1, 2])


def test_a_nan_log_prob_is_a_failed_row() -> None:
    counts = RowCounts(asked=1)
    assert new_filter().judge(Generation([1], [5], [math.nan], "length"), "s", WARM, True, counts) is None
    assert (counts.failed, counts.filtered, counts.balance()) == (1, {}, 0)


def test_a_loop_is_cut_behind_its_second_round() -> None:
    counts = RowCounts(asked=1)
    row = judge(new_filter(), [4, 5, *[7, 8, 6] * 20], counts=counts)
    assert row is not None
    assert row.response_ids == [4, 5, 7, 8, 6, 7, 8, 6]
    assert len(row.logprobs) == 8
    assert (counts.cut, counts.tokens, counts.generated) == (1, 8, 62)


def test_a_loop_before_the_eos_is_cut_and_the_answer_no_longer_ends_by_itself() -> None:
    row = judge(new_filter(), [4, *[7] * 50, 3], "stop")
    assert row is not None
    assert (row.response_ids, row.finish_reason) == ([4, 7, 7], "length")


def test_loops_are_kept_when_the_recipe_says_so() -> None:
    row = judge(new_filter(looping="keep"), [4, *[7, 8] * 40])
    assert row is not None
    assert len(row.response_ids) == 81


def test_completions_of_plain_text_are_never_truncated() -> None:
    assert judge(new_filter(keep_truncated=False), [4, 5, 6], chat=False)


def test_both_definitions_of_a_loop_are_one() -> None:
    assert (filters.MAX_PERIOD, filters.MIN_TOKENS, filters.MIN_TIMES) == (looping.MAX_PERIOD, looping.MIN_TOKENS, looping.MIN_TIMES)


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), min_size=1, max_size=36), st.integers(0, 120))
def test_a_loop_is_found_exactly_where_evaluation_finds_one(before: list[int], piece: list[int], length: int) -> None:
    ids = before + (piece * 120)[:length]
    found = loop_start(ids)
    assert (found is not None) == looping.is_looping(ids)
    if found:
        start, period = found
        assert all(a == b for a, b in zip(ids[start:], ids[start + period :], strict=False))


def test_counts_add_up_and_survive_json() -> None:
    total = RowCounts()
    total.add(RowCounts(asked=3, written=1, filtered={"empty": 2}, tokens=9))
    total.add(RowCounts(asked=2, failed=1, filtered={"empty": 1}))
    assert total == RowCounts(asked=5, written=1, failed=1, filtered={"empty": 3}, tokens=9)
    assert RowCounts.from_dict(json.loads(json.dumps(total.as_dict()))) == total


# ---- the plan


def plan(**changes: object) -> UnitPlan:
    options = {"name": "p", "size": 100, "encode": lambda i: [i] * (1 + i % 7), "temperatures": [0.0, 0.6, 1.0], "unit_rows": 8, "seed": 1}
    return UnitPlan(**{**options, **changes})  # type: ignore[arg-type]


def all_units(units: UnitPlan) -> list[Unit]:
    found = []
    while unit := units.unit(len(found)):
        assert units.has_unit(len(found))
        found.append(unit)
    assert not units.has_unit(len(found))
    return found


def test_every_prompt_is_asked_once_before_any_is_asked_twice() -> None:
    first = all_units(plan())[:13]
    assert sorted(prompt[0] for unit in first for prompt in unit.prompts) == list(range(100))


def test_every_prompt_is_asked_at_every_temperature_and_greedily_once() -> None:
    asked = [(prompt[0], unit.temperature) for unit in all_units(plan(samples=2)) for prompt in unit.prompts]
    assert sorted(asked) == sorted((i, t) for i in range(100) for t in (0.0, 0.6, 0.6, 1.0, 1.0))


def test_prompts_of_a_unit_have_similar_lengths() -> None:
    for unit in all_units(plan())[:8]:
        lengths = [len(prompt) for prompt in unit.prompts]
        assert max(lengths) - min(lengths) <= 1


def test_a_unit_is_the_same_whichever_was_asked_before() -> None:
    in_order = all_units(plan())
    places = list(range(len(in_order)))
    random.Random(0).shuffle(places)
    other = plan()
    assert [other.unit(place) for place in places] == [in_order[place] for place in places]


def test_an_endless_source_always_has_a_unit() -> None:
    units = plan(size=None, encode=lambda i: [1, 2], instruction_tokens=9)
    assert units.has_unit(10**9)
    assert units.unit(4) == Unit("p", 0.6, ([1, 2],) * 8, True, 9)


def test_units_have_seeds_of_their_own() -> None:
    seeds = {unit_seed(seed, index) for seed in range(20) for index in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**62 for seed in seeds)


class Rows:
    """A packed corpus in memory."""

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = rows

    @property
    def rows(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array(self._rows[index])


def test_prefixes_start_at_documents_and_never_cross_into_the_next() -> None:
    row = [5, 6, 0, 10, 11, 12, 13, 14, 15, 0, 20, 21, 22, 23, 24, 25, 26]
    prefixes = CorpusPrefixes(Rows([row] * 40), 0, (3, 5), [0], seed=0)  # type: ignore[arg-type]
    found = [prefixes(i) for i in range(40)]
    assert {prompt[1] for prompt in found} == {10, 20}
    assert {len(prompt) for prompt in found} == {4, 5, 6}
    assert all(prompt[0] == 0 and 0 not in prompt[1:] for prompt in found)
    assert found == [prefixes(i) for i in range(40)]


def test_a_row_without_a_document_start_gives_its_beginning_without_bos() -> None:
    prefixes = CorpusPrefixes(Rows([list(range(1, 30))]), 0, (4, 4), [0], seed=0)  # type: ignore[arg-type]
    assert prefixes(0) == [1, 2, 3, 4]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 5))
def test_a_prefix_is_never_empty(row: list[int], shortest: int) -> None:
    assert CorpusPrefixes(Rows([row]), 0, (shortest, shortest + 3), [], seed=0)(0)  # type: ignore[arg-type]


def prompt_file(tmp_path: Path, prompts: Sequence[str]) -> JsonlPrompts:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return JsonlPrompts(name="p", path=str(path))


def test_evaluation_prompts_are_refused_however_spaced_and_capitalised(tmp_path: Path) -> None:
    chosen = select_texts(prompt_file(tmp_path, ["Tell me\n  about FOXES", "Other", "", "other ", "Third"]), {normalised("tell me about foxes")}, 0)
    assert sorted(chosen.texts) == ["Other", "Third"]
    assert chosen.refused == {"evaluation": 1, "empty": 1, "repeated": 1}


def test_the_digest_tells_only_which_prompts_evaluation_forbids(tmp_path: Path) -> None:
    config = prompt_file(tmp_path, ["one", "two", "three"])
    assert select_texts(config, {"elsewhere"}, 0).digest == select_texts(config, set(), 0).digest == ""
    assert select_texts(config, {"one"}, 0).digest not in ("", select_texts(config, {"two"}, 0).digest)


def test_prompts_come_in_an_order_of_the_seed_and_count_takes_the_first(tmp_path: Path) -> None:
    config = prompt_file(tmp_path, [f"prompt {i}" for i in range(50)])
    order = select_texts(config, set(), 1).texts
    assert order == select_texts(config, set(), 1).texts != select_texts(config, set(), 2).texts
    assert select_texts(config.model_copy(update={"count": 5}), set(), 1).texts == order[:5]


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 evaluation"):
        select_texts(prompt_file(tmp_path, ["A b", "a  B"]), {"a b"}, 0)


# ---- Magpie


class Script:
    """An engine that says what it is told to, whatever it is asked."""

    name = "script"

    def __init__(self, answers: list[tuple[list[int], str]]) -> None:
        self.answers = answers
        self.asked: list[list[int]] = []
        self.sampling: list[Sampling] = []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int) -> list[Generation]:
        self.asked += [list(prompt) for prompt in prompts]
        self.sampling.append(sampling)
        pairs = zip(prompts, self.answers * len(prompts), strict=False)
        return [Generation(list(prompt), ids, [-1.0] * len(ids), finish) for prompt, (ids, finish) in pairs]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_target)


def writer(tokenizer: PreTrainedTokenizerBase, instructions: Script, answers: Script) -> UnitWriter:
    row_filter = RowFilter({310}, tokenizer.decode)
    return UnitWriter(answers, instructions, tokenizer, row_filter, max_new_tokens=8, context_length=256, is_evaluation=lambda text: text == "the fox")


def test_magpie_asks_what_the_target_invented_and_counts_what_is_no_use(tokenizer: PreTrainedTokenizerBase) -> None:
    def said(text: str) -> tuple[list[int], str]:
        return [*tokenizer(text).input_ids, 3], "stop"

    bad = [said("The fox"), said("What is this?"), said("12 + 4"), ([300, 310, 3], "stop"), ([1, 40, 3], "stop"), ([41] * 8, "length"), ([42] * 60, "length")]
    instructions, answers = Script([said("What is this?"), *bad]), Script([([50, 51, 3], "stop")])
    unit = Unit("magpie", 0.6, tuple(user_prefix_ids(tokenizer) for _ in range(8)), True, 60)
    rows, counts = writer(tokenizer, instructions, answers).write(unit, seed=5)
    assert answers.asked == [render_prompt(tokenizer, [{"role": "user", "content": "What is this?"}])]
    assert (instructions.sampling, answers.sampling) == ([Sampling(1.0)], [Sampling(0.6)])
    assert [row.response_ids for row in rows] == [[50, 51, 3]]
    expected = ["evaluation", "duplicate", "empty", "malformed", "too_long", "looping"]
    assert counts.filtered == {f"instruction_{reason}": 2 if reason == "malformed" else 1 for reason in expected}
    assert (counts.asked, counts.written, counts.balance()) == (8, 1, 0)


def test_an_instruction_of_an_earlier_unit_is_a_duplicate(tokenizer: PreTrainedTokenizerBase) -> None:
    said = ([*tokenizer("Name a river").input_ids, 3], "stop")
    unit_writer = writer(tokenizer, Script([said]), Script([([50, 3], "stop"), ([51, 3], "stop")]))
    unit = Unit("magpie", 0.6, (user_prefix_ids(tokenizer),), True, 60)
    assert unit_writer.write(unit, 1)[1].written == 1
    assert unit_writer.write(unit, 2)[1].filtered == {"instruction_duplicate": 1}


def test_prompts_that_leave_no_room_for_an_answer_are_counted_and_not_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    answers = Script([([50, 3], "stop")])
    rows, counts = writer(tokenizer, Script([]), answers).write(Unit("p", 0.6, ([7] * 249, [8] * 248), True), 1)
    assert (len(rows), counts.filtered, counts.balance()) == (1, {"prompt_too_long": 1}, 0)
    assert answers.asked == [[8] * 248]


# ---- the stage


def make_recipe(path: Path, name: str = "tiny", **changes: object) -> Recipe:
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    value["run"]["name"] = name
    value["synthesize"].update({"tokens": 1500, "batch_rows": 8, "max_new_tokens": 16, **changes})
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return load_recipe(str(path))


def run(recipe: Recipe) -> Artifact:
    return pipeline.run(recipe, only=STAGES).artifact("synthesize")


def contents(artifact: Artifact) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (artifact.path / "units").iterdir()}


def test_the_stage_writes_until_its_budget_and_accounts_for_every_row(tiny_recipe: Path) -> None:
    artifact = run(make_recipe(tiny_recipe))
    manifest, rows = artifact.manifest(), list(read_all(artifact))
    assert manifest["asked"] == manifest["written"] + sum(manifest["filtered"].values()) + manifest["failed"]
    assert manifest["written"] == len(rows) == len({row.row_id for row in rows})
    assert manifest["tokens"] == sum(len(row.response_ids) for row in rows) >= 1500
    last = read_metadata(unit_paths(artifact)[-1])["counts"]["tokens"]
    assert manifest["tokens"] - last < 1500
    for split in ("by_source", "by_temperature"):
        assert sum(part["written"] for part in manifest[split].values()) == len(rows)
    assert set(manifest["by_source"]) == {"instructions", "magpie", "code"}
    assert {f"{row.temperature:g}" for row in rows} <= set(manifest["by_temperature"])


def test_rows_hold_the_prompts_as_asked_and_the_answers_as_drawn(tiny_recipe: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = list(read_all(run(make_recipe(tiny_recipe))))
    for row in rows:
        assert len(row.logprobs) == len(row.response_ids) <= 16
        assert (row.finish_reason == "stop") == (row.response_ids[-1] == 3)
        assert all(logprob == 0 if row.temperature == 0 else logprob < 0 for logprob in row.logprobs) or row.temperature > 0
        if row.source != "code":
            assert tokenizer.decode(row.prompt_ids).startswith("<|user|>\n")
            assert tokenizer.decode(row.prompt_ids).endswith("<|end|>\n<|assistant|>\n")


def test_any_beginning_of_the_units_holds_the_shares(tiny_recipe: Path) -> None:
    artifact = run(make_recipe(tiny_recipe, tokens=4000))
    tokens = {"instructions": 0, "magpie": 0, "code": 0}
    largest = 0
    for path in unit_paths(artifact):
        facts = read_metadata(path)
        tokens[facts["source"]] += facts["counts"]["tokens"]
        largest = max(largest, facts["counts"]["tokens"])
        total = sum(tokens.values())
        assert all(abs(tokens[name] - total * share) <= 2 * largest for name, share in (("instructions", 0.5), ("magpie", 0.25), ("code", 0.25)))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_run_goes_on_to_the_very_files_of_an_undisturbed_one(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    undisturbed = run(make_recipe(tiny_recipe, "undisturbed"))
    recipe, real, calls = make_recipe(tiny_recipe, "disturbed"), synthesize.write_rows, 0

    def killed(path: Path, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls % 2 == 0 and moment == "before":
            path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        real(path, *arguments)  # type: ignore[arg-type]
        if calls % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(synthesize, "write_rows", killed)
    kills = 0
    while kills < 3:
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
        kills += 1
    monkeypatch.setattr(synthesize, "write_rows", real)
    assert contents(run(recipe)) == contents(undisturbed)


def test_a_stop_is_obeyed_between_two_units_and_the_same_command_goes_on(tiny_recipe: Path) -> None:
    recipe, console = make_recipe(tiny_recipe), Console(quiet=True)
    pipeline.run(recipe, only=("design", "prepare"))
    console.stop.requested = True
    context = pipeline.make_context(recipe, console)
    artifact = context.artifact("synthesize")
    assert recipe.synthesize
    artifact.begin(synthesize.fingerprint(recipe.synthesize, context))
    with pytest.raises(Interrupted):
        synthesize.run(recipe.synthesize, context)
    assert [path.name for path in unit_paths(artifact)] == ["unit-00000.parquet"]
    assert run(recipe).is_complete()


def test_a_damaged_unit_of_an_earlier_process_is_refused(tiny_recipe: Path) -> None:
    recipe = make_recipe(tiny_recipe)
    artifact = run(recipe)
    (artifact.path / "manifest.json").unlink()
    unit_path(artifact, 1).write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match="unit-00001"):
        run(recipe)


def test_a_unit_of_another_plan_is_refused(tiny_recipe: Path) -> None:
    recipe = make_recipe(tiny_recipe)
    artifact = run(recipe)
    (artifact.path / "manifest.json").unlink()
    unit_path(artifact, 0).write_bytes(unit_path(artifact, 1).read_bytes())
    with pytest.raises(ArtifactError, match="must hold unit 0 of 'instructions'"):
        run(recipe)


def test_prompts_used_up_before_the_budget_end_the_stage(tiny_recipe: Path) -> None:
    prompts = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))["synthesize"]["prompts"][:1]
    manifest = run(make_recipe(tiny_recipe, tokens="10M", prompts=prompts)).manifest()
    assert manifest["asked"] == 80 * 3
    assert manifest["tokens"] < 10_000_000


def test_a_target_that_writes_nothing_useful_is_refused(tiny_recipe: Path) -> None:
    prompts = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))["synthesize"]["prompts"][:2]
    with pytest.raises(DataError, match="0 of 64 rows kept"):
        run(make_recipe(tiny_recipe, max_new_tokens=256, prompts=prompts))


def test_evaluation_prompts_among_the_prompts_are_counted(tiny_recipe: Path, tmp_path: Path) -> None:
    with open(tmp_path / "prompts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "tell me ABOUT number 3 and the fox."}) + "\n")
    artifact = run(make_recipe(tiny_recipe))
    assert artifact.manifest()["refused_prompts"] == {"instructions": {"evaluation": 1, "empty": 0, "repeated": 0}}


def fingerprint(recipe: Recipe) -> dict[str, object]:
    assert recipe.synthesize
    return synthesize.fingerprint(recipe.synthesize, pipeline.make_context(recipe, Console(quiet=True)))


def test_the_fingerprint_follows_what_the_text_depends_on_and_nothing_else(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_recipe)
    pipeline.run(recipe, only=("design", "prepare"))
    first = fingerprint(recipe)
    assert json.loads(json.dumps(first)) == first
    assert recipe.evaluate
    with open(tmp_path / "tasks.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "new", "prompt": "An unrelated prompt"}) + "\n")
    assert fingerprint(recipe) == first
    with open(tmp_path / "tasks.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "newer", "prompt": "what is 1 plus 7?"}) + "\n")
    assert fingerprint(recipe) != first
    assert fingerprint(make_recipe(tiny_recipe, top_k=5))["settings"] != first["settings"]


def test_another_target_has_another_fingerprint(tiny_recipe: Path, tiny_draft: Path) -> None:
    recipe = make_recipe(tiny_recipe, prompts=yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))["synthesize"]["prompts"][:1])
    other = recipe.model_copy(update={"target": recipe.target.model_copy(update={"model": str(tiny_draft)})})
    assert fingerprint(recipe)["target"] != fingerprint(other)["target"]
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(fingerprint(recipe)["target"]["files"])  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperatures": [-0.1]}, "temperatures must be between 0 and 10"),
        ({"temperatures": []}, "at least 1"),
        ({"prompts": []}, "at least 1"),
        ({"prompts": [{"kind": "magpie", "name": "m"}, {"kind": "magpie", "name": "m"}]}, "a name of its own"),
        ({"prompts": [{"kind": "corpus", "name": "c", "corpus": "code", "prompt_tokens": [9, 3]}]}, "1 <= shortest <= longest"),
        ({"prompts": [{"kind": "magpie", "name": "m", "share": 0}]}, "greater than 0"),
        ({"top_p": 0}, "greater than 0"),
        ({"looping": "burn"}, "'cut', 'drop' or 'keep'"),
    ],
)
def test_impossible_settings_are_refused(tiny_recipe: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(tiny_recipe, **change)


def test_a_missing_prompt_file_is_one_line(tiny_recipe: Path) -> None:
    recipe = make_recipe(tiny_recipe, prompts=[{"kind": "jsonl", "name": "p", "path": "nowhere.jsonl"}])
    with pytest.raises(FastDraftError, match="nowhere.jsonl"):
        run(recipe)


def test_magpie_without_a_chat_template_is_refused(tiny_recipe: Path, tiny_target: Path, tmp_path: Path) -> None:
    import shutil

    base = shutil.copytree(tiny_target, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    recipe = make_recipe(tiny_recipe, prompts=[{"kind": "magpie", "name": "m"}])
    recipe = recipe.model_copy(update={"target": recipe.target.model_copy(update={"model": str(base)})})
    with pytest.raises(FastDraftError, match="no chat template"):
        run(recipe)


def test_equal_recipes_write_equal_units(tiny_recipe: Path) -> None:
    assert contents(run(make_recipe(tiny_recipe, "one"))) == contents(run(make_recipe(tiny_recipe, "two")))


def test_units_carry_their_account(tiny_recipe: Path) -> None:
    for path in unit_paths(run(make_recipe(tiny_recipe))):
        counts = RowCounts.from_dict(read_metadata(path)["counts"])
        assert counts.balance() == 0
        assert counts.written == len(read_rows(path))
