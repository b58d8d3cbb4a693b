"""A target behind HTTP: equal rows however it is asked, every fault ends in complete rows or in one clear line."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")

from fastdraft.data.chat import prompt_ids, user_words
from fastdraft.errors import DataError, FastDraftError, Interrupted, RecipeError, TargetError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.recipe.data import OpenAIEngineConfig
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.runtimes.openai_requests import Servers
from fastdraft.runtimes.openai_server import OpenAIEngine, _likeliest
from fastdraft.runtimes.openvino import answer_seed
from fastdraft.target import Target
from serving import Served

WORDS = [
    "What is a fox?",
    "Count the stars",
    "Return the sum of two numbers",
    "Who lives by the river?",
    "Why?",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> Any:
    return Target.at(tiny_target).tokenizer


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    return [prompt_ids(tokenizer, text, True) for text in WORDS]


@pytest.fixture(scope="module")
def served(tiny_target: Path) -> Iterator[Served]:
    with Served(tiny_target).running() as one:
        yield one


@pytest.fixture(autouse=True)
def _no_old_faults(request: pytest.FixtureRequest) -> None:
    if "served" in request.fixturenames:
        request.getfixturevalue("served").faults.clear()


def engine_of(folder: Path, *servers: Served, check: Any = lambda: None, **changes: Any) -> OpenAIEngine:
    transport = {
        "concurrency": 4,
        "timeout": 20.0,
        "retries": 4,
        "api_key_env": "FASTDRAFT_TEST_KEY",
        "pause": 0.02,
    }
    transport |= {key: changes.pop(key) for key in list(changes) if key in transport}
    pool = Servers([one.url for one in servers] or changes.pop("urls"), check=check, **transport)
    tokenizer, vocabulary = Target.at(folder).tokenizer, Target.at(folder).vocabulary
    return OpenAIEngine(pool, tokenizer, vocabulary, 256, **{"logprobs": "processed", **changes})


def own(
    folder: Path, prompts: list[list[int]], sampling: Sampling, length: int, seed: int
) -> list[Generation]:
    """What the weights write with the very seeds that the engine sends."""
    config = Target.at(folder)
    engine = HuggingFaceEngine(config.model("cpu"), config.vocabulary)
    return [
        engine.generate([prompt], sampling, length, answer_seed(seed, i))[0]
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.7), Sampling(1.0, 5, 0.9)])
def test_a_served_target_gives_the_rows_of_its_weights(
    tiny_target: Path, served: Served, prompts: list[list[int]], sampling: Sampling
) -> None:
    written = engine_of(tiny_target, served).generate(prompts, sampling, 12, 3)
    for found, wanted in zip(written, own(tiny_target, prompts, sampling, 12, 3), strict=True):
        assert (found.prompt_ids, found.response_ids, found.finish_reason) == (
            wanted.prompt_ids,
            wanted.response_ids,
            wanted.finish_reason,
        )
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)


def test_token_ids_inside_the_logprobs_serve_as_well(tiny_target: Path, prompts: list[list[int]]) -> None:
    with Served(tiny_target, style="llama").running() as one:
        written = engine_of(tiny_target, one).generate(prompts, Sampling(0.7), 12, 3)
    assert [g.response_ids for g in written] == [
        g.response_ids for g in own(tiny_target, prompts, Sampling(0.7), 12, 3)
    ]
    assert all(len(g.logprobs) == len(g.response_ids) for g in written)


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_text_without_ids_is_tokenised_again_and_only_exact_rows_are_kept(
    tiny_target: Path, prompts: list[list[int]], style: str
) -> None:
    said: list[str] = []
    with Served(tiny_target, style=style).running() as one:
        engine = engine_of(tiny_target, one, logprobs="none", say=said.append)
        written = engine.generate(prompts, Sampling(1.0), 12, 3)
    wanted = own(tiny_target, prompts, Sampling(1.0), 12, 3)
    assert engine.way is not None
    assert engine.way.prompt == ("text" if style == "plain" else "messages")
    for found, true in zip(written, wanted, strict=True):
        assert found.fault == "not_round_trip" or found.response_ids == true.response_ids
    assert any("no token ids" in line for line in said)


def test_a_prompt_that_is_no_user_message_cannot_go_to_a_chat_server(
    tiny_target: Path, tokenizer: Any, prompts: list[list[int]]
) -> None:
    bare = prompt_ids(tokenizer, "def add(first", False)
    with Served(tiny_target, style="chat").running() as one:
        engine = engine_of(tiny_target, one, logprobs="none")
        assert engine.generate([prompts[0], bare], Sampling(0.0), 4, 0)[1].fault == "prompt_not_text"
        with pytest.raises(DataError, match="user message"):
            engine.generate([bare], Sampling(0.0), 4, 0)


def test_user_words_are_found_in_a_rendered_prompt(tokenizer: Any, prompts: list[list[int]]) -> None:
    assert [user_words(tokenizer, prompt) for prompt in prompts] == WORDS
    assert user_words(tokenizer, prompt_ids(tokenizer, "plain", False)) is None


@pytest.mark.parametrize("fault", ["500", "503", "429", "stall", "cut", "html", "wrong", "endless", "drop"])
def test_every_passing_fault_ends_in_complete_rows(
    tiny_target: Path, served: Served, prompts: list[list[int]], fault: str
) -> None:
    engine = engine_of(
        tiny_target, served, retries=20
    )  # on a busy machine a good answer may miss the short time-out too
    engine.generate(prompts[:1], Sampling(0.7), 8, 3)  # finds its way before anything goes wrong
    engine.servers.timeout = 0.5 if fault == "stall" else 20.0
    served.faults[:] = [fault] * 2
    found = engine.generate(prompts, Sampling(0.7), 8, 3)
    assert not served.faults
    assert [g.response_ids for g in found] == [
        g.response_ids for g in own(tiny_target, prompts, Sampling(0.7), 8, 3)
    ]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", "HTTP 500 (out of luck)"),
        ("429", "HTTP 429"),
        ("stall", "no answer within"),
        ("cut", "broke off"),
        ("html", "not JSON"),
        ("wrong", "no 'choices'"),
        ("endless", "without end"),
        ("drop", "broke off"),
    ],
)
def test_every_lasting_fault_ends_in_one_clear_line(
    tiny_target: Path, served: Served, prompts: list[list[int]], fault: str, words: str
) -> None:
    engine = engine_of(tiny_target, served, retries=1)
    engine.generate(prompts[:1], Sampling(0.0), 8, 3)
    engine.servers.timeout = 0.3 if fault == "stall" else 20.0
    served.faults[:] = [fault] * 50
    with pytest.raises(TargetError) as caught:
        engine.generate(prompts, Sampling(0.0), 8, 3)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert served.url in str(caught.value)


def test_retry_after_is_honoured(tiny_target: Path, served: Served, prompts: list[list[int]]) -> None:
    engine = engine_of(tiny_target, served, concurrency=1)
    engine.generate(prompts[:1], Sampling(0.0), 4, 0)
    served.faults[:], served.times[:] = ["429"], []
    engine.generate(prompts[:1], Sampling(0.0), 4, 0)
    assert served.times[1] - served.times[0] >= 0.95


def test_nobody_at_the_address_is_one_line(tiny_target: Path, prompts: list[list[int]]) -> None:
    with Served(tiny_target).running() as one:
        url = one.url
    with pytest.raises(TargetError, match="no connection") as caught:
        engine_of(tiny_target, urls=[url], retries=1).generate(prompts, Sampling(0.0), 4, 0)
    assert "asked 2 times" in str(caught.value)


def test_a_server_that_comes_back_is_found_again(tiny_target: Path, prompts: list[list[int]]) -> None:
    with Served(tiny_target).running() as one:
        port = one.http.server_port
        engine = engine_of(tiny_target, one, retries=9, pause=0.1)
        before = engine.generate(prompts, Sampling(0.7), 8, 3)
    found: list[list[Generation]] = []
    asking = threading.Thread(target=lambda: found.append(engine.generate(prompts, Sampling(0.7), 8, 3)))
    asking.start()
    time.sleep(0.5)
    assert not found, "nobody is there"
    with Served(tiny_target, port=port).running():
        asking.join(20)
    assert found == [before]


def test_several_servers_share_the_work_and_a_dead_one_is_left_out(
    tiny_target: Path, prompts: list[list[int]]
) -> None:
    with Served(tiny_target).running() as first:
        second = Served(tiny_target)
        with second.running():
            engine = engine_of(tiny_target, first, second, concurrency=1, pause=5.0)
            whole = engine.generate(prompts * 3, Sampling(0.7), 8, 3)
            assert first.asked
            assert second.asked
        start = time.monotonic()
        assert engine.generate(prompts * 3, Sampling(0.7), 8, 3) == whole
        assert time.monotonic() - start < 4, "the other server answers without waiting for the dead one"


def test_a_wrong_model_name_lists_the_served_ones(
    tiny_target: Path, served: Served, prompts: list[list[int]]
) -> None:
    with pytest.raises(TargetError, match="no model 'other': it serves target"):
        engine_of(tiny_target, served, model="other").generate(prompts, Sampling(0.0), 4, 0)


def test_an_address_without_v1_is_told(tiny_target: Path, served: Served, prompts: list[list[int]]) -> None:
    with pytest.raises(TargetError, match="end in /v1"):
        engine_of(tiny_target, urls=[served.url.removesuffix("/v1")]).generate(prompts, Sampling(0.0), 4, 0)


@pytest.mark.parametrize("key", ["", "sk-wrong-and-secret"])
def test_a_refused_key_is_one_line_without_the_key(
    tiny_target: Path, prompts: list[list[int]], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDRAFT_TEST_KEY", key)
    with Served(tiny_target, key="sk-right").running() as one, pytest.raises(TargetError) as caught:
        engine_of(tiny_target, one).generate(prompts, Sampling(0.0), 4, 0)
    assert "HTTP 401" in str(caught.value)
    assert "FASTDRAFT_TEST_KEY" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_right_key_opens(
    tiny_target: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDRAFT_TEST_KEY", "sk-right")
    with Served(tiny_target, key="sk-right").running() as one:
        assert len(engine_of(tiny_target, one).generate(prompts, Sampling(0.0), 4, 0)) == len(prompts)


def test_a_key_repeated_in_an_error_is_blotted_out(
    tiny_target: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDRAFT_TEST_KEY", "luck")  # the fault's message holds this word
    with Served(tiny_target, key="luck").running() as one:
        engine = engine_of(tiny_target, one, retries=0)
        engine.generate(prompts, Sampling(0.0), 4, 0)
        one.faults[:] = ["500"] * 9
        with pytest.raises(TargetError) as caught:
            engine.generate(prompts, Sampling(0.0), 4, 0)
    assert "luck" not in str(caught.value)
    assert "***" in str(caught.value)


def test_logprobs_said_to_be_processed_are_put_to_the_proof(
    tiny_target: Path, prompts: list[list[int]]
) -> None:
    with Served(tiny_target, logprobs="raw").running() as one:
        for sampling in (Sampling(0.7), Sampling(1.0, 3)):
            with pytest.raises(TargetError, match="raw logits"):
                engine_of(tiny_target, one).generate(prompts, sampling, 4, 0)
        rows = engine_of(tiny_target, one).generate(prompts, Sampling(1.0), 4, 0)
        assert all(len(row.logprobs) == len(row.response_ids) for row in rows), (
            "at temperature 1 both are the same"
        )
    with (
        Served(tiny_target, logprobs="none").running() as one,
        pytest.raises(TargetError, match="without log-probs"),
    ):
        engine_of(tiny_target, one).generate(prompts, Sampling(0.7), 4, 0)


def test_a_stop_cancels_what_is_under_way(
    tiny_target: Path, served: Served, prompts: list[list[int]]
) -> None:
    wish = threading.Event()

    def check() -> None:
        if wish.is_set():
            raise Interrupted("runs/x")

    engine = engine_of(tiny_target, served, check=check, timeout=30.0)
    engine.generate(prompts[:1], Sampling(0.0), 4, 0)
    served.faults[:] = ["stall"] * len(prompts)
    threading.Timer(0.3, wish.set).start()
    start = time.monotonic()
    with pytest.raises(Interrupted):
        engine.generate(prompts, Sampling(0.0), 4, 0)
    assert time.monotonic() - start < 5
    served.released.set()
    time.sleep(0.1)
    served.released.clear()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"servers": ["http://user:secret@host/v1"]}, "key in it"),
        ({"servers": ["http://h/v1?api_key=secret"]}, "key in it"),
        ({"servers": ["host:8000"]}, "must be addresses"),
        ({"servers": []}, "at least 1"),
        ({"servers": ["http://h"], "api_key_env": "sk-1 2"}, "name of an environment variable"),
    ],
)
def test_addresses_and_keys_that_are_none_are_refused(settings: dict[str, Any], words: str) -> None:
    from fastdraft.recipe.base import load_config

    with pytest.raises(FastDraftError, match=words) as caught:
        load_config(OpenAIEngineConfig, {"kind": "openai", **settings})
    assert "key in it" not in words or "secret" not in str(caught.value)


def test_raw_logprobs_are_refused_where_they_mean_something_else() -> None:
    config = OpenAIEngineConfig(kind="openai", servers=["http://h/v1"], logprobs="raw")
    config.check_sampling([0.0, 1.0], 0, 1.0)
    for temperatures, top_k, top_p in (([0.6], 0, 1.0), ([1.0], 40, 1.0), ([1.0], 0, 0.9)):
        with pytest.raises(RecipeError, match=re.escape("synthesize.engine.logprobs")):
            config.check_sampling(temperatures, top_k, top_p)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": {}},
        {"choices": [1]},
        {"choices": [{"logprobs": 3}]},
        {"choices": [{"logprobs": {"top_logprobs": [{"a": None}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [None, {"logprob": "x"}]}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": {"a": 1}}]}}]},
    ],
)
def test_alternatives_of_no_known_shape_tell_nothing(answer: dict[str, Any]) -> None:
    assert _likeliest(answer) is None
