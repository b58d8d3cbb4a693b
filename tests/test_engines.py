"""Which engine writes: what `auto` stands for, what the fingerprint and the manifest say, what happens when it cannot."""

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
from fastdraft.data.rows import unit_paths
from fastdraft.errors import FastDraftError, Interrupted, MissingExtra, TargetError
from fastdraft.modeling import drafts
from fastdraft.modeling.families import MULTIMODAL, TARGET_FAMILIES
from fastdraft.recipe.data import (
    TRANSPORT,
    AutoEngineConfig,
    HuggingFaceEngineConfig,
    OpenAIEngineConfig,
    OpenVINOEngineConfig,
    TopKLogitsConfig,
    TranscriptPrompts,
)
from fastdraft.recipe.recipe import Recipe, load_recipe
from fastdraft.run_folder import StageFolder, read_json, write_json
from fastdraft.runtimes import engines, openvino_export
from fastdraft.runtimes.engines import Engines, choose_engine, uses_weights
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

PARTS = ("qwen2_vl_text", "qwen2_5_vl_text")
"""Families that only stand inside others."""


def missing() -> None:
    raise MissingExtra("nncf", "openvino")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "require_openvino", lambda: None)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "require_openvino", missing)


def recipe_of(folder: Path, target: Path, **changes: Any) -> Recipe:
    """One source of prompts and no other stage, so that a run is synthesize alone."""
    path = write_recipe(folder, target)
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    prompts = [prompt for prompt in value["synthesize"]["prompts"] if prompt["kind"] == "jsonl"]
    section = {
        **value["synthesize"],
        "tokens": 600,
        "batch_rows": 8,
        "max_new_tokens": 16,
        "engine": {"kind": "auto"},
        "prompts": prompts,
    }
    path.write_text(
        yaml.safe_dump({name: value[name] for name in ("run", "target")} | {"synthesize": section | changes}),
        encoding="utf-8",
    )
    return load_recipe(str(path))


def context_of(recipe: Recipe, console: Console | None = None) -> StageContext:
    return pipeline.make_context(recipe, console or Console(quiet=True))


def begin(context: StageContext, engine: dict[str, Any], complete: bool = False) -> StageFolder:
    artifact = context.folder("synthesize")
    write_json(artifact.path / "fingerprint.json", {"settings": {"engine": engine}})
    if complete:
        artifact.complete()
    return artifact


@pytest.fixture
def recipe(tmp_path: Path, tiny_target: Path) -> Recipe:
    return recipe_of(tmp_path, tiny_target)


@pytest.mark.usefixtures("installed")
def test_auto_is_openvino_on_a_cpu(recipe: Recipe) -> None:
    choice = choose_engine(AutoEngineConfig(), context_of(recipe))
    assert choice.settings == OpenVINOEngineConfig()
    assert str(choice) == "openvino (int8, CPU): the fastest on a CPU"


@pytest.mark.usefixtures("not_installed")
def test_without_openvino_auto_is_transformers_and_says_what_to_install(recipe: Recipe) -> None:
    choice = choose_engine(AutoEngineConfig(), context_of(recipe))
    assert choice.settings == HuggingFaceEngineConfig()
    assert "nncf is not installed" in choice.reason
    assert "pip install 'fastdraft[openvino]'" in choice.reason


@pytest.mark.usefixtures("installed")
def test_auto_is_transformers_for_a_family_that_is_not_converted(
    recipe: Recipe, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_export, "text_family", lambda *_: "gemma2")
    choice = choose_engine(AutoEngineConfig(), context_of(recipe))
    assert choice.settings == HuggingFaceEngineConfig()
    assert "gemma2 is not converted to OpenVINO: its attention scores are capped" in choice.reason


def test_openvino_for_a_family_that_is_not_converted_is_refused_before_any_work(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "gemma2", "vocab_size": 320})
    with pytest.raises(
        TargetError,
        match="family gemma2: its attention scores are capped, which OpenVINO's attention leaves out",
    ):
        openvino_export.require_convertible(Target.at(tmp_path))
    write_json(
        tmp_path / "config.json",
        {"model_type": "llava", "text_config": {"model_type": "gemma2", "vocab_size": 320}},
    )
    with pytest.raises(TargetError, match="family gemma2"):
        openvino_export.require_convertible(Target.at(tmp_path))
    write_json(
        tmp_path / "config.json",
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "vocab_size": 320}},
    )
    openvino_export.require_convertible(Target.at(tmp_path))


def test_on_an_accelerator_auto_is_transformers(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "pick_device", lambda name: torch.device("cuda"))
    assert choose_engine(AutoEngineConfig(), context_of(recipe)).settings == HuggingFaceEngineConfig()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("dtype", "weights", "precision"),
    [("fp32", "fp32", "exact"), ("bf16", "fp16", "fast"), ("fp16", "fp16", "fast")],
)
def test_a_precision_that_the_recipe_names_is_kept(
    recipe: Recipe, dtype: str, weights: str, precision: str
) -> None:
    named = recipe.model_copy(update={"target": recipe.target.model_copy(update={"dtype": dtype})})
    chosen = choose_engine(AutoEngineConfig(), context_of(named)).settings
    assert isinstance(chosen, OpenVINOEngineConfig)
    assert (chosen.weights, chosen.precision) == (weights, precision)


