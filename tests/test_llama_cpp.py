"""llama.cpp: texts with and without proposals, rounds counted as ours, servers that fail or outlive nobody.

Tiny models run in the wheel's server; faults come from a script in the place of a user's llama-server.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

from fastdraft.errors import DataError, FastDraftError
from fastdraft.functional.acceptance import batched_expected_counts
from fastdraft.functional.generation import Sampling
from fastdraft.runtimes.llama_cpp import LlamaCppPair, LlamaCppSettings, as_passes, measure_passes
from fastdraft.runtimes.llama_cpp_process import ServerSettings
from fastdraft.runtimes.llama_cpp_server import LlamaServer
from fastdraft.runtimes.runtime import Proposer
from gguf_fixture import CONTEXT, EOS, SIZE, write_gguf

PROMPTS = [[5, 7, 9], [6, 7, 9], [40, 41, 42, 43, 44]]
GREEDY, WARM = Sampling(0.0), Sampling(0.8)
TOKENS = 24
SETTINGS = LlamaCppSettings(threads=1, eos_ids=(EOS,))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("target") / "t.gguf")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("draft") / "d.gguf", noise=0.02)


@pytest.fixture(scope="module")
def pair(target: Path, draft: Path) -> Iterator[LlamaCppPair]:
    pair = LlamaCppPair(target, draft, SETTINGS, CONTEXT)
    yield pair
    pair.close()


def started(model: Path, **settings: int | str) -> ServerSettings:
    return ServerSettings(str(model), **{"room": 256, "threads": 1, **settings})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def favourites(draft: Path) -> Iterator[LlamaServer]:
    """A server of the draft alone: what it likes best is what it proposes."""
    with LlamaServer(started(draft)) as server:
        yield server


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
@pytest.mark.parametrize("k", [1, 3])
def test_counts_are_those_of_a_replay_of_the_draft_over_the_text_that_the_server_wrote(
    pair: LlamaCppPair, favourites: LlamaServer, sampling: Sampling, k: int
) -> None:
    accepted = 0.0
    alone = pair.write(PROMPTS, sampling, TOKENS, 7)
    written = pair.write(PROMPTS, sampling, TOKENS, 7, Proposer("draft", k), exact_counts=True)
    for prompt, own, text in zip(PROMPTS, alone, written, strict=True):
        ids = text.response_ids
        assert ids == own.response_ids  # the same seed, greedy or not
        found = [favourites.complete([*prompt, *ids[:n]], GREEDY, 1, 0).ids[0] for n in range(1, len(ids))]
        accepts = [np.array([float(a == b) for a, b in zip(found, ids[1:], strict=True)])]
        replayed = batched_expected_counts(accepts, [k])[0][k]  # whose overlap is over all tokens
        assert replace(text.counts, overlap_sum=0, overlap_tokens=0) == replace(
            replayed, overlap_sum=0, overlap_tokens=0
        )
        accepted += text.counts.num_accepted_tokens
    assert accepted > 0


def test_texts_that_are_timed_are_those_that_are_counted(pair: LlamaCppPair) -> None:
    drafting = Proposer("draft", 3)
    timed = pair.write(PROMPTS, GREEDY, TOKENS, 0, drafting)
    counted = pair.write(PROMPTS, GREEDY, TOKENS, 0, drafting, exact_counts=True)
    assert [each.response_ids for each in timed] == [each.response_ids for each in counted]
    assert all(0 < each.first_token_seconds <= each.seconds for each in timed)
    assert not any(each.rounds for each in timed)


@pytest.mark.parametrize("kind", ["lookup", "lookup_draft"])
def test_lookup_changes_no_text_and_writes_more_than_a_token_a_pass_where_a_text_repeats_itself(
    pair: LlamaCppPair, kind: str
) -> None:
    prompts = [[0, 256, 119], *PROMPTS]  # whose answer is one token over and over
    alone = pair.write(prompts, GREEDY, 60, 0)
    written = pair.write(prompts, GREEDY, 60, 0, Proposer(kind, 1), exact_counts=True)  # type: ignore[arg-type]
    assert [each.response_ids for each in alone] == [each.response_ids for each in written]
    for text in written:
        assert text.counts.num_generated_tokens == len(text.response_ids) - 1
    assert max(text.counts.block_efficiency for text in written) > 1.5


@pytest.mark.parametrize(
    ("ids", "accepted", "expected"),
    [
        ([1], [], [[1]]),
        ([1, 2, 3], [], [[1], [2], [3]]),
        ([1, 2, 3, 4, 5], [2, 0], [[1], [2, 3, 4], [5]]),
        ([1, 2, 3, 4, 5], [2], [[1], [2, 3, 4], [5]]),
        ([1, 2, 3], [3], [[1], [2, 3, -1, -1]]),
        ([1], [2], [[1]]),
        ([], [], []),
    ],
)
def test_rounds_tell_which_pass_wrote_a_token(
    ids: list[int], accepted: list[int], expected: list[list[int]]
) -> None:
    assert as_passes(ids, accepted) == expected


def test_the_gap_of_two_next_tokens_is_that_of_their_log_probs(pair: LlamaCppPair, target: Path) -> None:
    with LlamaServer(started(target)) as server:
        logprobs = server.next_logprobs(PROMPTS[0], SIZE)
        drawn = server.complete(PROMPTS[0], Sampling(1.0), 1, 3, logprobs=True)
    assert len(logprobs) == SIZE
    assert sum(map(math.exp, logprobs.values())) == pytest.approx(1.0, abs=1e-5)
    assert pair.gap(PROMPTS[0], 5, 200) == pytest.approx(abs(logprobs[5] - logprobs[200]), abs=1e-6)
    if drawn.logprobs:
        assert drawn.logprobs[0] == pytest.approx(logprobs[drawn.ids[0]], abs=1e-5)


def test_passes_of_every_width_are_measured_or_none(target: Path, draft: Path) -> None:
    found = measure_passes(target, draft, SETTINGS, [2, 4], 64)
    assert found is None or (
        set(found.target_seconds) == {1, 2, 4}
        and min(found.target_seconds.values()) > 0 <= found.draft_seconds_more
    )


def test_a_prompt_that_does_not_fit_is_refused_before_anything_starts(target: Path, draft: Path) -> None:
    pair = LlamaCppPair(target, draft, SETTINGS, 16)
    with pytest.raises(DataError, match="the context holds 16"):
        pair.write(PROMPTS, GREEDY, 16, 0)
    assert not pair._servers


def test_a_server_with_too_little_room_is_started_again(target: Path, draft: Path) -> None:
    pair = LlamaCppPair(target, draft, SETTINGS, CONTEXT)
    [short] = pair.write([[5] * 10], GREEDY, 4, 0)
    [long] = pair.write([[5] * 300], GREEDY, 4, 0)
    assert (len(short.response_ids), len(long.response_ids), len(pair._servers)) == (4, 4, 1)
    pair.close()


FAKE = """#!{python}
import http.server, json, os, sys
{how}
port = int(sys.argv[sys.argv.index("--port") + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def say(self, code, value):
        text = json.dumps(value).encode()
        self.send_response(code); self.send_header("Content-Length", str(len(text))); self.end_headers()
        self.wfile.write(text)
    def do_GET(self): self.say(200, {{}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        {answer}
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
OLD = "print('error: invalid argument: --spec-type', file=sys.stderr); sys.exit(1)"
PLAIN = "self.say(200, {'tokens': [5, 6], 'timings': {'prompt_ms': 1, 'predicted_ms': 1}})"


def fake(folder: Path, how: str = "", answer: str = PLAIN) -> str:
    """A program that takes llama-server's arguments."""
    path = folder / "llama-server"
    path.write_text(FAKE.format(python=sys.executable, how=how, answer=answer), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("how", "answer", "drafting", "message"),
    [
        (OLD, "", 0, "could not start .exit code 1.: error: invalid argument: --spec-type"),
        ("", "self.say(400, {'error': {'message': 'no such key'}})", 0, "no such key"),
        ("", "self.say(200, {'content': 'a'})", 0, "no token ids in its answers"),
        ("", "os.kill(os.getpid(), 9)", 0, "gave no answer .*signal SIGKILL"),
        ("print('vocabularies differ', flush=True)", PLAIN, 3, "left the draft out: vocabularies differ"),
    ],
)
def test_a_server_that_fails_is_one_line(
    tmp_path: Path, target: Path, how: str, answer: str, drafting: int, message: str
) -> None:
    program = fake(tmp_path, how, answer or PLAIN)
    more = {"draft": str(target), "num_speculative_tokens": drafting} if drafting else {}
    with pytest.raises(FastDraftError, match=message) as raised:
        LlamaServer(started(target, program=program, **more)).complete(PROMPTS[0], GREEDY, 4, 0)
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


def test_a_file_or_a_program_that_is_not_there_is_named(tmp_path: Path, target: Path) -> None:
    with pytest.raises(FastDraftError, match=r"none\.gguf could not start .*failed to open GGUF file"):
        LlamaServer(started(tmp_path / "none.gguf"))
    with pytest.raises(FastDraftError, match="server: /no/llama-server: must be llama.cpp's llama-server"):
        LlamaServer(started(target, program="/no/llama-server"))


def test_a_draft_of_another_vocabulary_is_refused(tmp_path: Path, target: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", size=SIZE + 200)
    with pytest.raises(FastDraftError, match=r"other\.gguf: the server left the draft out"):
        LlamaServer(started(target, draft=str(other), num_speculative_tokens=3))


def gone(pid: int) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("own", [False, True])
def test_no_server_outlives_a_run_that_is_killed(tmp_path: Path, target: Path, own: bool) -> None:
    program = fake(tmp_path, f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))") if own else ""
    code = (
        "import sys, time; from fastdraft.runtimes.llama_cpp_server import LlamaServer, ServerSettings\n"
        f"server = LlamaServer(ServerSettings({str(target)!r}, room=256, threads=1, program={program!r}))\n"
        "print(server._process.pid, flush=True); time.sleep(60)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert run.stdout
    pids = [int(run.stdout.readline())]
    if own:
        pids.append(int((tmp_path / "pid").read_text(encoding="utf-8")))
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert all(gone(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_closed_server_is_gone(target: Path) -> None:
    with LlamaServer(started(target)) as server:
        pid = server._process.pid
    assert gone(pid)
