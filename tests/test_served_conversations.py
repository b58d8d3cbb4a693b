"""Conversations with a target behind a server: every turn through a chat API, faults between turns, logs of several turns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("httpx")

from conftest import CHAT_TEMPLATE, write_recipe
from fastdraft import pipeline
from fastdraft.console import Console
from fastdraft.data.chat import Conversation, conversation_plan
from fastdraft.data.filters import RowCounts, RowFilter
from fastdraft.data.rows import SyntheticRow, ids_hash, read_all
from fastdraft.data.transcripts import read_transcripts
from fastdraft.data.units import UnitPlan
from fastdraft.decoding.unit_writer import UnitWriter
from fastdraft.evaluation.prompts import EncodedTask
from fastdraft.evaluation.work import EvaluationPlan, EvaluationWork
from fastdraft.run_folder import StageFolder
from fastdraft.errors import TargetError
from fastdraft.functional.generation import Engine, Generation, RenderedPrompt, Sampling
from fastdraft.recipe.data import TranscriptLog
from fastdraft.recipe.recipe import load_recipe
from fastdraft.runtimes import engines
from fastdraft.runtimes.openai_requests import Servers
from fastdraft.runtimes.openai_server import OpenAIEngine
from fastdraft.target import Target
from serving import Served

WITH_SYSTEM = CHAT_TEMPLATE.replace(
    "{% if m['role']=='user' %}<|user|>", "{% if m['role'] in ('user', 'system') %}<|user|>"
)
TALKS = [
    Conversation(("First?", "Second?", "Third?"), "Be brief."),
    Conversation(("What is a fox?", "And why?")),
    Conversation(("Stars?",), "Count."),
]


def answer_of(prompt: Sequence[int], tokenizer: Any) -> list[int]:
    """Plain words that depend on all that was read, so that an answer to another history is another answer."""
    return [*tokenizer(f"I read {sum(prompt)} of {len(prompt)}.", add_special_tokens=False).input_ids, 3]


class Talking(Served):
    """Writes plain words, which survive a server that gives text only."""

    def write(self, prompt: list[int], sampling: Sampling, max_new_tokens: int, seed: int) -> Generation:
        ids = answer_of(prompt, self.tokenizer)[:max_new_tokens]
        return Generation(prompt, ids, [0.0] * len(ids), "stop" if ids[-1] == 3 else "length")


class Local:
    """The same target in this process."""

    name = "local"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        answers = [answer_of(prompt, self.tokenizer)[:max_new_tokens] for prompt in prompts]
        return [
            Generation(list(p), ids, [0.0] * len(ids), "stop")
            for p, ids in zip(prompts, answers, strict=True)
        ]


@pytest.fixture(scope="module")
def target(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with a template that takes system messages."""
    folder = tmp_path_factory.mktemp("talking") / "target"
    shutil.copytree(tiny_target, folder)
    (folder / "chat_template.jinja").write_text(WITH_SYSTEM, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def chat_server(target: Path) -> Iterator[Served]:
    with Talking(target, style="chat").running() as one:
        yield one


@pytest.fixture(autouse=True)
def _no_old_faults(request: pytest.FixtureRequest) -> None:
    if "chat_server" in request.fixturenames:
        request.getfixturevalue("chat_server").faults.clear()


def engine_of(folder: Path, server: Served, retries: int = 4) -> OpenAIEngine:
    pool = Servers(
        [server.url],
        concurrency=2,
        timeout=20.0,
        retries=retries,
        api_key_env="FASTDRAFT_TEST_KEY",
        pause=0.02,
    )
    return OpenAIEngine(pool, Target.at(folder).tokenizer, Target.at(folder).vocabulary, 256)


def written(folder: Path, engine: Engine, talks: list[Conversation]) -> tuple[list[SyntheticRow], RowCounts]:
    tokenizer = Target.at(folder).tokenizer
    found = conversation_plan(tokenizer, talks)
    assert found is not None
    unit = UnitPlan(name="talks", temperatures=[0.0], unit_rows=8, **found.fields).unit(0)
    assert unit is not None
    row_filter = RowFilter(range(300, 320), lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))
    writer = UnitWriter(engine, engine, tokenizer, row_filter, max_new_tokens=40, context_length=256)
    return writer.write(unit, 5)


