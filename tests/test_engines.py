"""Which engine writes: what `auto` stands for, what the fingerprint says of it, what needs the target's
weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import write_recipe
from fastdraft import pipeline
from fastdraft.console import Console
from fastdraft.errors import FastDraftError, MissingExtra, TargetError
from fastdraft.recipe.recipe import Recipe, load_recipe
from fastdraft.recipe.run import TargetConfig
from fastdraft.recipe.synthesize import (
    TRANSPORT,
    AutoEngineConfig,
    HuggingFaceEngineConfig,
    OpenAIEngineConfig,
    OpenVINOEngineConfig,
    TopKLogitsConfig,
    TranscriptPrompts,
)
from fastdraft.run_folder import StageFolder, write_json
from fastdraft.runtimes import engines
from fastdraft.runtimes.engines import EngineChoice, choose_engine, describe_engine
from fastdraft.stages import synthesize
from fastdraft.target import Target


def missing() -> None:
    raise MissingExtra("nncf", "openvino")


@pytest.fixture(params=[True])
def installed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(engines, "require_openvino", (lambda: None) if request.param else missing)


with_openvino = pytest.mark.usefixtures("installed")
without_openvino = pytest.mark.parametrize("installed", [False], indirect=True, ids=["not installed"])


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    return StageFolder(tmp_path / "synthesize")


@pytest.fixture
def chosen(tiny_target: Path, folder: StageFolder) -> Any:
    """What is chosen for the target."""

    def choose(settings: Any = None, dtype: Any = "auto") -> EngineChoice:
        target = Target(TargetConfig(model=str(tiny_target), dtype=dtype))
        return choose_engine(settings or AutoEngineConfig(), target, "cpu", folder)

    return choose


def begin(folder: StageFolder, engine: dict[str, Any]) -> None:
    write_json(folder.path / "fingerprint.json", {"settings": {"engine": engine}})


@with_openvino
def test_auto_is_openvino_on_a_cpu_in_the_precision_that_the_recipe_names(chosen: Any) -> None:
    assert str(chosen()) == "openvino (int8, CPU): the fastest on a CPU"
    for dtype, weights in (("auto", "int8"), ("fp32", "fp32"), ("bf16", "fp16"), ("fp16", "fp16")):
        assert chosen(dtype=dtype).settings.weights == weights


@without_openvino
def test_without_openvino_auto_is_transformers_and_says_what_to_install(chosen: Any, installed: None) -> None:
    assert chosen().settings == HuggingFaceEngineConfig()
    assert "nncf is not installed" in chosen().reason
    assert "pip install 'fastdraft[openvino]'" in chosen().reason


@with_openvino
def test_auto_is_transformers_on_an_accelerator_and_for_a_family_that_is_not_converted(
    chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "unconverted_family", lambda target: "gemma2")
    assert chosen().settings == HuggingFaceEngineConfig()
    assert "gemma2 is not converted to OpenVINO" in chosen().reason
    monkeypatch.setattr(engines, "pick_device", lambda name: torch.device("cuda"))
    assert chosen().reason == "the target runs on cuda"


@with_openvino
def test_the_engine_that_the_recipe_names_is_taken_and_auto_goes_on_with_the_one_that_began(
    chosen: Any, folder: StageFolder
) -> None:
    named = OpenVINOEngineConfig(weights="int4")
    assert chosen(named).settings == named
    for began in (HuggingFaceEngineConfig(), named):
        begin(folder, describe_engine(began))
        assert chosen().settings == began
    begin(folder, describe_engine(served()))
    assert chosen().settings == OpenVINOEngineConfig(), "left to the fingerprint"


@without_openvino
def test_text_begun_by_openvino_is_refused_where_it_is_missing_and_taken_when_finished(
    chosen: Any, folder: StageFolder, installed: None
) -> None:
    begin(folder, {"kind": "openvino"})
    with pytest.raises(MissingExtra):
        chosen()
    folder.complete()
    assert chosen().settings == OpenVINOEngineConfig()


def served(*servers: str, **changes: Any) -> OpenAIEngineConfig:
    return OpenAIEngineConfig(kind="openai", servers=list(servers) or ["http://127.0.0.1:1/v1"], **changes)


@pytest.fixture
def recipe(tmp_path: Path, tiny_target: Path) -> Recipe:
    """One source of prompts and no other stage, so that a run is synthesize alone."""
    path = write_recipe(tmp_path, tiny_target)
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    section = value["synthesize"] | {"tokens": 600, "batch_rows": 8, "engine": {"kind": "auto"}}
    section["prompts"] = [prompt for prompt in section["prompts"] if prompt["kind"] == "jsonl"]
    kept = {name: value[name] for name in ("run", "target")} | {"synthesize": section}
    path.write_text(yaml.safe_dump(kept), encoding="utf-8")
    return load_recipe(str(path))


def fingerprint(recipe: Recipe, **changes: Any) -> dict[str, Any]:
    assert recipe.synthesize
    context = pipeline.make_context(recipe, Console(quiet=True))
    return synthesize.fingerprint(recipe.synthesize.model_copy(update=changes), context)


@with_openvino
def test_the_fingerprint_names_the_engine_that_really_writes(recipe: Recipe) -> None:
    assert fingerprint(recipe) == fingerprint(recipe, engine=OpenVINOEngineConfig())
    assert fingerprint(recipe) != fingerprint(recipe, engine=HuggingFaceEngineConfig())


def test_a_servers_fingerprint_holds_neither_transport_nor_weights(recipe: Recipe) -> None:
    one = fingerprint(recipe, engine=served("http://127.0.0.1:1/v1"))
    transport: Any = {"concurrency": 3, "retries": 0, "timeout": 1.0, "api_key_env": "KEY"}
    assert one == fingerprint(recipe, engine=served("http://127.0.0.1:2/v1", **transport))
    assert TRANSPORT.isdisjoint(one["settings"]["engine"])
    assert "model.safetensors" not in one["target"]["files"]
    assert "model.safetensors" in fingerprint(recipe, engine=served(logprobs="target"))["target"]["files"]


def test_stored_logits_need_the_weights_whoever_writes(recipe: Recipe, tmp_path: Path) -> None:
    changes = {"engine": served(), "logits": TopKLogitsConfig(kind="top_k", k=8)}
    assert "model.safetensors" in fingerprint(recipe, **changes)["target"]["files"]
    ignored = shutil.ignore_patterns("*.safetensors")
    bare = shutil.copytree(recipe.target.model, tmp_path / "bare", ignore=ignored)
    moved = recipe.model_copy(update={"target": recipe.target.model_copy(update={"model": str(bare)})})
    assert fingerprint(moved, engine=served())["target"]["dtype"] is None
    with pytest.raises(TargetError, match=r"safetensors.*synthesize\.logits: top_k scores.*kind: none"):
        fingerprint(moved, **changes)


def test_where_only_logs_are_taken_no_engine_is_named(recipe: Recipe, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"prompt": "x", "response": "y", "temperature": 0}\n', encoding="utf-8")
    logs = {"prompts": [TranscriptPrompts(kind="transcripts", name="log", path=str(log))]}
    found = fingerprint(recipe, **logs)
    assert found["settings"]["engine"] == {"kind": "none"}
    assert found["target"]["dtype"] is None


@with_openvino
def test_the_converted_target_is_kept_until_the_last_stage_that_reads_it_is_complete(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def convert(target: Target, folder: Path, weights: str) -> None:
        made.append(folder)
        folder.mkdir(parents=True)

    def transformers(exported: Path, vocabulary: Any, *arguments: Any, **options: Any) -> Any:
        assert exported.is_dir()
        return engines.HuggingFaceEngine(Target(recipe.target).model("cpu"), vocabulary)

    monkeypatch.setattr(engines, "device_properties", lambda *arguments: {})
    monkeypatch.setattr(engines, "export_openvino", convert)
    monkeypatch.setattr(engines, "OpenVINOEngine", transformers)
    console = Console(quiet=True)
    console.stop.requested = True
    with pytest.raises(FastDraftError, match="stopped"):
        pipeline.run(recipe, console)
    done = pipeline.run(recipe).folder("synthesize")
    assert (len(made), done.manifest()["engine"]) == (1, "openvino")
    assert not made[0].exists()
