"""What a late stage would stumble over is refused by `check`, and by `run` before its first stage."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import write_recipe
from fastdraft import cli
from fastdraft.data import corpora
from fastdraft.pipeline import run
from fastdraft.recipe.recipe import load_recipe
from fastdraft.stages import inputs

Capture = pytest.CaptureFixture[str]


def rewrite(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def of(folder: Path) -> None:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
        change(value)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")

    return of


def write_template(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text, encoding="utf-8") and None  # type: ignore[return-value]


def lose_the_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, folder / "model.safetensors")


def name_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": name, "template": "{{ messages }}"} for name in ("rag", "tool_use")]
    rewrite("tokenizer_config.json", lambda value: value.update(chat_template=named))(folder)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
TARGETS = [
    (write_template("{% for m in messages %}"), [], "chat template cannot render"),
    (write_template("{{ raise_exception('no') }}"), [], "chat template cannot render"),
    (name_templates, [], "chat templates rag, tool_use; one must be the default"),
    (lose_the_head, [], "no weights for lm_head.weight"),
    (lose_the_head, ["synthesize=null", "align=null", "evaluate.texts=target"], "no weights for lm_head"),
    (
        rewrite("config.json", lambda value: value.update(quantization_config=GPTQ)),
        [],
        "weights quantised by gptq",
    ),
]


@pytest.mark.parametrize(("damage", "overrides", "said"), TARGETS)
def test_a_target_of_no_use_is_refused_before_anything_is_trained(
    tmp_path: Path,
    tiny_target: Path,
    capsys: Capture,
    damage: Callable[[Path], None],
    overrides: list[str],
    said: str,
) -> None:
    target = tmp_path / "target"
    shutil.copytree(tiny_target, target)
    damage(target)
    recipe = str(write_recipe(tmp_path, target))
    for verb in ("check", "run"):
        assert cli.main([verb, recipe, *overrides]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def log_line(**changes: Any) -> dict[str, Any]:
    question = {"role": "user", "content": "Why?"}
    return {"messages": [question], "response": "So.", "temperature": 0, **changes}


DATA = [
    ("text.jsonl", [{"body": "x"}], [], "line 1: no 'text'; has body"),
    ("prompts.jsonl", [{"prompt": " "}, {"prompt": ""}], [], "no prompt that can be asked"),
    ("prompts.jsonl", [{"said": "x"}], [], "line 1: no 'prompt'; has said"),
    ("tasks.jsonl", [{"prompt": "a"}, {"prompt": ""}], [], "line 2: an empty prompt"),
    ("log.jsonl", [log_line(response=None)], ["log"], "no line of use"),
    ("log.jsonl", [log_line(temperature=None)], ["log"], "line 1: no temperature"),
]


@pytest.mark.parametrize(("name", "rows", "log", "said"), DATA)
def test_a_file_of_no_use_is_refused_before_anything_is_trained(
    tmp_path: Path,
    tiny_target: Path,
    capsys: Capture,
    name: str,
    rows: list[dict[str, Any]],
    log: list[str],
    said: str,
) -> None:
    recipe = str(write_recipe(tmp_path, tiny_target))
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = f"synthesize.prompts=[{{kind: transcripts, name: log, path: '{path}'}}]"
    for verb in ("check", "run"):
        assert cli.main([verb, recipe, *([source] if log else [])]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_finished_stages_inputs_are_not_looked_at_again(tmp_path: Path, tiny_target: Path) -> None:
    recipe = str(write_recipe(tmp_path, tiny_target))
    run(load_recipe(recipe), only=["design", "prepare"])
    (tmp_path / "text.jsonl").unlink()
    run(load_recipe(recipe), only=["design", "prepare", "pretrain"])


@pytest.mark.parametrize("silent", [True, False])
def test_a_hub_that_does_not_answer_is_told_and_holds_nobody_up(
    tmp_path: Path, tiny_target: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    never = threading.Event()

    def rows(source: Any) -> Iterator[dict[str, str]]:
        if silent:
            never.wait()
        raise corpora._unreachable("x/y", ConnectionError("no route"), 0) from ConnectionError("no route")

    monkeypatch.setattr(inputs, "HUB_SECONDS", 0.05)
    monkeypatch.setattr(corpora, "open_hub", rows)
    recipe = str(write_recipe(tmp_path, tiny_target))
    hub = "prepare.corpora[0]={kind: hub, name: text, dataset: x/y, tokens: 20k}"
    assert cli.main(["check", recipe, hub]) == 0
    assert "the hub does not answer): prepare.corpora[0]: x/y" in capsys.readouterr().out
    never.set()


BESIDE = [
    "prepare.corpora[0]={kind: jsonl, name: text, path: data/a.jsonl}",
    "prepare.corpora[0]={kind: jsonl, name: text, path: 'dat*/**/*.jsonl'}",
    "prepare.corpora[0]={kind: hub, name: text, dataset: data}",
    "synthesize.prompts[0]={kind: jsonl, name: p, path: data}",
    "synthesize.prompts[0]={kind: transcripts, name: p, path: data/a.jsonl}",
    "evaluate.tasks=[{kind: file, path: data/a.jsonl}]",
]


@pytest.mark.parametrize("override", BESIDE)
def test_a_path_that_lies_beside_the_recipe_and_not_here_says_so(
    tmp_path: Path, tiny_target: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "x", "prompt": "y"}\n')
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["check", str(write_recipe(tmp_path, tiny_target)), override]) == 2
    assert (
        f"lies beside the recipe; paths are relative to the working directory: run in {tmp_path}, or write"
        in capsys.readouterr().err
    )
