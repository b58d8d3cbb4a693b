"""Logs of a target: every shape of line, what is taken from it, and what is told of lines that are no use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdraft.data.chat import ChatTemplate
from fastdraft.data.logs import read_transcripts
from fastdraft.errors import DataError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.recipe.synthesize import TranscriptPrompts
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.target import Target

FOX = [{"role": "user", "content": "What is a fox?"}]
ASKED: dict[str, Any] = {"messages": FOX, "temperature": 0}
WARM = {"messages": FOX, "temperature": 0.7}


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> Target:
    return Target.at(tiny_target)


@pytest.fixture(scope="module")
def written(target: Target) -> Generation:
    """One sampled answer of the target."""
    engine = HuggingFaceEngine(target.model("cpu"), target.vocabulary)
    return engine.generate(
        [ChatTemplate(target.tokenizer).prompt_ids("What is a fox?")], Sampling(0.7), 12, 1
    )[0]


def write_lines(path: Path, lines: Any) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def read(tmp_path: Path, target: Target) -> Any:
    """Reads lines as a log."""

    def of(*lines: object, **changes: Any) -> Any:
        settings = {
            "name": "log",
            "path": write_lines(tmp_path / "log.jsonl", lines),
            "logprobs": "processed",
        }
        config = TranscriptPrompts(kind="transcripts", **{**settings, **changes})
        return read_transcripts(config, ChatTemplate(target.tokenizer), target.vocabulary, 0)

    return of


def ids_of(written: Generation) -> dict[str, Any]:
    return {"token_ids": written.response_ids, "finish_reason": written.finish_reason}


def legacy(written: Generation) -> dict[str, Any]:
    tokens = {"tokens": ["?"] * len(written.logprobs), "token_logprobs": written.logprobs}
    return {**ids_of(written), "text": "x", "logprobs": tokens}


def shapes(written: Generation) -> dict[str, dict[str, Any]]:
    """One answer in every shape of line that is understood."""
    pairs = list(zip(written.response_ids, written.logprobs, strict=True))
    named = {"tokens": [f"token_id:{i}" for i, _ in pairs], "token_logprobs": written.logprobs}
    content = {"content": [{"id": i, "token": "?", "logprob": p} for i, p in pairs]}
    chat = {"message": {"role": "assistant", "content": "x"}, "logprobs": content, "finish_reason": "length"}
    plain, old = {"temperature": 0.7}, legacy(written)
    batch = {"status_code": 200, "body": {"choices": [{**old, "logprobs": named}]}}
    return {
        "chat and choices": {**WARM, "choices": [old]},
        "chat and response": {**WARM, "response": {"choices": [chat]}},
        "request and response": {"request": WARM, "response": {"choices": [chat]}},
        "batch": {"body": WARM, "response": batch},
        "prompt ids": {"prompt": written.prompt_ids, **plain, "choices": [old]},
        "logged ids": {"prompt": "lost", "prompt_token_ids": written.prompt_ids, **plain, "choices": [old]},
        "plain lists": {**WARM, "response": "x", **ids_of(written), "logprobs": written.logprobs},
    }


@pytest.mark.parametrize("shape", shapes(Generation([1], [2], [-1.0], "length")))
def test_every_shape_of_line_gives_the_answer_that_was_written(
    read: Any, written: Generation, shape: str
) -> None:
    (row,) = read(shapes(written)[shape]).rows
    assert (row.generation, row.sampling) == (written, Sampling(0.7))


def test_a_conversation_that_ends_with_the_assistant_is_an_answer(read: Any, target: Target) -> None:
    said = [("user", "Count."), ("assistant", "One fox."), ("user", "More."), ("assistant", "the stars")]
    messages = [{"role": role, "content": content} for role, content in said]
    answer = read({"messages": messages}, temperature=1.0).rows[0].generation
    assert target.tokenizer.decode(answer.response_ids) == "the stars<|end|>"
    assert "One fox." in target.tokenizer.decode(answer.prompt_ids)
    assert answer.logprobs == [], "nobody told them"


@pytest.mark.parametrize(
    ("line", "kind", "kept"),
    [
        ({"repetition_penalty": 1.2}, "processed", False),
        ({"repetition_penalty": 1.0}, "processed", True),
        ({}, "raw", False),
        ({"temperature": 1}, "raw", True),
    ],
)
def test_logprobs_are_kept_only_where_they_are_of_the_distribution_drawn_from(
    read: Any, written: Generation, line: dict[str, Any], kind: str, kept: bool
) -> None:
    found = read({**WARM, "choices": [legacy(written)], **line}, logprobs=kind).rows[0].generation
    assert found.logprobs == (written.logprobs if kept else [])


@pytest.mark.parametrize(
    ("choice", "fault"),
    [
        ({"text": "half a \ufffd", "finish_reason": "length"}, "not_round_trip"),
        ({"text": "a fox \ud83d", "finish_reason": "length"}, "not_round_trip"),
        ({"text": "says <|user|>", "finish_reason": "length"}, "not_round_trip"),
        ({"message": {"tool_calls": [{}]}, "finish_reason": "tool_calls"}, "tools"),
        ({"text": " the stars", "finish_reason": "length"}, "not_round_trip"),
    ],
)
def test_an_answer_that_does_not_come_back_exactly_is_told(
    read: Any, choice: dict[str, Any], fault: str
) -> None:
    line = {"prompt": "The fox", "temperature": 1, "choices": [choice], "usage": {"completion_tokens": 9}}
    assert read(line).rows[0].generation.fault == fault


TOLD = {"prompt": "x", "response": "y"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "x", "choices": [{"text": "y", "finish_reason": "stop"}]}, "no temperature"),
        ({"prompt": "x", "temperature": 1}, "must hold"),
        ({"text": "x"}, "must hold"),
        (
            {"messages": [{"role": "user"}], "response": "y", "temperature": 1},
            "message of the user without text",
        ),
        ({**TOLD, "temperature": "hot"}, "must be from 0 to 10"),
        ({**TOLD, "temperature": 1.0, "top_k": float("inf")}, "top_k a whole number"),
        ({**TOLD, "temperature": float("nan")}, "must be from 0 to 10"),
        ({**TOLD, "temperature": -0.5}, "temperature -0.5; temperature must be from 0"),
        ({**TOLD, "temperature": 0.5, "top_p": 0}, "top_p 0; "),
        ({**TOLD, "temperature": 1.0, "top_p": 1.5}, "at most 1"),
        ([1], "JSON list"),
    ],
)
def test_a_line_that_cannot_be_understood_is_named(read: Any, line: object, words: str) -> None:
    with pytest.raises(DataError, match=f"line 2.*{words}"):
        read({**TOLD, "temperature": 0}, line)


def test_temperatures_that_differ_by_rounding_alone_are_one_temperature(read: Any) -> None:
    rows = read(*({**TOLD, "temperature": t} for t in (0.7, 0.699999988079071))).rows
    assert {row.sampling.temperature for row in rows} == {0.7}


CALLS = [*FOX, {"role": "assistant", "content": None, "tool_calls": [{}]}]
PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
HALF = "half \ud83d"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({**ASKED, "response": None}, "no_answer"),
        ({**ASKED, "choices": None, "error": "rate limit"}, "no_answer"),
        ({"request": ASKED, "response": {"error": {"message": "overloaded"}}}, "no_answer"),
        (
            {"body": ASKED, "response": {"status_code": 500, "body": {"error": {"message": "no"}}}},
            "no_answer",
        ),
        ({"messages": [*CALLS, *FOX], "response": "a fox"}, "tools"),
        ({"messages": PICTURE, "response": "a fox"}, "media"),
        ({"messages": [{"role": "user", "content": HALF}], "response": "a", "temperature": 0}, "unrendered"),
        ({"prompt": HALF, "response": "a fox", "temperature": 0}, "unrendered"),
    ],
)
def test_what_a_real_log_also_holds_is_counted_and_does_not_stop_the_run(
    read: Any, line: object, reason: str
) -> None:
    found = read(line, {**ASKED, "response": " a fox"})
    assert len(found.rows) == 1
    assert {name: count for name, count in found.refused.items() if count} == {reason: 1}


def test_the_output_of_a_batch_is_read_with_its_requests(read: Any, target: Target, tmp_path: Path) -> None:
    bodies = [
        {**ASKED, "messages": [{"role": "user", "content": text}]} for text in ("A fox?", "Where is Paris?")
    ]
    asked = [{"custom_id": f"r{i}", "method": "POST", "body": body} for i, body in enumerate(bodies)]
    requests = write_lines(tmp_path / "asked.jsonl", asked)
    choice = {"message": {"role": "assistant", "content": "The river"}, "finish_reason": "stop"}
    response = {"status_code": 200, "body": {"choices": [choice]}}
    line = {"id": "batch_1", "custom_id": "r1", "response": response, "error": None}
    (row,) = read(line, requests=requests).rows
    assert row.generation.prompt_ids == ChatTemplate(target.tokenizer).prompt_ids("Where is Paris?")
    assert row.sampling == Sampling(0.0)
    with pytest.raises(DataError, match="custom_id 'r9'; must be in the file that `requests` names"):
        read({**line, "custom_id": "r9"}, requests=requests)
    with pytest.raises(DataError, match="set `requests` to the batch's input"):
        read(line)
