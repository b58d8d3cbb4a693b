"""Everything that can be wrong with a recipe file, an override or a setting: one line with a remedy, exit code 2, nothing begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from bad_input_fixture import refused
from fastdraft.recipe.recipe import load_recipe


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "recipe.yaml: empty: must hold sections"),
        (b"# only a comment", "empty: must hold sections"),
        (b"- run\n- target\n", "a list: must hold sections"),
        (b"hello", "one value ('hello'): must hold sections"),
        (b"run:\n\tname: x\n", "indent with spaces, not tabs"),
        (b"run: {name: x}\nrun: {name: y}\n", "line 2, column 1: key 'run' is given twice"),
        (b"run:\n  name: x\n  name: y\n", "line 3, column 3: key 'name' is given twice"),
        (b"run: {name: x, inner: &a [*a]}\n", "run.inner"),
        ("run: é".encode("latin-1"), "byte 5 is not UTF-8"),
        ("run: {}".encode("utf-16"), "is not UTF-8: a recipe must be text in UTF-8; save it as UTF-8"),
        (b"run: x\0", "must be a YAML file"),
        (b"!!python/object/apply:os.system ['exit 7']", "tags that make objects are not read"),
        (b"run: {name: a}\n---\nrun: {name: b}\n", "but found another document"),
        (b"[" * 5000, "nested too deeply"),
        (b"a: " + b"{a: " * 3000, "nested too deeply"),
        (b"run: {name: x, seed: 1" + b"0" * 5000 + b"}", "must be a YAML file"),
        (b"run: {name: 2020-99-99}", "month must be in 1..12"),
        (b"# " + b"x" * 2_000_000, "2.0 MB: a recipe has a few kB"),
        (b"{[a]: b}: c", "unhashable key"),
        (b"1: 2\n", "run: missing: this key is required"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_file_that_is_no_recipe_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, content: bytes, said: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert said in refused(capsys, verb, path)
    assert [item.name for item in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (".", "is a folder"),
        ("nowhere.yaml", "no such file"),
        ("", "an empty name"),
        ("a\0b", "a NUL byte"),
        ("~no-such-user-here/x.yaml", "must be a path that this machine can have"),
        ("x" * 5000, "must be a path that this machine can have"),
    ],
)
def test_a_name_that_leads_to_no_recipe_is_refused(
    capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    assert said in refused(capsys, "check", name)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tiny_recipe: Path) -> None:
    plain = load_recipe(str(tiny_recipe))
    tiny_recipe.write_bytes(b"\xef\xbb\xbf" + tiny_recipe.read_bytes().replace(b"\n", b"\r\n"))
    assert load_recipe(str(tiny_recipe)) == plain


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pretrain.tokens", "not an override: must be key=value"),
        ("=3", "not an override: must be key=value"),
        ("prepare.corpora[9].tokens=3", "names no place in this recipe"),
        ("prepare.corpora[-1].tokens=3", "names no place in this recipe"),
        ("prepare.corpora.0.tokens=3", "names no place in this recipe"),
        ("pretrain.tokens.x=3", "names no place in this recipe"),
        ("pretrain.tokens={a: ", "must be a YAML value; quote it"),
        ("pretrain.tokens=!!python/name:os.system", "must be a YAML value"),
        ("pretrain.tokens=[" + "[" * 3000, "must be a YAML value"),
        ("unknown.section=3", "unknown key; known keys: align, benchmark"),
        ("Pretrain.tokens=3", "did you mean 'pretrain'?"),
        ("pretrain.tokens=", "pretrain.tokens: None: must be a count"),
        ("pretrain.tokens=1Q", "pretrain.tokens: '1Q': must be a count such as 250k, 2M or 10B"),
        ("pretrain.tokens=-1", "pretrain.tokens: -1: must be a whole count"),
        ("pretrain.tokens=0", "pretrain.tokens: 0: must be greater than 0"),
        ("pretrain.tokens=1.5", "must be a whole count"),
        ("pretrain.tokens=.nan", "pretrain.tokens: nan: must be a count"),
        ("pretrain.tokens=.inf", "pretrain.tokens: inf: must be a count"),
        ("pretrain.tokens=1" + "0" * 400, "must be a count of at most"),
        ("pretrain.tokens=1" + "0" * 5000, "pretrain.tokens: '1000"),
        ("pretrain.tokens=" + "9" * 400 + "T", "must be a count of at most"),
        ("pretrain.tokens=true", "True: must be a count"),
        ("run.seed=-1", "run.seed: -1: must be greater than or equal to 0"),
        ("run.seed=1.5", "run.seed: 1.5: must be a whole number"),
        ("run.threads=999999999999", "run.threads: 999999999999: must be less than or equal to 4096"),
        ("run.name=3", "run.name: 3: must be text (in quotes)"),
        ("run=[]", "run: []: must be a section of keys and values"),
        ("target.model=3", "target.model: 3: must be text"),
        (
            "pretrain.optimizer.learning_rate=.nan",
            "pretrain.optimizer.learning_rate: nan: must be a finite number",
        ),
        (
            "pretrain.optimizer.kind=moun",
            "pretrain.optimizer.kind: 'moun': must be one of adamw, muon; did you mean 'muon'?",
        ),
        ("design.draft={}", "design.draft.kind: missing: must be one of budget, from, preset, shape"),
        ("design.draft={kind: budgit, parameters: 1M}", "did you mean 'budget'?"),
        ("prepare.corpora=[]", "prepare.corpora: []: must have at least 1 in it"),
        ("prepare.corpora[0].kind=csv", "prepare.corpora[0].kind: 'csv': must be one of hub, jsonl, parquet"),
        ("prepare.corpora[0].path=''", "prepare.corpora[0].path: '': must have at least 1 character"),
        ("prepare.validation=.nan", "prepare.validation: nan: must be less than or equal to 0.5"),
        (
            "pretrain.mixture={text: .inf}",
            "pretrain: its settings do not fit together: mixture must have shares",
        ),
        ("pretrain.batch_tokens=10T", "tokens (8k) must be at least one batch (10T)"),
        ("synthesize.prompts[0].share=.inf", "synthesize.prompts[0].share: inf: must be a finite number"),
        ("synthesize.prompts[1].name=instructions", "every entry of prompts needs a name of its own"),
        ("synthesize.batch_rows=10000000000", "must be less than or equal to 65536"),
        ("evaluate.tasks=[]", "tasks must name at least 1 task"),
        ("evaluate.temperatures=[]", "evaluate.temperatures: []: must have at least 1 in it"),
        ("evaluate.num_speculative_tokens=3", "must be a list such as [a, b]"),
        ("benchmark={num_speculative_tokens: []}", "must have at least 1 in it"),
    ],
)
def test_a_wrong_override_is_refused_in_words_that_lead_to_its_key(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    assert said in refused(capsys, "run", tiny_recipe, override)
    assert not (tiny_recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    "name", ["..", "a/b", "../x", ".x", "a b", "CON", "nul.txt", "com1", "x.", "x" * 101, "ä", "a\\b"]
)
@pytest.mark.parametrize("key", ["run.name", "prepare.corpora[0].name"])
def test_a_name_that_cannot_be_a_folder_everywhere_is_refused(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str], key: str, name: str
) -> None:
    line = refused(capsys, "check", tiny_recipe, f"{key}='{name}'")
    assert line.startswith(f"fastdraft: {key}: ")
    assert "folder" in line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "run.folder=~no-such-user-here/x",
            "run.folder: '~no-such-user-here/x' (Could not determine home directory.)",
        ),
        ("run.folder=" + "y/" * 3000, "(File name too long)"),
        ("run.folder=" + "y" * 300, "run.folder"),
        ('run.folder="a\\0b"', "a NUL byte"),
        ("run.folder=''", "run.folder: '': must have at least 1 character"),
        ("run.folder={file}", "is a file: the run's folder must be one that can be made"),
        ("run.folder={file}/below", "is a file: the run's folder must be one that can be made"),
        ("prepare.corpora[0].path=~no-such-user-here/x", "must be a path that this machine can have"),
        ("prepare.corpora[0].path=" + "z" * 5000, "must be a path that this machine can have"),
        ("prepare.corpora[0].path=shipped:nope", "shipped:nope: must exist"),
        ("target.model=~no-such-user-here/m", "target.model: '~no-such-user-here/m'"),
        ("target.model=" + "x" * 5000, "must be a path that this machine can have"),
        ("target.model={file}", "a file: must be a model's directory or a hub id"),
        ("target.model=org/not-a-model-of-anyone", "the hub cannot be reached"),
        (
            "prepare.row_length=257",
            "prepare.row_length: 257: must be at most the draft's context of 256; lower it",
        ),
        (
            "synthesize.max_new_tokens=256",
            "synthesize.max_new_tokens: 256: an answer and its prompt must fit the context of 256",
        ),
        ("evaluate.tasks[0].max_new_tokens=300", "evaluate.tasks[0].max_new_tokens: 300"),
        ("synthesize.logits={kind: top_k, k: 1000}", "synthesize.logits.k: 1000: must be below the 320 ids"),
        ("synthesize.prompts[0].path=nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
        ("synthesize.prompts[0].field=question", "no field 'question': has prompt"),
        ("synthesize.prompts[2].corpus=nope", "must be one of prepare.corpora (code, text)"),
    ],
)
def test_what_does_not_fit_this_machine_or_target_is_refused_by_check(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    assert said in refused(capsys, "check", tiny_recipe, override.replace("{file}", str(tiny_recipe)))
    assert not (tiny_recipe.parent / "runs").exists()


SECRET = "sk-abcdefghijklmnop1234567890"


@pytest.mark.parametrize(
    "engine",
    [
        f"{{kind: openai, servers: ['http://x/v1'], api_key: {SECRET}}}",
        f"{{kind: openai, servers: ['http://x/v1'], api_key_env: {SECRET}}}",
        f"{{kind: openai, servers: ['http://x/v1'], token: {SECRET}}}",
        f"{{kind: openai, servers: ['http://x/v1'], model: [{SECRET}]}}",
        f"{{kind: openai, servers: ['http://user:{SECRET}@x/v1']}}",
        f"{{kind: openai, servers: ['http://x/v1?key={SECRET}']}}",
        f"{{kind: openay, api_key: {SECRET}}}",
        f"[{SECRET}",
    ],
)
def test_a_key_put_into_a_recipe_is_refused_and_neither_shown_nor_kept(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    line = refused(capsys, "run", tiny_recipe, f"synthesize.engine={engine}")
    assert SECRET not in line
    assert not any(
        SECRET in path.read_text("utf-8", "replace")
        for path in tiny_recipe.parent.rglob("*")
        if path.is_file()
    )


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("{kind: openai}", "synthesize.engine.servers: missing: this key is required"),
        ("{kind: openai, servers: []}", "synthesize.engine.servers: []: must have at least 1 in it"),
        ("{kind: openai, servers: [not-an-address]}", "must be addresses such as http://127.0.0.1:8000/v1"),
        ("{kind: openai, servers: ['ftp://x']}", "must be addresses such as"),
        ("{kind: openai, servers: ['http://x:99999']}", "must be addresses such as"),
        ("{kind: openai, servers: ['http://[::1/v1']}", "must be addresses such as"),
        (
            "{kind: openai, servers: ['http://x/v1'], timeout: .inf}",
            "synthesize.engine.timeout: inf: must be a finite number",
        ),
        (
            "{kind: openai, servers: ['http://x/v1'], concurrency: 0}",
            "synthesize.engine.concurrency: 0: must be greater",
        ),
        ("huggingface", "synthesize.engine"),
    ],
)
def test_a_wrong_engine_is_refused(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str], engine: str, said: str
) -> None:
    assert said in refused(capsys, "check", tiny_recipe, f"synthesize.engine={engine}")