@pytest.mark.usefixtures("installed")
def test_the_engine_that_the_recipe_names_is_taken(recipe: Recipe) -> None:
    for settings in (HuggingFaceEngineConfig(), OpenVINOEngineConfig(weights="int4")):
        choice = choose_engine(settings, context_of(recipe))
        assert (choice.settings, choice.by_recipe) == (settings, True)


@pytest.mark.usefixtures("installed")
def test_the_fingerprint_names_the_engine_that_really_writes(recipe: Recipe) -> None:
    stage = next(stage for stage in pipeline.STAGES if stage.name == "synthesize")
    assert recipe.synthesize
    explicit = recipe.synthesize.model_copy(update={"engine": OpenVINOEngineConfig()})
    assert stage.fingerprint(recipe.synthesize, context_of(recipe)) == stage.fingerprint(
        explicit, context_of(recipe)
    )
    other = recipe.synthesize.model_copy(update={"engine": HuggingFaceEngineConfig()})
    assert stage.fingerprint(recipe.synthesize, context_of(recipe)) != stage.fingerprint(
        other, context_of(recipe)
    )


def served(*servers: str, **changes: Any) -> OpenAIEngineConfig:
    return OpenAIEngineConfig(kind="openai", servers=list(servers) or ["http://127.0.0.1:1/v1"], **changes)


def test_only_a_server_does_without_the_targets_weights() -> None:
    assert all(
        map(
            uses_weights,
            (
                AutoEngineConfig(),
                HuggingFaceEngineConfig(),
                OpenVINOEngineConfig(),
                served(logprobs="target"),
            ),
        )
    )
    assert not any(uses_weights(served(logprobs=kind)) for kind in ("processed", "raw", "none"))


def fingerprint(recipe: Recipe, **changes: Any) -> dict[str, Any]:
    stage = next(stage for stage in pipeline.STAGES if stage.name == "synthesize")
    assert recipe.synthesize
    return stage.fingerprint(recipe.synthesize.model_copy(update=changes), context_of(recipe))


def test_a_servers_fingerprint_holds_neither_transport_nor_weights(recipe: Recipe) -> None:
    one = fingerprint(recipe, engine=served("http://127.0.0.1:1/v1"))
    assert one == fingerprint(
        recipe,
        engine=served("http://127.0.0.1:2/v1", concurrency=3, retries=0, timeout=1.0, api_key_env="KEY"),
    )
    assert one["settings"]["engine"]["kind"] == "openai"
    assert TRANSPORT.isdisjoint(one["settings"]["engine"])
    assert "model.safetensors" not in one["target"]["files"]
    scored = fingerprint(recipe, engine=served(logprobs="target"))
    assert "model.safetensors" in scored["target"]["files"]
    assert one != scored


