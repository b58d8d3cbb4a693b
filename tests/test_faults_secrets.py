"""Faults 50 to 58, trust: no network, no pickle, no secret in a file, no path out of a name, and a served target that lies."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from conftest import FORBIDDEN
from fastdraft import cli
from fastdraft.errors import RecipeError
from fastdraft.provenance import without_secrets
from fastdraft.recipe.recipe import load_recipe
from faults_fixture import Run, one_line

WILD = [
    "../../up",
    "/etc/passwd",
    "a\x00b",
    "x" * 300,
    "CON",
    "模型",
    "\U0001f98a",
    "..",
    "C:\\windows",
    "a\nb",
    "%2e%2e",
]


def test_a_whole_run_opens_no_connection_and_no_pickle(short_run: Path) -> None:
    assert FORBIDDEN == []
    assert (short_run.parent / "runs" / "tiny" / "export" / "manifest.json").is_file()


@pytest.mark.parametrize("key", ["run", "prepare.corpora[0]", "synthesize.prompts[0]", "evaluate.tasks[0]"])
def test_a_name_that_would_be_a_path_is_refused(short_run: Path, key: str) -> None:
    for name in WILD:
        plain = name.isalpha() and name.isascii()  # no path, and a disk that cannot take the longest says so
        if plain and not (name == "CON" and key.startswith(("run", "prepare"))):
            continue
        with pytest.raises(RecipeError) as caught:
            load_recipe(str(short_run), [f"{key}.name={json.dumps(name)}"])
        assert str(caught.value).startswith(key.partition(".")[0])
        assert "\n" not in str(caught.value)


def test_the_ids_of_prompts_never_become_paths(short_run: Path, tmp_path: Path) -> None:
    run, tasks = Run(short_run, "wild", "evaluate"), tmp_path / "tasks.jsonl"
    lines = [
        json.dumps({"id": name, "prompt": f"Tell me about number {i} and the fox."})
        for i, name in enumerate(WILD)
    ]
    tasks.write_text("\n".join(lines), encoding="utf-8")
    before = {path for path in short_run.parent.rglob("*") if run.folder not in path.parents}
    assert run.command(f"evaluate.tasks[0].path={tasks}", "evaluate.exact.prompts=0") == 0
    assert {path for path in short_run.parent.rglob("*") if run.folder not in path.parents} == before
    assert all(path.name.isascii() and len(path.name) < 80 for path in (run.folder / "evaluate").rglob("*"))


def test_keys_and_passwords_are_in_no_file_and_in_no_line(
    short_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, secret = Run(short_run, "secret", "design"), "s3cr3t-Value"
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{secret}@127.0.0.1:9")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "fastdraft",
            "design",
            f"https://user:{secret}@host/x?api_key={secret}&b=1",
            f"synthesize.engine.api_key={secret}",
        ],
    )
    assert run.command() == 0
    found = [
        path for path in run.folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
    ]
    assert found == []
    for override in (
        f"synthesize.engine={{kind: openai, servers: ['https://user:{secret}@host/v1']}}",
        f"synthesize.engine={{kind: openai, servers: ['https://host/v1?api_key={secret}']}}",
        f"synthesize.engine={{kind: openai, servers: ['https://host/v1'], api_key: {secret}}}",
        f"run.api_key={secret}",
    ):
        capsys.readouterr()
        assert cli.main(["check", str(short_run), override]) == 2
        assert secret not in one_line(capsys)


def test_what_is_blotted_out_of_a_command_line() -> None:
    kept = ["pretrain.tokens=5", "https://host/v1", "a@b", "evaluate.num_speculative_tokens=[1,2]"]
    assert [without_secrets(text) for text in kept] == kept
    assert without_secrets("https://me:pw@host/v1?token=abc&x=1") == "https://***@host/v1?token=***&x=1"
    assert without_secrets("{api_key: abc, servers: [x]}") == "{api_key: ***, servers: [x]}"


class TestServers:
    """Faults of a server beside those of test_openai_server.py."""

    @pytest.fixture(autouse=True)
    def _needs_httpx(self) -> None:
        pytest.importorskip("httpx")

    def test_a_server_that_speaks_no_tls_is_one_line(self, tiny_target: Path) -> None:
        from fastdraft.errors import TargetError
        from fastdraft.functional.generation import Sampling
        from serving import Served
        from test_openai_server import engine_of

        with Served(tiny_target).running() as one:
            engine = engine_of(tiny_target, urls=[one.url.replace("http:", "https:")], retries=0)
            with pytest.raises(TargetError, match="no connection") as caught:
                engine.generate([[1, 5, 9]], Sampling(0.0), 4, 0)
        assert "\n" not in str(caught.value)

    def test_a_server_that_comes_back_with_another_model_or_not_at_all_is_one_line(
        self, tiny_target: Path
    ) -> None:
        from fastdraft.errors import FastDraftError
        from fastdraft.functional.generation import Sampling
        from serving import Served
        from test_openai_server import engine_of

        with Served(tiny_target).running() as one:
            engine = engine_of(tiny_target, one, retries=0)
            engine.generate([[1, 5, 9]], Sampling(0.0), 4, 0)
            one.name = "another"
            with pytest.raises(FastDraftError, match="does not exist") as caught:
                engine.generate([[1, 5, 9]], Sampling(0.0), 4, 0)
            assert "\n" not in str(caught.value)
        with pytest.raises(FastDraftError, match=r"no connection|broke off"):
            engine.generate([[1, 5, 9]], Sampling(0.0), 4, 0)
