"""Whatever a user gets wrong in a recipe, a data file or a model's folder: one line on stderr, exit code 2,
nothing half-written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import write_recipe, write_target, write_tokenizer
from fastdraft import cli
from fastdraft.recipe.recipe import load_recipe

Capture = pytest.CaptureFixture[str]

SECRET = "sk-abcdefghijklmnop1234567890"


def refused(capsys: Capture, *arguments: object) -> str:
    """The one line with which this command line ends, with exit code 2."""
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("fastdraft: ")]
    assert code == 2, told
    assert len(lines) == 1, told
    assert told.rstrip().endswith(lines[0]), told
    assert "Traceback" not in told
    assert ";" in lines[0], f"no remedy: {lines[0]}"
    assert len(lines[0]) < 900
    return lines[0]


def config(**values: Any) -> Callable[[Path], Any]:
    """Sets keys of config.json; None takes them out."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        merged = json.loads(path.read_text(encoding="utf-8")) | values
        path.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}), encoding="utf-8")

    return change


def content(name: str, value: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(value)


def without(*names: str) -> Callable[[Path], Any]:
    return lambda folder: [
        path.unlink() for path in list(folder.iterdir()) if not names or path.name in names
    ]


RECIPES = [
    (b"", "must hold sections"),
    (b"- run\n- target\n", "must hold sections"),
    (b"hello", "must hold sections"),
    (b"run:\n\tname: x\n", "indent with spaces"),
    (b"run: {name: x}\nrun: {name: y}\n", "line 2, column 1: key 'run' is given twice"),
    ("run: é".encode("latin-1"), "byte 5 is not UTF-8"),
    (b"run: x\0", "special characters are not allowed"),
    (b"!!python/object/apply:os.system ['exit 7']", "no YAML that can be read"),
    (b"[" * 5000, "nested too deeply"),
    (b"run: {name: 2020-99-99}", "month must be in 1..12"),
    (b"# " + b"x" * 2_000_000, "larger than 1 MB"),
    (b"1: 2\n", "run: missing: this key is required"),
    (b'run: {name: "C:\\models"}', "single quotes"),
]
OVERRIDES = [
    ("pretrain.tokens", "must be key=value"),
    ("prepare.corpora[9].tokens=3", "names no place in this recipe"),
    ("pretrain.tokens.x=3", "names no place in this recipe"),
    ("pretrain.tokens={a: ", "must be a YAML value; quote it"),
    ("pretrain.tokens=!!python/name:os.system", "must be a YAML value"),
    ("unknown.section=3", "unknown key; known keys: align, benchmark"),
    ("pretrain.tokns=5", "pretrain.tokns: 5: unknown key; did you mean 'tokens'?"),
    ("pretrain.tokens=", "pretrain.tokens: None: must be a whole count"),
    ("pretrain.tokens=1Q", "pretrain.tokens: '1Q': must be a whole count such as 250k"),
    ("pretrain.tokens=-1", "pretrain.tokens: -1: must be"),
    ("pretrain.tokens=.nan", "pretrain.tokens: nan: must be"),
    ("pretrain.tokens=1" + "0" * 400, "must be a whole count"),
    ("run.seed=1.5", "run.seed: 1.5: must be a valid integer"),
    ("run.name=../up", "run.name: '../up': must be letters"),
    ('run.folder="a\\0b"', "run.folder"),
    ("run.folder=~no-such-user-here/x", "Could not determine home directory"),
    ("run.folder={file}", "is a file: no run can lie here"),
    ("run.device=gpu9", "run.device"),
    ("target.model=3", "target.model: 3: must be a valid string"),
    ("target.model={file}", "a GGUF file begins with"),
    ("pretrain.optimizer.learning_rate=.nan", "pretrain.optimizer.learning_rate: nan: must be"),
    ("pretrain.optimizer.kind=moun", "pretrain.optimizer.kind: 'moun': must be 'adamw' or 'muon'"),
    ("design.draft={kind: budgit, parameters: 1M}", "design.draft"),
    ("design.draft={kind: shape}", "design.draft.hidden_size: missing"),
    ("design.draft={kind: budget, parameters: 100}", "design.draft"),
    ("design.draft={kind: from, path: nowhere}", "nowhere"),
    ("prepare.corpora=[]", "prepare.corpora: []: must have at least 1 item"),
    ("prepare.corpora[0].kind=csv", "'csv'"),
    ("prepare.corpora[0].path=nowhere.jsonl", "nowhere.jsonl"),
    ("prepare.corpora[1].path=python:site-packages/no_such_package", "no_such_package"),
    ("prepare.corpora[0].path=shipped:nope", "shipped:nope: must exist"),
    ("prepare.row_length=257", "prepare.row_length: 257: must be at most the draft's context of 256"),
    ("pretrain.batch_tokens=10T", "must be at least one batch (10000000000000)"),
    ("pretrain.mixture={nowhere: 1}", "nowhere: must be one of prepare.corpora (code, text)"),
    ("synthesize.prompts[2].corpus=nope", "nope: must be one of prepare.corpora (code, text)"),
    ("synthesize.prompts[1].name=instructions", "two entries are called 'instructions'"),
    ("synthesize.prompts[0].field=question", "question"),
    ("synthesize.max_new_tokens=256", "must fit the context of 256"),
    ("synthesize.logits={kind: top_k, k: 1000}", "synthesize.logits.k: 1000: must be below the 320 ids"),
    ("synthesize.engine=huggingface", "synthesize.engine"),
    ("synthesize.engine={kind: openai}", "synthesize.engine.servers: missing"),
    ("synthesize.engine={kind: openai, servers: [not-an-address]}", "must be addresses such as http://127"),
    ("align.objective={kind: token_kd, source: stored}", "needs the target's logits"),
    ("evaluate.tasks=[]", "tasks must name at least 1 task"),
    ("evaluate.tasks[0].path=missing.jsonl", "missing.jsonl"),
    ("evaluate.num_speculative_tokens=[0]", "must be between 1 and 64"),
    ("evaluate.texts=nothing", "evaluate.texts"),
    ("run.name.deep=1", "names no place"),
    ("evaluate.temperatures=[-1]", "evaluate.temperatures: [-1]: must be between 0 and 10"),
    ("synthesize.prompts[2].prompt_tokens=[3, 2]", "prompt_tokens must be [shortest, longest]"),
    ("prepare.corpora[0].tokn=5", "prepare.corpora[0].tokn: 5: unknown key; did you mean 'tokens'?"),
    ("align.objective={kind: nothing}", "align.objective"),
    ("run={}", "run.name: missing"),
    ("export.num_speculative_tokens=0", "export.num_speculative_tokens: 0: must be greater"),
]
TARGETS = [
    (without(), "config.json"),
    (content("config.json", b"{"), "config.json"),
    (content("config.json", b"[]"), "config"),
    (config(vocab_size=None), "vocab_size"),
    (config(model_type="t5"), "t5"),
    (config(model_type=None), "model"),
    (content("tokenizer.json", b"{"), "target"),
    (without("tokenizer.json"), "target"),
    (lambda folder: write_tokenizer(folder, vocab_size=400), "320"),
]
FILES = [
    ("tasks.jsonl", b""),
    ("tasks.jsonl", b"{"),
    ("tasks.jsonl", b'{"prompt": 3}\n'),
    ("prompts.jsonl", b'{"other": "x"}\n'),
    ("prompts.jsonl", b"\xff\xfe\n"),
    ("prompts.jsonl", b"[1]\n"),
    ("text.jsonl", b"{\n"),
    ("text.jsonl", b'{"text": 3}\n'),
    ("text.jsonl", b'{"other": "x"}\n'),
    ("text.jsonl", b"\xff\xfe\n"),
]


def test_there_are_sixty_and_more() -> None:
    assert len(RECIPES) + len(OVERRIDES) + len(TARGETS) + len(FILES) >= 60


@pytest.mark.parametrize(("value", "said"), RECIPES)
def test_a_file_that_is_no_recipe(tmp_path: Path, capsys: Capture, value: bytes, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(value)
    assert said in refused(capsys, "check", path)
    assert [item.name for item in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(("override", "said"), OVERRIDES)
def test_a_wrong_setting(tiny_recipe: Path, capsys: Capture, override: str, said: str) -> None:
    assert said in refused(capsys, "check", tiny_recipe, override.replace("{file}", str(tiny_recipe)))
    assert not (tiny_recipe.parent / "runs").exists()


@pytest.mark.parametrize(("change", "said"), TARGETS)
def test_a_folder_that_is_no_target(
    tmp_path: Path, tiny_target: Path, capsys: Capture, change: Callable[[Path], Any], said: str
) -> None:
    shutil.copytree(tiny_target, tmp_path / "target")
    change(tmp_path / "target")
    assert said in refused(capsys, "check", write_recipe(tmp_path, tmp_path / "target"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "value"), FILES)
def test_a_data_file_that_holds_no_rows(tiny_recipe: Path, capsys: Capture, name: str, value: bytes) -> None:
    (tiny_recipe.parent / name).write_bytes(value)
    if name != "text.jsonl":
        assert name in refused(capsys, "check", tiny_recipe)
        return
    assert cli.main(["design", str(tiny_recipe), "--quiet"]) == 0
    assert name in refused(capsys, "prepare", tiny_recipe)
    assert not (tiny_recipe.parent / "runs" / "tiny" / "prepare" / "manifest.json").exists()


def test_a_draft_of_another_vocabulary(tmp_path: Path, tiny_target: Path, capsys: Capture) -> None:
    other, recipe = write_target(tmp_path / "other", padded_vocab=336), write_recipe(tmp_path, tiny_target)
    line = refused(capsys, "check", recipe, f"design.draft={{kind: from, path: '{other}'}}")
    assert "336" in line
    assert "320" in line


def test_code_and_pickles_of_a_model_are_never_run(tmp_path: Path, capsys: Capture) -> None:
    target = write_target(tmp_path / "target")
    config(
        model_type="homemade",
        auto_map={"AutoConfig": "homemade.Config", "AutoModelForCausalLM": "homemade.Model"},
    )(target)
    content("homemade.py", b"raise SystemExit('code of the model ran')")(target)
    refused(capsys, "run", write_recipe(tmp_path, target))
    pickled = write_target(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "safetensors" in refused(capsys, "run", write_recipe(tmp_path, pickled))


@pytest.mark.parametrize(
    "engine",
    [
        f"{{kind: openai, servers: ['http://x/v1'], api_key: {SECRET}}}",
        f"{{kind: openai, servers: ['http://x/v1'], api_key_env: {SECRET}}}",
        f"{{kind: openai, servers: ['http://user:{SECRET}@x/v1']}}",
        f"{{kind: openai, servers: ['http://x/v1?key={SECRET}']}}",
        f"[{SECRET}",
    ],
)
def test_a_key_in_a_recipe_is_neither_shown_nor_kept(tiny_recipe: Path, capsys: Capture, engine: str) -> None:
    assert SECRET not in refused(capsys, "run", tiny_recipe, f"synthesize.engine={engine}")
    files = [path for path in tiny_recipe.parent.rglob("*") if path.is_file()]
    assert not any(SECRET in path.read_text("utf-8", "replace") for path in files)


def test_magpie_without_a_chat_template(tmp_path: Path, capsys: Capture) -> None:
    recipe = write_recipe(tmp_path, write_target(tmp_path / "base", chat=False))
    assert "needs a chat template" in refused(capsys, "check", recipe)


@pytest.mark.parametrize("name", [".", "nowhere.yaml", "", "a\0b", "~no-such-user-here/x.yaml", "x" * 5000])
def test_a_name_that_leads_to_no_recipe(capsys: Capture, name: str) -> None:
    refused(capsys, "check", name)


def test_a_run_whose_place_is_a_file(tiny_recipe: Path, capsys: Capture) -> None:
    place = tiny_recipe.parent / "runs" / "tiny"
    place.parent.mkdir()
    place.write_text("mine", encoding="utf-8")
    for verb in ("check", "run"):
        assert "tiny" in refused(capsys, verb, tiny_recipe)
    assert place.read_text(encoding="utf-8") == "mine"


def test_a_byte_order_mark_and_windows_line_ends_are_read(tiny_recipe: Path) -> None:
    plain = load_recipe(str(tiny_recipe))
    tiny_recipe.write_bytes(b"\xef\xbb\xbf" + tiny_recipe.read_bytes().replace(b"\n", b"\r\n"))
    assert load_recipe(str(tiny_recipe)) == plain
