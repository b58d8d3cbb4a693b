"""llama.cpp's server missing, too old, refusing, dying in a benchmark; the benchmark itself killed.

A script in the place of a user's llama-server speaks as much HTTP as is needed; kills meet the wheel's server.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

import psutil

from conftest import write_recipe
from fastdraft import cli
from gguf_fixture import SIZE, write_gguf

LATER = ("prepare", "pretrain", "continue_pretrain", "synthesize", "align", "evaluate", "report")
FAKE = """#!{python}
import http.server, json, os, pathlib, sys
if "--version" in sys.argv or "--help" in sys.argv:
    print("version: 1 (fake)", {options!r})
    sys.exit(0)
{how}
left = pathlib.Path(__file__).with_name("left")  # answers until it kills itself
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def say(self, value):
        text = json.dumps(value).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(text))); self.end_headers()
        self.wfile.write(text)
    def do_GET(self): self.say({{}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if left.exists():
            left.write_text(str(int(left.read_text()) - 1))
            if left.read_text() == "0": os.kill(os.getpid(), 9)
        drafts = 3 * ("-md" in sys.argv)
        if drafts: print("accepted  0/ 3 draft tokens", flush=True)
        ids = [5 + place for place in range(asked["n_predict"])]
        self.say({{"tokens": ids, "timings": {{"prompt_ms": 1, "predicted_ms": 1, "draft_n": drafts}}}})
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
REFUSES = "print('error: invalid argument: --spec-draft-n-min', file=sys.stderr); sys.exit(1)"


def fake(folder: Path, how: str = "", options: str = "--spec-type") -> str:
    """A program that takes llama-server's arguments."""
    path = folder / "llama-server"
    path.write_text(FAKE.format(python=sys.executable, how=how, options=options), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def recipe_at(folder: Path, server: str = "", **changes: Any) -> Path:
    """Design, export and benchmark of a tiny pair, whose files lie in the folder."""
    if not (folder / "t.gguf").exists():
        write_gguf(folder / "t.gguf")
    if not (folder / "d.gguf").exists():
        write_gguf(folder / "d.gguf", noise=0.02)
    (folder / "tasks.jsonl").write_text('{"prompt": "so it goes"}\n{"prompt": "a b c"}\n', encoding="utf-8")
    task = {"kind": "file", "name": "own", "path": str(folder / "tasks.jsonl"), "max_new_tokens": 30}
    measured: dict[str, Any] = {
        "llamacpp": {"draft": str(folder / "d.gguf"), "threads": 1, "server": server},
        "tasks": [task],
        "prompts": 2,
        "num_speculative_tokens": [2],
        "lookup": [],
        "repeats": 3,
        "sweep": {"prompt_tokens": [], "max_new_tokens": [], "concurrency": []},
    }
    values = {"export": {"formats": ["huggingface"]}, "benchmark": measured | changes}
    return write_recipe(folder, folder / "t.gguf", **dict.fromkeys(LATER), **values)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("FASTDRAFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def units(folder: Path) -> dict[str, bytes]:
    found = folder / "runs" / "tiny" / "benchmark" / "units"
    return {path.name: path.read_bytes() for path in found.glob("*.json")} if found.exists() else {}


def one_line(text: str) -> str:
    """The error, which must be one line."""
    [line] = [line for line in text.splitlines() if line.startswith("fastdraft: ")]
    assert "Traceback" not in text
    return line


def children(process: Any = None) -> list[Any]:
    with contextlib.suppress(psutil.Error):
        found = (process or psutil.Process()).children(recursive=True)
        return [each for each in found if each.status() != "zombie"]
    return []


def serves(process: Any) -> bool:
    with contextlib.suppress(psutil.Error):
        return "llama_cpp_process" in " ".join(process.cmdline())
    return False


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "server: {program}: must be llama.cpp's llama-server, a program that can be run"),
        ("--draft-max", "server: {program}: --help names no --spec-type; it is too old"),
    ],
)
def test_a_server_that_is_missing_or_too_old_is_refused_before_any_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str | None, message: str, verb: str
) -> None:
    program = str(tmp_path / "none") if options is None else fake(tmp_path, options=options)
    assert cli.main([verb, str(recipe_at(tmp_path, program))]) == 2
    assert message.format(program=program) in one_line(capsys.readouterr().err)
    assert not (tmp_path / "runs" / "tiny" / "design").exists()


