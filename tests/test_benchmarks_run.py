"""Each benchmark's dry run on a machine that has torch and transformers only, and what the scripts share."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdraft.recipe.recipe import load_recipe
from fastdraft.target import Target

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
BARE = """
import builtins, runpy, sys
for name in ("pydantic", "pyarrow", "jinja2", "matplotlib", "openvino", "datasets", "accelerate"):
    sys.modules[name] = None  # as if not installed
allowed = {*sys.stdlib_module_names, "torch", "transformers", "numpy", "safetensors", "tokenizers", "triton"}
# The library of the hub, which transformers needs, brings filelock.
allowed |= {"fastdraft", "machine", "pair", "stepping", "filelock"}
known = builtins.__import__

def bare(name, globals=None, locals=None, fromlist=(), level=0):
    # What transformers itself needs is there (yaml, httpx), but not for us to lean on.
    file = ((globals or {}).get("__file__") or "").replace(chr(92), "/")
    ours = "/benchmarks/" in file or "/src/fastdraft/" in file
    if ours and level == 0 and name.partition(".")[0] not in allowed:
        raise ImportError(f"a bare machine has no {name}, which {file} imports")
    return known(name, globals, locals, fromlist, level)

builtins.__import__ = bare
run_name, sys.argv = sys.argv[1], sys.argv[2:]
for path in sys.argv if run_name != "__main__" else sys.argv[:1]:
    runpy.run_path(path, run_name=run_name)
"""
PLAIN = "import runpy, sys; sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
STEP = """import torch
from stepping.contenders import SHAPES, Setting, our_step
for name in ('ours', 'ours_modules'):
    _, step, batches = our_step(Setting(name, SHAPES['tiny'], torch.device('cpu'), 64, 1))
    step.gradients(batches)
    step.update(1.0)
import yaml
"""
FORM = {"schema", "benchmark", "date", "command", "dry_run", "machine", "settings", "complete", "results"}
PROMISED = {
    "loss_functions": "vocabulary contender peak_bytes seconds times_faster_than_plain gradient_difference",
    "decoder_against_assisted": "contender temperature rounds tokens_per_second times_faster_than prompts",
    "replay_against_exact": "temperature block_efficiency_exact block_efficiency_replay replay_seconds",
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def run_bare(folder: Path, *arguments: object, code: str = BARE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", PROMISED)
def test_a_dry_run_writes_what_is_promised(name: str, tmp_path: Path) -> None:
    script, output = FOLDER / f"{name}.py", tmp_path / "found.json"
    words = ["__main__", script, "--dry-run", "--threads", 1, "--output", output]
    done = run_bare(tmp_path, *words, code=BARE if name != "replay_against_exact" else PLAIN)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    assert set(found) >= FORM
    assert (found["schema"], found["benchmark"], found["dry_run"], found["complete"]) == (1, name, True, True)
    assert found["results"]
    assert all(set(result) >= set(PROMISED[name].split()) for result in found["results"])
    assert found["command"].startswith(f"python benchmarks/{name}.py --dry-run")
    assert str(tmp_path) not in json.dumps(found)


def test_the_slow_scripts_of_a_bare_machine_lean_on_torch_and_transformers_alone(tmp_path: Path) -> None:
    """Those whose dry run takes too long: what they import, and what is imported when a step is taken."""
    step = tmp_path / "benchmarks" / "step.py"
    step.parent.mkdir()
    step.write_text(STEP, encoding="utf-8")
    scripts = [FOLDER / f"{name}.py" for name in ("on_a_gpu", "step_memory", "train_step")]
    last = run_bare(tmp_path, "imported", *scripts, step).stderr.splitlines()[-1]
    assert last.startswith("ImportError: a bare machine has no yaml"), last  # and nothing before it


def test_the_scripts_that_need_the_package_find_all_that_they_import(load: Any) -> None:
    names = ("prepare_throughput", "loader_throughput", "generate_throughput", "openvino_agreement")
    names += (
        "losses_compared",
        "starts_compared",
        "fine_tune",
        "draft_temperature",
        "served_target",
        "llamacpp_agreement",
    )
    names += ("real_models",)
    for name in names:
        assert load(name).main


def test_the_recipe_of_a_served_target_is_valid(load: Any, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    given = {"target": tmp_path / "target", "server": "http://x/v1", "logprobs": "raw"}
    load("served_target").Check(argparse.Namespace(**given, tokens=10, max_new_tokens=8), tmp_path)
    assert load_recipe(str(tmp_path / "recipe.yaml")).evaluate is not None


def test_a_fine_tune_learns_signatures_with_docstrings_of_what_is_public(load: Any) -> None:
    words = "What is done, in one sentence that is long enough."
    long = f"{words}\n\n{'Left out. ' * 60}"
    source = f"""