def test_a_chat_server_is_asked_every_turn_with_its_own_earlier_answers(
    target: Path, chat_server: Served
) -> None:
    chat_server.asked.clear()
    rows, counts = written(target, engine_of(target, chat_server), TALKS)
    assert (rows, counts) == written(target, Local(Target.at(target).tokenizer), TALKS)
    assert counts.written == 6
    longest = max((body.get("messages", []) for body in chat_server.asked), key=len)
    assert [message["role"] for message in longest] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    assert [message["content"] for message in longest if message["role"] == "user"] == [
        "First?",
        "Second?",
        "Third?",
    ]
    tokenizer = Target.at(target).tokenizer
    said = [tokenizer.decode(row.response_ids[:-1]) for row in rows]
    assert all(message["content"] in said for message in longest if message["role"] == "assistant")


def test_a_chat_server_whose_template_takes_no_system_message_gets_it_in_the_first_question(
    tiny_target: Path,
) -> None:
    with Talking(tiny_target, style="chat").running() as one:
        rows, counts = written(tiny_target, engine_of(tiny_target, one), TALKS)
    assert (rows, counts) == written(tiny_target, Local(Target.at(tiny_target).tokenizer), TALKS)
    assert counts.written == 6
    assert {"role": "user", "content": "Be brief.\n\nFirst?"} in [
        body["messages"][0] for body in one.asked if "messages" in body
    ]


def test_kept_prompts_of_later_turns_still_know_their_messages(
    target: Path, chat_server: Served, tmp_path: Path
) -> None:
    task = EncodedTask(
        "talks", [], [], 40, conversations=[(f"talk{i}", talk) for i, talk in enumerate(TALKS)]
    )
    plan = EvaluationPlan([task], [0.0], [3], [], 0)
    tokenizer, vocabulary = Target.at(target).tokenizer, Target.at(target).vocabulary

    def with_turns(open_engine: Any) -> EncodedTask:
        work = EvaluationWork(plan, StageFolder(tmp_path), Console(quiet=True), vocabulary, None, open_engine)
        work.take_turns(tokenizer, 256)
        return work.plan.tasks[0]

    fresh, again = with_turns(lambda on_batch: engine_of(target, chat_server)), with_turns(_never)
    assert again == fresh
    assert fresh.groups == [0, 0, 0, 1, 1, 2]
    assert all(isinstance(prompt, RenderedPrompt) for prompt in again.prompt_ids)
    answers = engine_of(target, chat_server).generate(again.prompt_ids, Sampling(0.0), 40, 0)
    assert [answer.response_ids for answer in answers] == [
        answer_of(prompt, tokenizer) for prompt in again.prompt_ids
    ]


def _never(on_batch: Any) -> Engine:
    raise AssertionError("these prompts are kept")


@pytest.mark.parametrize(
    ("fault", "after"),
    [("500", 1), ("429", 4), ("cut", 4), ("drop", 1), ("wrong", 4), ("endless", 1), ("stall", 4)],
)
def test_a_fault_in_the_middle_of_a_conversation_changes_no_row(
    target: Path, chat_server: Served, fault: str, after: int
) -> None:
    engine = engine_of(
        target, chat_server, retries=20
    )  # on a busy machine a good answer may miss the short time-out too
    whole = written(target, engine, TALKS)
    engine.servers.timeout = 0.5 if fault == "stall" else 20.0
    chat_server.faults[:] = [""] * after + [fault]
    assert written(target, engine, TALKS) == whole
    assert not chat_server.faults