def test_a_server_that_refuses_an_option_or_dies_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastdraft.benchmark.runs.measure_memory", lambda *asked: 1
    )  # in a process of its own
    recipe = str(recipe_at(tmp_path, fake(tmp_path, REFUSES)))
    assert cli.main(["run", recipe]) == 2
    told = one_line(capsys.readouterr().err)
    assert "could not start (exit code 1): error: invalid argument: --spec-draft-n-min" in told
    fake(tmp_path)
    (tmp_path / "left").write_text("30", encoding="utf-8")
    assert cli.main(["run", recipe]) == 2
    told = one_line(capsys.readouterr().err)
    assert "(signal SIGKILL)" in told
    assert told.endswith("run the same command again: finished work is kept")
    assert not children()
    kept = units(tmp_path)
    assert any("counts" in name for name in kept)
    assert not (tmp_path / "runs" / "tiny" / "benchmark" / "benchmark.json").exists()
    (tmp_path / "left").unlink()
    assert cli.main(["run", recipe]) == 0
    assert {name: text for name, text in units(tmp_path).items() if name in kept} == kept
    assert not children()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_kills_of_the_server_and_of_the_benchmark_leave_no_process_and_the_next_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, kept = recipe_at(tmp_path, repeats=20), dict[str, bytes]()
    below: set[Any] = set()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it

    def strike(run: Any, number: int, server: bool) -> None:
        """Once one more unit is finished and a server runs."""
        while run.is_running():
            more, found = len(units(tmp_path)) > len(kept), children(run)
            below.update(found)
            servers = [each for each in found if serves(each)]
            if servers and more:
                os.kill(servers[-1].pid if server else run.pid, number)
                return
            time.sleep(0.01)

    for server, number, code in (
        (False, signal.SIGKILL, -9),
        (True, signal.SIGKILL, 2),
        (False, signal.SIGINT, 130),
    ):
        if code == -9:
            run = psutil.Popen(
                [sys.executable, "-m", "fastdraft", "run", str(recipe)], stderr=subprocess.DEVNULL
            )
            strike(run, number, server)
            assert run.wait(10) == code
        else:
            thread = threading.Thread(target=strike, args=[psutil.Process(), number, server], daemon=True)
            thread.start()
            assert cli.main(["run", str(recipe)]) == code
            thread.join()
            one_line(capsys.readouterr().err)
        assert not psutil.wait_procs(below, 10)[1]
        assert {name: text for name, text in units(tmp_path).items() if name in kept} == kept
        kept = units(tmp_path)
    assert kept


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def renamed(path: Path) -> Path:
    """Of an architecture that nobody knows."""
    path.write_bytes(path.read_bytes().replace(b"llama", b"ollma"))
    return path


def split(path: Path) -> Path:
    """The first of two parts, without the second."""
    text = path.read_bytes()
    count = b"split.count"
    field = len(count).to_bytes(8, "little") + count + (2).to_bytes(4, "little") + (2).to_bytes(2, "little")
    fields = int.from_bytes(text[16:24], "little") + 1
    part = path.with_name("t-00001-of-00002.gguf")
    part.write_bytes(text[:16] + fields.to_bytes(8, "little") + field + text[24:])
    path.unlink()
    return part


@pytest.mark.parametrize("verb", ["inspect", "check", "run"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "the file is cut short or damaged"),
        (renamed, "architecture 'ollma'; must be one of"),
        (split, "t-00002-of-00002.gguf is missing; all 2 parts must lie beside it"),
    ],
)
def test_a_damaged_or_unknown_target_is_one_line_of_every_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, damage: Any, message: str
) -> None:
    recipe = recipe_at(tmp_path)
    target = damage(tmp_path / "t.gguf")
    recipe.write_text(
        recipe.read_text(encoding="utf-8").replace(str(tmp_path / "t.gguf"), str(target)), encoding="utf-8"
    )
    assert cli.main([verb, str(target if verb == "inspect" else recipe)]) == 2
    assert message in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "the file is cut short or damaged"),
        (renamed, "architecture 'ollma', which the installed gguf does not know"),
        (lambda path: write_gguf(path, size=SIZE + 200), "must differ by at most 128"),
    ],
)
def test_a_damaged_draft_or_one_of_another_vocabulary_is_one_line_before_any_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, damage: Any, message: str
) -> None:
    recipe = recipe_at(tmp_path)
    damage(tmp_path / "d.gguf")
    assert cli.main([verb, str(recipe)]) == 2
    told = one_line(capsys.readouterr().err)
    assert "d.gguf" in told
    assert message in told
    assert not (tmp_path / "runs" / "tiny" / "design").exists()