def first(a, *, b=1):
    {words!r}
def _hidden():
    {words!r}
def short():
    "Too short."
class Thing(Base):
    {words!r}
    def part(self):
        {long!r}
"""
    assert dict(load("fine_tune").documented(ast.parse(source), "m")) == {
        "m.first": f"m.first(a, *, b=1)\n\n{words}",
        "m.Thing": f"class m.Thing(Base)\n\n{words}",
        "m.Thing.part": f"m.Thing.part(self)\n\n{words}",
    }


def test_the_functions_to_rewrite_are_whole_and_as_many_on_every_python(load: Any) -> None:
    prompts = load("rewrite_task").prompts()
    assert len({prompt["id"] for prompt in prompts}) == len(prompts) == 24
    for prompt in prompts:
        [code] = re.findall(r"```python\n(.*)\n```$", prompt["prompt"], re.DOTALL)
        assert code.startswith("def ")
        compile(code, prompt["id"], "exec")


def test_the_table_of_real_models_adds_tokens_passes_and_seconds(load: Any) -> None:
    def answer(task: str, contender: str, tokens: int, seconds: float, passes: int) -> dict[str, Any]:
        what = {"runtime": "llamacpp", "task": task, "contender": contender, "ids": [7] * tokens}
        return {**what, "seconds": seconds, "passes": passes}

    results = [answer("code", "alone", 9, 4.0, 8), answer("code", "alone", 3, 2.0, 2)]
    results += [answer("code", "ours", 9, 2.0, 4), answer("code", "ours", 1, 0.5, 0)]
    results += [answer("text", "alone", 5, 2.5, 4), answer("text", "ours", 5, 2.5, 2)]
    alone, ours = load("real_models").show(results).splitlines()[2:]
    # Tokens behind the prompt's pass over passes; seconds; seconds per token alone over seconds per token so.
    assert (
        re.sub(" {3,}", "  ", alone)
        == "llamacpp: alone  1.00  6.0 s  1.00x  1.00  2.5 s  1.00x  1.00  8.5 s  1.00x"
    )
    assert (
        re.sub(" {3,}", "  ", ours)
        == "llamacpp: ours  2.00  2.5 s  2.00x  2.00  2.5 s  1.00x  2.00  5.0 s  1.50x"
    )


def test_llama_cpp_and_a_replay_are_compared_text_by_text(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    from gguf_fixture import write_gguf  # needs the library gguf

    monkeypatch.setenv("FASTDRAFT_CACHE", str(tmp_path / "cache"))
    script, files = load("llamacpp_agreement"), [tmp_path / "t.gguf", tmp_path / "d.gguf"]
    target, draft = (
        Target.at(write_gguf(path, noise=noise)) for path, noise in zip(files, (0, 0.02), strict=True)
    )
    given = argparse.Namespace(k=2, max_new_tokens=12, dry_run=False)
    report = load("machine").Report(tmp_path / "r.json", "x", "cpu", given)
    runtime = script.LlamaCppRuntime(threads=1, eos_ids=target.vocabulary.eos_token_ids)
    pair, prompts = runtime.open(*files), [("a", [70, 71, 72])]
    for temperature in (0.0, 0.8):
        script.compare(pair, draft.model("cpu"), target, prompts, temperature, given, report)
    pair.close()
    for found, temperature in zip(report.results, (0.0, 0.8), strict=True):
        assert (found["temperature"], found["texts"], found["equal_texts"]) == (temperature, 1, 1)
        assert (found["equal_counts"], found["differences"]) == (found["counted_texts"], [])
        assert found["llamacpp"] == found["replay"]
    assert sum(found["llamacpp"]["accepted"] for found in report.results)


def test_losses_are_followed_step_by_step_and_stand_as_far_as_they_came(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow = load("stepping.follow")
    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(follow, "EVERY", 2)
    cpu = torch.device("cpu")
    follow.follow("tiny", cpu, 3, 64, lambda found: kept.append(json.loads(json.dumps(found))))
    assert [(found["steps"], found["steps_wanted"]) for found in kept] == [(2, 3), (3, 3)]
    assert {len(losses) for losses in kept[0]["losses"].values()} == {2}
    assert kept[-1]["within_noise"]
    assert kept[-1]["bf16_noise"]["mean"] > 0


def test_a_device_further_from_the_cpu_than_twice_the_noise_does_not_follow_it(load: Any) -> None:
    compare = load("stepping.follow").compare
    losses = {"cpu_fp32": [2.0, 1.0], "cpu_bf16": [2.01, 0.99], "device_bf16": [1.985, 1.015]}
    assert compare(losses)["within_noise"]
    assert not compare({**losses, "device_bf16": [2.0, 1.05]})["within_noise"]


def test_committed_results_say_when_and_where_and_tell_no_folder() -> None:
    paths = sorted((FOLDER / "results").glob("*.json"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"]), path.name
        assert found["machine"], path.name
        assert found["command"].startswith("python benchmarks/"), path.name
        assert not found.get("dry_run"), path.name
        assert not re.search(r'[" =](/|[A-Z]:\\\\)\w', text), path.name


def test_every_script_stands_in_the_list() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in FOLDER.glob("*.py") if path.name not in text]


def test_a_result_file_stands_after_every_figure_and_keeps_the_best_known_one(
    load: Any, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    given = argparse.Namespace(draft=tmp_path / "deep" / "draft", dry_run=True, output=path)
    report = load("machine").Report(path, "x", "cpu", given)
    for count, (value, shape) in enumerate(((1, "a"), (1, "b"), (2, "a"))):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert (len(found["results"]), found["complete"]) == (count, False)
        report.put({"kind": "summary", "shape": shape, "value": value}, "kind", "shape")
    report.finish(verdict="well")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [(one["shape"], one["value"]) for one in found["results"]] == [("b", 1), ("a", 2)]
    assert (found["complete"], found["verdict"], found["settings"]) == (True, "well", {"draft": "draft"})
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_contenders_take_turns_and_ratios_are_of_one_turn(load: Any) -> None:
    machine, order = load("machine"), []
    seconds = machine.take_turns({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    # A machine twice as slow in the second turn slows both: the ratio is the same.
    assert machine.ratio([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_a_command_line_loses_what_lies_outside_the_checkout(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = ["--draft", str(tmp_path / "secret" / "draft"), f"--out={ROOT / 'runs' / 'a'}"]
    monkeypatch.setattr(sys, "argv", [str(FOLDER / "x.py"), *paths, "--k", "3", "-7"])
    assert load("machine").command() == "python benchmarks/x.py --draft draft --out=runs/a --k 3 -7"


def test_peak_memory_counts_what_stands_at_once(load: Any) -> None:
    def work() -> None:
        first = torch.ones(1_000_000)
        second = first + 1
        del first
        third = second + 1
        del second, third

    found = load("loss_functions").peak_bytes(work, torch.device("cpu"))
    assert found == pytest.approx(8_000_000, rel=0.01)


def test_the_gpu_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    done = run_bare(tmp_path, "__main__", FOLDER / "on_a_gpu.py")
    assert done.returncode == 2
    assert "sees no accelerator" in done.stderr


def test_the_gpu_script_asks_only_for_options_that_its_scripts_have(load: Any) -> None:
    for name, job in load("on_a_gpu").JOBS.items():
        files = (job.split()[0], "machine", "pair")
        text = "".join((FOLDER / f"{file}.py").read_text(encoding="utf-8") for file in files)
        assert not [word for word in job.split() if word.startswith("--") and f'"{word}"' not in text], name
