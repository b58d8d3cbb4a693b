"""`fastdraft check --contact`: servers are asked by the user's word only, and what they serve is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("httpx")

from conftest import write_recipe
from fastdraft.commands import check
from fastdraft.console import Console
from fastdraft.errors import RecipeError, TargetError
from fastdraft.recipe.recipe import Recipe, load_recipe
from serving import Served


@pytest.fixture(scope="module")
def served(tiny_target: Path) -> Iterator[Served]:
    with Served(tiny_target).running() as one:
        yield one


@pytest.fixture
def pair(tmp_path: Path, tiny_target: Path) -> tuple[Path, Path]:
    """A folder to write into, and the target."""
    return tmp_path, tiny_target


def recipe_for(folder: Path, target: Path, *urls: str, **engine: Any) -> Recipe:
    path = write_recipe(folder, target)
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    prompts = [prompt for prompt in value["synthesize"]["prompts"] if prompt["kind"] == "jsonl"]
    settings = (
        {"kind": "openai", "servers": list(urls), "timeout": 20.0, **engine}
        if urls
        else {"kind": "huggingface"}
    )
    value["synthesize"] |= {"prompts": prompts, "engine": settings, "temperatures": [0, 1.0]}
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return load_recipe(str(path))


def contacts(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    check.run(recipe, Console(), as_json=True, contact=True)
    return list(json.loads(capsys.readouterr().out)["servers"])


def test_nobody_is_asked_without_the_users_word(
    served: Served, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = len(served.asked)
    check.run(recipe_for(tmp_path, tiny_target, "http://127.0.0.1:9/v1"), Console())
    check.run(recipe_for(tmp_path, tiny_target, served.url), Console())
    assert len(served.asked) == asked
    assert "--contact asks it" in capsys.readouterr().out


def test_a_server_is_told_as_it_is(
    served: Served, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = contacts(recipe_for(tmp_path, tiny_target, served.url, logprobs="processed"), capsys)[0]
    assert found.pop("seconds") >= 0
    assert found == {
        "server": served.url,
        "model": "target",
        "context_length": 256,
        "prompts": "token ids to /completions",
        "token_ids": True,
        "logprobs": "processed",
        "prompt_logprobs": True,
    }
    assert all(body["max_tokens"] == 1 for body in served.asked)


@pytest.mark.parametrize(
    ("style", "logprobs", "prompts"),
    [
        ("full", "raw", "token ids to /completions"),
        ("plain", "none", "text to /completions, OpenAI keys only"),
        ("chat", "processed", "messages to /chat/completions, OpenAI keys only"),
    ],
)
def test_what_a_server_lacks_is_told(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], style: str, logprobs: str, prompts: str
) -> None:
    folder, target = pair
    with Served(target, style=style, logprobs=logprobs).running() as one:
        found = contacts(recipe_for(folder, target, one.url), capsys)[0]
    assert (found["prompts"], found["logprobs"], found["token_ids"]) == (prompts, logprobs, style == "full")
    assert (found["context_length"], found["prompt_logprobs"]) == (
        (256, True) if style == "full" else (None, False)
    )


def test_every_server_is_named_within_80_columns_and_all_ends_in_one_line_for_one_that_is_no_use(
    served: Served, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Served(tiny_target).running() as gone:
        dead = gone.url
    served.context_length = 128
    try:
        with pytest.raises(TargetError, match="no connection") as caught:
            check.run(recipe_for(tmp_path, tiny_target, served.url, dead), Console(), contact=True)
    finally:
        served.context_length = 256
    out = capsys.readouterr().out
    assert f"{served.url}: serves target, context 128; takes token ids to /completions" in " ".join(
        out.split()
    )
    assert f"{dead}: no connection" in " ".join(out.split())
    assert max(len(line) for line in out.splitlines() if line.startswith(("http", "  "))) < 80
    assert f"{served.url} serves 128 of the target's 256 positions" in out
    assert "everything that can be checked here fits" not in out
    assert "\n" not in str(caught.value)


def test_logprobs_that_are_not_what_the_recipe_says_are_refused(tiny_target: Path, tmp_path: Path) -> None:
    with (
        Served(tiny_target, logprobs="raw").running() as one,
        pytest.raises(TargetError, match="log-probs are raw"),
    ):
        check.run(
            recipe_for(tmp_path, tiny_target, one.url, logprobs="processed"),
            Console(quiet=True),
            contact=True,
        )


def test_logprobs_of_the_sampled_distribution_serve_as_raw_ones(
    served: Served, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        contacts(recipe_for(tmp_path, tiny_target, served.url, logprobs="raw"), capsys)[0]["logprobs"]
        == "processed"
    )


def test_a_recipe_without_servers_has_nobody_to_ask(tiny_target: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="only engine"):
        check.run(recipe_for(tmp_path, tiny_target), Console(quiet=True), contact=True)
