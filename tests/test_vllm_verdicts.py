"""`fastdraft check` names what each runtime would make of a recipe's pair, before anything is spent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import write_recipe, write_target
from fastdraft import cli
from fastdraft.commands import verdicts
from fastdraft.commands.verdicts import RuntimeVerdict, runtime_verdicts, verdict_table
from fastdraft.errors import MissingExtra, TargetError
from fastdraft.recipe.training import DesignConfig
from fastdraft.runtimes.vllm_runtime import check_shapes
from fastdraft.stages.design import DraftDesign, plan
from fastdraft.target import Target
from gguf_fixture import write_gguf

SHAPE = {"kind": "shape", "hidden_size": 64, "num_layers": 1, "intermediate_size": 64, "num_heads": 2}
HERE = ("require_openvino", "require_gguf", "require_llama_cpp")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every library, wherever the tests run."""
    monkeypatch.setenv("FASTDRAFT_CACHE", str(tmp_path / "cache"))
    for name in HERE:
        monkeypatch.setattr(verdicts, name, lambda: None)


def told(
    target: Target, change: Callable[[DraftDesign], DraftDesign] = lambda made: made
) -> dict[str, RuntimeVerdict]:
    found = runtime_verdicts(target, change(plan(DesignConfig(draft=SHAPE), target)))  # type: ignore[arg-type]
    return {each.runtime: each for each in found}


def test_a_plain_pair_works_in_all_four(tiny_target: Path) -> None:
    found = told(Target.at(tiny_target))
    assert [(name, each.verdict) for name, each in found.items()] == [
        (name, "works") for name in ("openvino", "llamacpp", "vllm", "transformers")
    ]


def test_each_rule_is_named_by_the_runtime_that_has_it(tiny_target: Path, tmp_path: Path) -> None:
    split = shutil.copytree(tiny_target, tmp_path / "split")
    state = json.loads((split / "tokenizer.json").read_text(encoding="utf-8"))
    state["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Punctuation"}, state["pre_tokenizer"]],
    }
    (split / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    bare = shutil.copytree(tiny_target, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    narrow = write_target(tmp_path / "narrow", hidden=16)
    cases = [
        (split, "llamacpp", "it splits texts in a way that llama.cpp has no name for"),
        (bare, "openvino", "no model.safetensors"),
        (bare, "transformers", "no model.safetensors"),
        (write_gguf(tmp_path / "t.gguf"), "vllm", "vLLM reads no GGUF file without a plugin"),
        (narrow, "vllm", "heads of 4 in the target; vLLM's attention wants a multiple of 8"),
    ]
    for path, runtime, words in cases:
        found = told(Target.at(path))
        refused = [name for name, each in found.items() if each.verdict == "refused"]
        assert runtime in refused
        assert refused in (["openvino", "transformers"], [runtime])
        assert words in found[runtime].why


def test_a_shorter_context_of_the_draft_is_refused_where_it_ends_in_an_error_or_in_silence(
    tiny_target: Path,
) -> None:
    found = told(
        Target.at(tiny_target), lambda made: replace(made, draft=replace(made.draft, context_length=128))
    )
    assert {name for name, each in found.items() if each.verdict == "refused"} == {"openvino", "vllm"}
    assert "context of the draft 128, of the target 256; the draft's must not be shorter" in found["vllm"].why
    assert "draft 128, target 256: the draft's context must not be shorter" in found["openvino"].why


def test_vllm_wants_equal_vocabularies_with_their_padding(tiny_target: Path) -> None:
    shape = Target.at(tiny_target).architecture
    with pytest.raises(
        TargetError, match=r"here: draft 300, target 320; vocab_size, padding included, must be equal"
    ):
        check_shapes(shape, replace(shape, vocab_size=300), "here")
    check_shapes(shape, replace(shape, family="qwen2", context_length=512), "here")


def test_what_is_missing_is_told_as_the_line_that_installs_it(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingExtra("xllamacpp", "llamacpp")

    monkeypatch.setattr(verdicts, "require_llama_cpp", missing)
    found = told(Target.at(tiny_target))["llamacpp"]
    assert (found.verdict, found.why) == (
        "install",
        "pip install 'fastdraft[llamacpp]' (xllamacpp is not here)",
    )


def test_check_prints_one_table_and_the_same_as_json(
    tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path, tiny_target))
    assert cli.main(["check", recipe]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = lines.index("runtime       verdict  why")
    assert [line.split()[0] for line in lines[head + 2 : head + 6]] == [
        "OpenVINO",
        "llama.cpp",
        "vLLM",
        "transformers",
    ]
    assert cli.main(["check", recipe, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)["runtimes"]
    assert [set(each) for each in value] == [{"runtime", "verdict", "why"}] * 4


def test_long_reasons_are_wrapped_to_the_terminal() -> None:
    text = verdict_table([RuntimeVerdict("vllm", "refused", "a reason of many words " * 8)])
    assert max(map(len, text.splitlines())) <= 79
    assert len(text.splitlines()) > 4