def test_a_server_that_dies_between_two_turns_ends_in_one_line_and_loses_no_finished_work(
    target: Path, chat_server: Served
) -> None:
    engine = engine_of(target, chat_server, retries=1)
    whole = written(target, engine, TALKS)
    chat_server.faults[:] = ["", "", "", *["500"] * 50]
    with pytest.raises(TargetError, match="HTTP 500") as caught:
        written(target, engine, TALKS)
    assert "\n" not in str(caught.value)
    chat_server.faults.clear()
    assert written(target, engine, TALKS) == whole


def test_a_run_of_conversations_over_a_chat_server_evaluates_every_turn_with_one_engine(
    target: Path, chat_server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = engines.open_engines
    monkeypatch.setattr(
        engines, "open_engines", lambda *a, **k: opened.append(k.get("stage", "synthesize")) or real(*a, **k)
    )
    recipe = load_recipe(str(_recipe(tmp_path, target, chat_server)))
    (target / "model.safetensors").rename(tmp_path / "away")
    try:
        run = pipeline.run(recipe)
    finally:
        (tmp_path / "away").rename(target / "model.safetensors")
    rows = list(read_all(run.folder("synthesize")))
    assert any(row.prompt_key != ids_hash(row.prompt_ids) for row in rows), "later turns are there"
    results = json.loads((run.folder("evaluate").path / "results.json").read_text(encoding="utf-8"))
    assert {(row["num_prompts"], row["num_conversations"]) for row in results["rows"]} == {(6, 3)}
    assert opened.count("evaluate") == 1


def _recipe(folder: Path, target: Path, server: Served) -> Path:
    lines = {
        "training": [
            {"messages": _messages(f"What is {i}?", "And then?", system="Be brief.", answers=["LOGGED"])}
            for i in range(12)
        ],
        "own": [
            {"id": f"t{i}", "messages": _messages(*talk.users, system=talk.system, answers=["LOGGED"] * 2)}
            for i, talk in enumerate(TALKS)
        ],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    path = write_recipe(folder, target)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in ("prepare", "pretrain", "continue_pretrain", "export", "report"):
        del recipe[name]
    recipe["synthesize"] |= {
        "prompts": [
            {"kind": "jsonl", "name": "talks", "path": str(folder / "training.jsonl"), "field": "messages"}
        ],
        "engine": {"kind": "openai", "servers": [server.url], "api": "chat", "logprobs": "none"},
        "temperatures": [0],
        "tokens": "1k",
    }
    recipe["align"] |= {"tokens": "1k", "pretraining_share": 0}
    task = {"kind": "file", "name": "talks", "path": str(folder / "own.jsonl"), "max_new_tokens": 32}
    recipe["evaluate"] |= {"tasks": [task], "texts": "engine", "temperatures": [0], "checkpoints": ["align"]}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def _messages(*users: str, system: str = "", answers: Sequence[str] = ()) -> list[dict[str, str]]:
    found = [{"role": "system", "content": system}] if system else []
    for place, words in enumerate(users):
        found.append({"role": "user", "content": words})
        found += [{"role": "assistant", "content": answer} for answer in answers[place : place + 1]]
    return found


def test_turns_of_a_logged_conversation_belong_together(target: Path, tmp_path: Path) -> None:
    users, answers = ("First?", "Second?"), ("One.",)
    lines = [
        {"messages": _messages("First?", system="S"), "response": "One.", "temperature": 0},
        {"messages": _messages(*users, system="S", answers=answers), "response": "Two.", "temperature": 0},
        {"messages": _messages("Else?", system="S"), "response": "No.", "temperature": 0},
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    log = TranscriptLog(kind="transcripts", name="log", path=str(path))
    tokenizer, vocabulary = Target.at(target).tokenizer, Target.at(target).vocabulary
    first, second, other = read_transcripts(log, tokenizer, vocabulary, 0, shuffled=False).rows
    assert (first.key, other.key) == ("", "")
    assert second.key == ids_hash(first.generation.prompt_ids)
    refused = read_transcripts(log, tokenizer, vocabulary, 0, lambda text: text == "First?").refused
    assert refused["evaluation"] == 2, "an evaluation prompt may stand in any turn"
