"""A target behind HTTP: equal rows however it is asked, every fault ends in complete rows or in one clear
line.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from openai import _base_client

from conftest import CHAT_TEMPLATE
from fastdraft.data.chat import ChatTemplate, Conversation
from fastdraft.data.filters import RowFilter
from fastdraft.data.synthesis_plan import Unit
from fastdraft.errors import DataError, Interrupted, TargetError
from fastdraft.functional.generation import Engine, Generation, Sampling
from fastdraft.recipe.synthesize import OpenAIEngineConfig
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.runtimes.openai import OpenAIEngine
from fastdraft.runtimes.openai_servers import Servers
from fastdraft.runtimes.openvino import answer_seed
from fastdraft.runtimes.synthesis import UnitWriter, keep_rows
from fastdraft.target import Target
from serving import Served, Talking

WORDS = ["What is a fox?", "Count the stars", "Return the sum of two numbers", "Who lives here?", "Why?"]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.02)


@pytest.fixture(scope="module")
def prompts(tiny_target: Path) -> list[list[int]]:
    return [ChatTemplate(Target.at(tiny_target).tokenizer).prompt_ids(text) for text in WORDS]


@pytest.fixture(scope="module")
def server(tiny_target: Path) -> Iterator[Served]:
    with Served(tiny_target).running() as one:
        yield one


@pytest.fixture
def served(server: Served) -> Served:
    """Without what an earlier test left."""
    server.faults.clear()
    server.asked.clear()
    server.style = "full"
    return server


def engine_of(folder: Path, *servers: Served | str, **settings: Any) -> OpenAIEngine:
    options = {name: settings.pop(name) for name in ("say",) if name in settings}
    check = settings.pop("check", lambda: None)
    urls = [one if isinstance(one, str) else one.url for one in servers]
    common: Any = {"concurrency": 4, "timeout": 20.0, "retries": 4, "api_key_env": "FASTDRAFT_TEST_KEY"}
    config = OpenAIEngineConfig(kind="openai", servers=urls, **common | {"logprobs": "processed"} | settings)
    target = Target.at(folder)
    return OpenAIEngine(Servers(config, check), target.tokenizer, target.vocabulary, 256, **options)


def own(folder: Path, prompts: Any, sampling: Sampling, length: int) -> list[Generation]:
    """What the weights write with the very seeds that the engine sends for seed 3."""
    target = Target.at(folder)
    engine = HuggingFaceEngine(target.model("cpu"), target.vocabulary)
    seeds = [answer_seed(3, index) for index in range(len(prompts))]
    return [engine.generate([p], sampling, length, s)[0] for p, s in zip(prompts, seeds, strict=True)]


def ids(answers: list[Generation]) -> list[list[int]]:
    return [answer.response_ids for answer in answers]


@pytest.mark.parametrize("style", ["full", "llama"])
@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.7), Sampling(1.0, 5, 0.9)])
def test_a_served_target_gives_the_rows_of_its_weights(
    tiny_target: Path, served: Served, prompts: Any, sampling: Sampling, style: str
) -> None:
    served.style = style  # token ids beside the text, or inside the log-probs
    written = engine_of(tiny_target, served).generate(prompts, sampling, 12, 3)
    for found, wanted in zip(written, own(tiny_target, prompts, sampling, 12), strict=True):
        assert replace(found, logprobs=[]) == replace(wanted, logprobs=[])
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)


def test_text_without_ids_is_tokenised_again_and_only_exact_rows_are_kept(
    tiny_target: Path, prompts: Any
) -> None:
    said: list[str] = []
    with Served(tiny_target, style="chat").running() as one:
        engine = engine_of(tiny_target, one, logprobs="none", say=said.append)
        written = engine.generate(prompts, Sampling(1.0), 12, 3)
        bare = ChatTemplate(Target.at(tiny_target).tokenizer).prompt_ids("def add(first", chat=False)
        assert engine.generate([prompts[0], bare], Sampling(0.0), 4, 0)[1].fault == "prompt_not_text"
        with pytest.raises(DataError, match="user message"):
            engine.generate([bare], Sampling(0.0), 4, 0)
    assert engine.way
    assert (engine.way.chat, engine.way.extras) == (True, False)
    for found, true in zip(written, own(tiny_target, prompts, Sampling(1.0), 12), strict=True):
        assert found.fault == "not_round_trip" or found.response_ids == true.response_ids
    assert "no token ids" in said[0]
    assert "OpenAI's keys only" in said[1]


FAULTS = {
    "500": "HTTP 500 (out of luck)",
    "429": "HTTP 429",
    "stall": "no answer within",
    "cut": "no connection (peer closed",
    "drop": "no connection",
    "html": "not JSON",
    "wrong": "no 'choices'",
    "endless": "without end",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_ends_in_complete_rows_and_a_lasting_one_in_one_clear_line(
    tiny_target: Path, served: Served, prompts: Any, fault: str
) -> None:
    stalls = fault == "stall"
    engine = engine_of(tiny_target, served, retries=20, timeout=1.0 if stalls else 20.0)
    engine.generate(prompts[:1], Sampling(0.7), 8, 3)  # finds its way before anything goes wrong
    served.faults[:] = [fault] * 2
    found = engine.generate(prompts, Sampling(0.7), 8, 3)
    assert not served.faults
    assert ids(found) == ids(own(tiny_target, prompts, Sampling(0.7), 8))
    engine = engine_of(tiny_target, served, retries=1, timeout=0.5 if stalls else 20.0)
    engine.generate(prompts[:1], Sampling(0.0), 8, 3)
    served.faults[:] = [fault] * 50
    with pytest.raises(TargetError) as caught:
        engine.generate(prompts, Sampling(0.0), 8, 3)
    assert FAULTS[fault] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert served.url in str(caught.value)


def test_nobody_at_the_address_is_one_line(tiny_target: Path, prompts: Any) -> None:
    with Served(tiny_target).running() as one:
        url = one.url
    with pytest.raises(TargetError, match=r"no connection.*asked 2 times"):
        engine_of(tiny_target, url, retries=1).generate(prompts, Sampling(0.0), 4, 0)


def test_a_server_that_comes_back_is_found_again(tiny_target: Path, prompts: Any) -> None:
    with Served(tiny_target).running() as one:
        port, engine = one.http.server_port, engine_of(tiny_target, one, retries=12)
        before = engine.generate(prompts, Sampling(0.7), 8, 3)
    found: list[list[Generation]] = []
    asking = threading.Thread(target=lambda: found.append(engine.generate(prompts, Sampling(0.7), 8, 3)))
    asking.start()
    time.sleep(0.3)
    assert not found, "nobody is there"
    with Served(tiny_target, port=port).running():
        asking.join(30)
    assert found == [before]


def test_several_servers_share_the_work_and_another_answers_for_a_dead_one(
    tiny_target: Path, prompts: Any
) -> None:
    with Served(tiny_target).running() as first:
        second = Served(tiny_target)
        with second.running():
            engine = engine_of(tiny_target, first, second, retries=1)
            whole = engine.generate(prompts * 2, Sampling(0.7), 8, 3)
            assert abs(len(first.asked) - len(second.asked)) <= 2
        assert engine.generate(prompts * 2, Sampling(0.7), 8, 3) == whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"model": "other"}, "no model 'other'; it serves target"), ({"url": "/v1"}, r"HTTP 404.*end in /v1")],
)
def test_a_wrong_model_or_address_is_told(
    tiny_target: Path, served: Served, prompts: Any, changes: dict[str, str], words: str
) -> None:
    url = served.url.removesuffix(changes.pop("url", ""))
    with pytest.raises(TargetError, match=words):
        engine_of(tiny_target, url, **changes).generate(prompts, Sampling(0.0), 4, 0)


@pytest.mark.parametrize("key", ["", "sk-wrong-and-secret"])
def test_a_refused_key_is_one_line_without_the_key(
    tiny_target: Path, prompts: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDRAFT_TEST_KEY", key)
    with Served(tiny_target, key="sk-right").running() as one:
        with pytest.raises(TargetError, match=r"HTTP 401.*FASTDRAFT_TEST_KEY") as caught:
            engine_of(tiny_target, one).generate(prompts, Sampling(0.0), 4, 0)
    assert "secret" not in str(caught.value)


def test_a_key_repeated_in_an_error_is_blotted_out(
    tiny_target: Path, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDRAFT_TEST_KEY", "luck")  # the fault's message holds this word
    with Served(tiny_target, key="luck").running() as one:
        engine = engine_of(tiny_target, one, retries=0)
        assert len(engine.generate(prompts, Sampling(0.0), 4, 0)) == len(prompts)
        one.faults[:] = ["500"] * 9
        with pytest.raises(TargetError, match=r"out of \*\*\*") as caught:
            engine.generate(prompts, Sampling(0.0), 4, 0)
    assert "luck" not in str(caught.value)


def test_logprobs_said_to_be_processed_are_put_to_the_proof(tiny_target: Path, prompts: Any) -> None:
    with Served(tiny_target, logprobs="raw").running() as one:
        for sampling in (Sampling(0.7), Sampling(1.0, 3)):
            with pytest.raises(TargetError, match="raw logits"):
                engine_of(tiny_target, one).generate(prompts, sampling, 4, 0)
        rows = engine_of(tiny_target, one).generate(prompts, Sampling(1.0), 4, 0)
        assert all(len(row.logprobs) == len(row.response_ids) for row in rows), (
            "at temperature 1 both are one"
        )
        engine = engine_of(tiny_target, one, logprobs="none")
        assert all(row.logprobs == [] for row in engine.generate(prompts, Sampling(0.7), 4, 0))
    with Served(tiny_target, logprobs="none").running() as one:
        with pytest.raises(TargetError, match="without log-probs"):
            engine_of(tiny_target, one).generate(prompts, Sampling(0.7), 4, 0)


def test_a_stop_cancels_what_is_under_way(tiny_target: Path, served: Served, prompts: Any) -> None:
    wish = threading.Event()

    def check() -> None:
        if wish.is_set():
            raise Interrupted("runs/x")

    engine = engine_of(tiny_target, served, check=check)
    engine.generate(prompts[:1], Sampling(0.0), 4, 0)
    served.faults[:] = ["stall"] * len(prompts)
    threading.Timer(0.3, wish.set).start()
    start = time.monotonic()
    with pytest.raises(Interrupted):
        engine.generate(prompts, Sampling(0.0), 4, 0)
    assert time.monotonic() - start < 10
    served.released.set()
    time.sleep(0.1)
    served.released.clear()


TALKS = (
    Conversation(("First?", "Second?", "Third?"), "Be brief."),
    Conversation(("What is a fox?", "And why?")),
    Conversation(("Stars?",), "Count."),
)


def converse(folder: Path, engine: Engine) -> tuple[list[Any], Any]:
    tokenizer = Target.at(folder).tokenizer
    chat = ChatTemplate(tokenizer)
    prompts = tuple(map(chat.prompt_ids, TALKS))
    row_filter = RowFilter(range(300, 320), lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))
    writer = UnitWriter(engine, engine, chat, range(300, 320), 40, 256)
    return keep_rows(writer.write(Unit("talks", 0.0, prompts, conversations=TALKS), 5), row_filter)


@pytest.mark.parametrize("takes_system", [True, False])
def test_a_chat_server_is_asked_every_turn_with_its_own_earlier_answers(
    tiny_target: Path, tmp_path: Path, takes_system: bool
) -> None:
    folder = shutil.copytree(tiny_target, tmp_path / "target")
    if takes_system:
        with_system = CHAT_TEMPLATE.replace("m['role']=='user'", "m['role'] in ('user', 'system')")
        (folder / "chat_template.jinja").write_text(with_system, encoding="utf-8")
    with Talking(folder, style="chat").running() as one:
        engine = engine_of(folder, one, logprobs="none", retries=20)
        rows, counts = converse(folder, engine)
        assert (rows, counts) == converse(folder, one)
        assert counts.written == 6
        longest = max((body.get("messages", []) for body in one.asked), key=len)
        users = [message["content"] for message in longest if message["role"] == "user"]
        assert users == ["First?" if takes_system else "Be brief.\n\nFirst?", "Second?", "Third?"]
        said = [one.tokenizer.decode(row.response_ids[:-1]) for row in rows]
        assert all(message["content"] in said for message in longest if message["role"] == "assistant")
        for fault in ("500", "cut", "wrong"):  # in the middle of a conversation changes no row
            one.faults[:] = [*[""] * 4, fault]
            assert converse(folder, engine) == (rows, counts)
            assert not one.faults
