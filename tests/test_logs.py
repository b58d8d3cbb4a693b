"""Logs of a target: every shape of line, what is taken from it, and what is told of lines that are no use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdraft.data.chat import prompt_ids
from fastdraft.data.logs import read_transcripts
from fastdraft.errors import DataError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.recipe.synthesize import TranscriptPrompts
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.target import Target


@pytest.fixture(scope="module")
def written(tiny_target: Path) -> Generation:
    """One sampled answer of the target."""
    target = Target.at(tiny_target)
    engine = HuggingFaceEngine(target.model("cpu"), target.vocabulary)
    prompt = prompt_ids(Target.at(tiny_target).tokenizer, "What is a fox?", True)
    return engine.generate([prompt], Sampling(0.7), 12, 1)[0]


def read(folder: Path, target: Path, *lines: object, **settings: Any) -> Any:
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = TranscriptPrompts(
        **{"kind": "transcripts", "name": "log", "path": str(path), "logprobs": "processed", **settings}
    )
    return read_transcripts(config, Target.at(target).tokenizer, Target.at(target).vocabulary, 0)


def shapes(written: Generation, text: str) -> dict[str, dict[str, Any]]:
    """One answer in every shape of line that is understood."""
    messages = [{"role": "user", "content": "What is a fox?"}]
    ids = {"token_ids": written.response_ids, "finish_reason": written.finish_reason}
    legacy = {
        **ids,
        "text": text,
        "logprobs": {"tokens": ["?"] * len(written.logprobs), "token_logprobs": written.logprobs},
    }
    named = {"tokens": [f"token_id:{i}" for i in written.response_ids], "token_logprobs": written.logprobs}
    content = [
        {"id": i, "token": "?", "logprob": p}
        for i, p in zip(written.response_ids, written.logprobs, strict=True)
    ]
    message = {"message": {"role": "assistant", "content": text}, "finish_reason": written.finish_reason}
    request = {"messages": messages, "temperature": 0.7}
    return {
        "chat and choices": {"messages": messages, "temperature": 0.7, "choices": [legacy]},
        "chat and response": {
            "messages": messages,
            "temperature": 0.7,
            "response": {"choices": [{**message, "logprobs": {"content": content}}]},
        },
        "request and response": {
            "request": request,
            "response": {"choices": [{**message, "logprobs": {"content": content}}]},
        },
        "batch": {
            "body": request,
            "response": {"status_code": 200, "body": {"choices": [{**legacy, "logprobs": named}]}},
        },
        "prompt ids": {"prompt": written.prompt_ids, "temperature": 0.7, "choices": [legacy]},
        "logged prompt ids": {
            "prompt": "lost",
            "prompt_token_ids": written.prompt_ids,
            "temperature": 0.7,
            "choices": [legacy],
        },
        "plain lists": {
            "messages": messages,
            "temperature": 0.7,
            "response": text,
            **ids,
            "logprobs": written.logprobs,
        },
    }


SHAPES = ("chat and choices", "chat and response", "request and response", "batch", "prompt ids")
SHAPES += ("logged prompt ids", "plain lists")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_line_gives_the_answer_that_was_written(
    tmp_path: Path, tiny_target: Path, written: Generation, shape: str
) -> None:
    text = Target.at(tiny_target).tokenizer.decode(written.response_ids, skip_special_tokens=True)
    rows = read(tmp_path, tiny_target, shapes(written, text)[shape]).rows
    assert len(rows) == 1
    assert rows[0].generation == written
    assert rows[0].sampling == Sampling(0.7)


def test_a_conversation_that_ends_with_the_assistant_is_an_answer(tmp_path: Path, tiny_target: Path) -> None:
    turns = [
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "One fox."},
        {"role": "user", "content": "More."},
    ]
    row = read(
        tmp_path,
        tiny_target,
        {"messages": [*turns, {"role": "assistant", "content": "the stars"}]},
        temperature=1.0,
    ).rows[0]
    tokenizer = Target.at(tiny_target).tokenizer
    assert tokenizer.decode(row.generation.response_ids) == "the stars<|end|>"
    assert "One fox." in tokenizer.decode(row.generation.prompt_ids)
    assert row.generation.logprobs == [], "nobody told them"


def test_a_request_that_bends_the_distribution_keeps_no_logprobs(
    tmp_path: Path, tiny_target: Path, written: Generation
) -> None:
    line = shapes(written, "x")["chat and choices"]
    assert read(tmp_path, tiny_target, {**line, "repetition_penalty": 1.2}).rows[0].generation.logprobs == []
    assert (
        read(tmp_path, tiny_target, {**line, "repetition_penalty": 1.0}).rows[0].generation.logprobs
        == written.logprobs
    )


def test_raw_logprobs_count_at_temperature_one_only(
    tmp_path: Path, tiny_target: Path, written: Generation
) -> None:
    line = shapes(written, "x")["chat and choices"]
    assert read(tmp_path, tiny_target, line, logprobs="raw").rows[0].generation.logprobs == []
    assert (
        read(tmp_path, tiny_target, {**line, "temperature": 1}, logprobs="raw").rows[0].generation.logprobs
        == written.logprobs
    )


def test_text_that_does_not_come_back_exactly_is_told(tmp_path: Path, tiny_target: Path) -> None:
    line = {
        "prompt": "The fox",
        "temperature": 1,
        "choices": [{"text": "half a \ufffd", "finish_reason": "length"}],
    }
    assert read(tmp_path, tiny_target, line).rows[0].generation.fault == "not_round_trip"
    special = {
        "prompt": "The fox",
        "temperature": 1,
        "choices": [{"text": "says <|user|>", "finish_reason": "length"}],
    }
    assert read(tmp_path, tiny_target, special).rows[0].generation.fault == "not_round_trip"
    tool = {
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 1,
        "choices": [{"message": {"tool_calls": [{}]}, "finish_reason": "tool_calls"}],
    }
    assert read(tmp_path, tiny_target, tool).rows[0].generation.fault == "finish_tool_calls"
    counted = {
        **line,
        "choices": [{"text": " the stars", "finish_reason": "length"}],
        "usage": {"completion_tokens": 9},
    }
    assert read(tmp_path, tiny_target, counted).rows[0].generation.fault == "not_round_trip"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "x", "choices": [{"text": "y", "finish_reason": "stop"}]}, "no temperature"),
        ({"prompt": "x", "temperature": 1}, "must hold"),
        ({"text": "x"}, "must hold"),
        ({"messages": [{"role": "user"}], "response": "y", "temperature": 1}, "message without text"),
        ({"prompt": "x", "response": "y", "temperature": "hot"}, "must be from 0 to 10"),
        ({"prompt": "x", "response": "y", "temperature": 1.0, "top_k": float("inf")}, "top_k a whole number"),
        ({"prompt": "x", "response": "y", "temperature": float("nan")}, "must be from 0 to 10"),
        (
            {"prompt": "x", "response": "y", "temperature": -0.5},
            "temperature -0.5; temperature must be from 0",
        ),
        ({"prompt": "x", "response": "y", "temperature": 0.5, "top_p": 0}, "top_p 0; "),
        ({"prompt": "x", "response": "y", "temperature": 1.0, "top_p": 1.5}, "at most 1"),
        ([1], "JSON list"),
    ],
)
def test_a_line_that_cannot_be_understood_is_named(
    tmp_path: Path, tiny_target: Path, line: object, words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path, tiny_target, {"prompt": "a", "temperature": 0, "response": "fox"}, line)
    assert "line 2" in str(caught.value)


def test_temperatures_that_differ_by_rounding_alone_are_one_temperature(
    tmp_path: Path, tiny_target: Path
) -> None:
    lines = [
        {"prompt": f"say {number}", "response": "x", "temperature": t}
        for number, t in enumerate((0.7, 0.699999988079071))
    ]
    assert {row.sampling.temperature for row in read(tmp_path, tiny_target, *lines).rows} == {0.7}


ASKED = {"messages": [{"role": "user", "content": "What is a fox?"}], "temperature": 0}


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
        (
            {
                **ASKED,
                "messages": [*ASKED["messages"], {"role": "assistant", "content": None, "tool_calls": [{}]}],
            },
            "unsupported",
        ),
        (
            {
                "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
                "response": "a fox",
            },
            "unsupported",
        ),
        (
            {**ASKED, "messages": [{"role": "user", "content": "half \ud83d"}], "response": "a fox"},
            "unrendered",
        ),
        ({"prompt": "half \ud83d", "response": "a fox", "temperature": 0}, "unrendered"),
    ],
)
def test_what_a_real_log_also_holds_is_counted_and_does_not_stop_the_run(
    tmp_path: Path, tiny_target: Path, line: object, reason: str
) -> None:
    found = read(tmp_path, tiny_target, line, {**ASKED, "response": " a fox"})
    assert len(found.rows) == 1
    assert {name: count for name, count in found.refused.items() if count} == {reason: 1}


def test_an_answer_with_half_a_character_is_told_as_one_that_does_not_come_back(
    tmp_path: Path, tiny_target: Path
) -> None:
    rows = read(tmp_path, tiny_target, {**ASKED, "response": "a fox \ud83d"}).rows
    assert [row.generation.fault for row in rows] == ["not_round_trip"]


def test_the_output_of_a_batch_is_read_with_its_requests(tmp_path: Path, tiny_target: Path) -> None:
    requests = tmp_path / "asked.jsonl"
    requests.write_text(
        "".join(
            json.dumps(
                {
                    "custom_id": f"r{i}",
                    "method": "POST",
                    "body": {**ASKED, "messages": [{"role": "user", "content": text}]},
                }
            )
            + "\n"
            for i, text in enumerate(("What is a fox?", "Where is Paris?"))
        ),
        encoding="utf-8",
    )
    answer = {
        "choices": [{"message": {"role": "assistant", "content": "The river"}, "finish_reason": "stop"}]
    }
    line = {
        "id": "batch_1",
        "custom_id": "r1",
        "response": {"status_code": 200, "body": answer},
        "error": None,
    }
    rows = read(tmp_path, tiny_target, line, requests=str(requests)).rows
    assert [row.generation.prompt_ids for row in rows] == [
        prompt_ids(Target.at(tiny_target).tokenizer, "Where is Paris?", True)
    ]
    assert rows[0].sampling == Sampling(0.0)
    with pytest.raises(DataError, match="custom_id 'r9'; must be in the file that `requests` names"):
        read(tmp_path, tiny_target, {**line, "custom_id": "r9"}, requests=str(requests))
    with pytest.raises(DataError, match="set `requests` to the batch's input"):
        read(tmp_path, tiny_target, line)