def test_stored_logits_need_the_weights_whoever_writes(recipe: Recipe, tmp_path: Path) -> None:
    changes = {"engine": served(), "logits": TopKLogitsConfig(k=8)}
    assert "model.safetensors" in fingerprint(recipe, **changes)["target"]["files"]
    bare = Path(
        shutil.copytree(
            recipe.target.location, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")
        )
    )
    moved = recipe.model_copy(update={"target": recipe.target.model_copy(update={"model": str(bare)})})
    assert fingerprint(moved, engine=served())["target"]["dtype"] is None
    with pytest.raises(
        TargetError, match=r"no model\.safetensors: synthesize\.logits: top_k scores.*kind: none"
    ) as caught:
        fingerprint(moved, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("installed")
def test_where_only_logs_are_taken_no_engine_is_named(recipe: Recipe, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"prompt": "x", "response": "y", "temperature": 0}\n', encoding="utf-8")
    logs = {"prompts": [TranscriptPrompts(kind="transcripts", name="log", path=str(log))]}
    found = fingerprint(recipe, **logs)
    assert found["settings"]["engine"] == {"kind": "none"}
    assert found["target"]["dtype"] is None
    assert found == fingerprint(recipe, **logs, engine=HuggingFaceEngineConfig())


@pytest.mark.usefixtures("installed")
def test_auto_does_not_take_over_what_a_server_began(recipe: Recipe) -> None:
    context = context_of(recipe)
    artifact = begin(context, served().model_dump(mode="json", exclude=set(TRANSPORT)))
    assert choose_engine(AutoEngineConfig(), context).settings == OpenVINOEngineConfig()
    with pytest.raises(FastDraftError, match=r"settings\.engine\.kind \(openai -> openvino\)"):
        artifact.begin(
            {
                "settings": {
                    "engine": choose_engine(AutoEngineConfig(), context).settings.model_dump(mode="json")
                }
            }
        )


@pytest.mark.usefixtures("installed")
def test_auto_goes_on_with_the_engine_that_began(recipe: Recipe) -> None:
    context = context_of(recipe)
    begin(context, {"kind": "huggingface"})
    assert choose_engine(AutoEngineConfig(), context).settings == HuggingFaceEngineConfig()
    begin(context, {"kind": "openvino", "weights": "int4"})
    assert choose_engine(AutoEngineConfig(), context).settings == OpenVINOEngineConfig(weights="int4")


@pytest.mark.usefixtures("not_installed")
def test_text_begun_by_openvino_is_refused_where_it_is_missing_and_taken_when_finished(
    recipe: Recipe,
) -> None:
    context = context_of(recipe)
    begin(context, {"kind": "openvino"})
    with pytest.raises(
        FastDraftError,
        match=r"settings\.engine\.kind \(openvino -> huggingface, for nncf.*pip install.*--redo synthesize",
    ):
        choose_engine(AutoEngineConfig(), context)
    begin(context, {"kind": "openvino"}, complete=True)
    assert choose_engine(AutoEngineConfig(), context).settings == OpenVINOEngineConfig()


@pytest.mark.usefixtures("installed")
def test_an_engine_of_another_release_is_left_to_the_fingerprint(recipe: Recipe) -> None:
    context = context_of(recipe)
    artifact = begin(context, {"kind": "something"})
    assert choose_engine(AutoEngineConfig(), context).settings == OpenVINOEngineConfig()
    assert recipe.synthesize
    with pytest.raises(FastDraftError, match=r"settings\.engine\.kind \(something -> openvino\)"):
        artifact.begin(
            {
                "settings": {
                    "engine": choose_engine(AutoEngineConfig(), context).settings.model_dump(mode="json")
                }
            }
        )


def refuse_to_convert(*arguments: object, **options: object) -> None:
    raise TargetError("target", "no such operator", "must convert to OpenVINO", "try another model")


@pytest.mark.usefixtures("installed")
def test_a_target_that_cannot_be_converted_is_written_by_transformers_and_stays_so(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "_open_openvino", refuse_to_convert)
    artifact = pipeline.run(recipe, Console()).folder("synthesize")
    assert "no such operator" in capsys.readouterr().err
    assert artifact.manifest()["engine"] == "huggingface"
    assert artifact.stored_fingerprint()["settings"]["engine"] == {"kind": "huggingface"}
    rows = {path.name: path.read_bytes() for path in unit_paths(artifact)}
    (artifact.path / "manifest.json").unlink()
    unit_paths(artifact)[-1].unlink()
    pipeline.run(recipe)
    assert {path.name: path.read_bytes() for path in unit_paths(artifact)} == rows


@pytest.mark.usefixtures("installed")
def test_under_a_named_engine_a_failed_conversion_is_an_error(
    tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_open_openvino", refuse_to_convert)
    with pytest.raises(TargetError, match="must convert to OpenVINO"):
        pipeline.run(recipe_of(tmp_path, tiny_target, engine={"kind": "openvino"}))


def convert_and_write(
    settings: OpenVINOEngineConfig, context: StageContext, *arguments: Any, **options: Any
) -> Engines:
    """As `_open_openvino` leaves the disk, without OpenVINO."""
    copy = context.folder("synthesize").path / "converted" / settings.weights
    copy.mkdir(parents=True, exist_ok=True)
    (copy / "openvino_model.bin").write_bytes(b"weights")
    return engines.open_engines(HuggingFaceEngineConfig(), context, *arguments, **options)


@pytest.mark.usefixtures("installed")
def test_the_converted_target_is_kept_until_the_stage_is_complete(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_open_openvino", convert_and_write)
    console = Console(quiet=True)
    context = context_of(recipe, console)
    stage, artifact = (
        next(stage for stage in pipeline.STAGES if stage.name == "synthesize"),
        context.folder("synthesize"),
    )
    assert recipe.synthesize
    artifact.begin(stage.fingerprint(recipe.synthesize, context))
    console.stop.requested = True
    with pytest.raises(Interrupted):
        stage.run(recipe.synthesize, context)
    assert (artifact.path / "converted" / "int8" / "openvino_model.bin").is_file()
    assert pipeline.run(recipe).folder("synthesize").manifest()["engine"] == "openvino"
    assert not (artifact.path / "converted").exists()
    assert read_json(artifact.path / "fingerprint.json")["settings"]["engine"]["kind"] == "openvino"


def test_every_supported_family_can_be_converted() -> None:
    pytest.importorskip("openvino_genai")
    pytest.importorskip("optimum.intel")
    import optimum.exporters.openvino.model_configs  # noqa: F401 - enters the families that OpenVINO's exporter knows
    from optimum.exporters.tasks import TasksManager

    for family in set(TARGET_FAMILIES) - {*openvino_export.NOT_CONVERTED, *PARTS, *MULTIMODAL}:
        tasks = TasksManager.get_supported_tasks_for_model_type(
            family, exporter="openvino", library_name="transformers"
        )
        assert "text-generation-with-past" in tasks, family
