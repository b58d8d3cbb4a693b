"""vLLM as a runtime: its counts against replay, its lookup's rule, its servers' beginning and end, what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import write_recipe
from fastdraft import cli, pipeline
from fastdraft.benchmark.at_a_time import at_a_time, pays_until, seconds_of
from fastdraft.benchmark.replayed import draft_accepts
from fastdraft.benchmark.rows import BenchmarkResults, BenchmarkRow, PassesRow
from fastdraft.commands.measure import MeasureSettings, measure
from fastdraft.console import Console
from fastdraft.data.rows import SyntheticRow
from fastdraft.decoding.replay import counts_of_accepts
from fastdraft.errors import FastDraftError, RecipeError, TargetError
from fastdraft.functional.acceptance import add_counts
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.recipe.evaluation import VLLMConfig
from fastdraft.recipe.recipe import load_recipe
from fastdraft.runtimes import vllm as pairs
from fastdraft.runtimes import vllm_runtime as runtimes
from fastdraft.runtimes.runtime import Proposer
from fastdraft.runtimes.vllm import Room, VLLMPair, VLLMSettings, as_counted, measure_passes, start
from fastdraft.runtimes.vllm_runtime import VLLMRuntime, check_shapes, earliest_ngram, open_served, precision
from fastdraft.runtimes.vllm_server import Counters, StartedServer, VLLMServer
from fastdraft.target import Target
from vllm_serving import ServedVLLM

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44], [9]]
DRAFT = Proposer("draft", 2)


@pytest.fixture(scope="module")
def servers(tiny_target: Path, near_draft: Path) -> Iterator[tuple[ServedVLLM, ServedVLLM]]:
    """The target alone, and with a draft that often agrees, K = 2."""
    with (
        ServedVLLM(tiny_target).running() as alone,
        ServedVLLM(tiny_target, near_draft, 2).running() as drafting,
    ):
        yield alone, drafting


@pytest.fixture
def pair(servers: tuple[ServedVLLM, ServedVLLM], tiny_target: Path, near_draft: Path) -> Iterator[VLLMPair]:
    alone, drafting = servers
    yield VLLMPair(
        tiny_target, near_draft, VLLMSettings(base_url=alone.url, draft_base_url=drafting.url, eos_ids=(3,))
    )
    for each in servers:
        each.merged, each.noise, each.room = 0, 0, 256
        each.faults.clear()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_the_server_counts_is_what_replay_of_its_texts_says(pair: VLLMPair, temperature: float) -> None:
    texts = pair.write(PROMPTS, Sampling(temperature), 20, 7, DRAFT, exact_counts=True)
    if temperature == 0:
        assert [t.response_ids for t in texts] == [
            t.response_ids for t in pair.write(PROMPTS, Sampling(0.0), 20, 7)
        ]
    told = [
        Generation([*prompt, text.response_ids[0]], text.response_ids[1:], [], "length")
        for prompt, text in zip(PROMPTS, texts, strict=True)
    ]
    rows = [SyntheticRow.of(each, "", Sampling(0.0)) for each in told]
    accepts = draft_accepts(Path("none"), Target.at(pair.draft), rows)
    assert accepts is not None
    replayed = add_counts(by_k[2] for by_k in counts_of_accepts(accepts, [2]))
    counted = add_counts(text.counts for text in texts)
    for name in ("drafts", "draft_tokens", "accepted_tokens", "generated_tokens"):
        assert getattr(counted, f"num_{name}") == getattr(replayed, f"num_{name}")
    assert list(counted.num_accepted_tokens_per_pos) == list(replayed.num_accepted_tokens_per_pos)
    assert counted.num_accepted_tokens


def test_a_text_whose_passes_came_as_one_is_asked_again_and_given_up_at_last(
    pair: VLLMPair, servers: Any
) -> None:
    whole = pair.write(PROMPTS[:1], Sampling(0.0), 12, 0, DRAFT, exact_counts=True)[0]
    servers[1].merged = 1
    assert pair.write(PROMPTS[:1], Sampling(0.0), 12, 0, DRAFT, exact_counts=True)[0].rounds == whole.rounds
    servers[1].merged = 100
    given_up = pair.write(PROMPTS[:1], Sampling(0.0), 12, 0, DRAFT, exact_counts=True)[0]
    assert (given_up.rounds, given_up.response_ids) == ([], whole.response_ids)


def test_counts_of_others_at_the_same_server_are_not_taken_for_ours(pair: VLLMPair, servers: Any) -> None:
    servers[1].noise = 2
    assert pair.write(PROMPTS[:1], Sampling(0.0), 12, 0, DRAFT, exact_counts=True)[0].rounds == []


def test_what_is_asked_leaves_nothing_to_the_servers_defaults(pair: VLLMPair, servers: Any) -> None:
    pair.write(PROMPTS, Sampling(0.7, 5, 0.9), 4, 0)
    asked = servers[0].asked[-3:]
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop_token_ids", "max_tokens")
    assert [tuple(body[name] for name in names) for body in asked] == [(0.7, 5, 0.9, 0.0, 1.0, [3], 4)] * 3
    assert len({body["cache_salt"] for body in asked}) == 3, "no prompt is in the cache"
    assert pair.gap([5, 6], 7, 8) == pytest.approx(pair.gap([5, 6], 8, 7))


def test_the_end_of_a_text_hides_accepted_tokens_from_the_stream_but_not_from_the_counters() -> None:
    def passes(*sizes: int) -> list[Any]:
        return [pairs.Pass([7] * size, 0.1) for size in sizes]

    assert as_counted(passes(1, 3, 1), Counters(2, 6, 4), 3) == [[7], [7, 7, 7], [7, -1, -1]]
    assert as_counted(passes(1, 2), Counters(1, 3, 1), 3) == [[7], [7, 7]]
    assert as_counted(passes(1, 1, 2), Counters(1, 3, 1), 3) == [[7], [7], [7, 7]], (
        "lookup found nothing once"
    )
    for sizes, counters in [
        ((2, 1), (1, 3, 0)),
        ((1, 3), (1, 3, 1)),
        ((1, 1), (2, 6, 0)),
        ((1, 1), (1, 3, 4)),
    ]:
        assert as_counted(passes(*sizes), Counters(*counters), 3) is None


def naive(text: list[int], k: int) -> list[int]:
    for n in (3, 2):
        for place in range(len(text) - n):
            if text[place : place + n] == text[-n:]:
                return text[place + n : place + n + k]
    return []


def test_lookup_proposes_what_followed_the_earliest_place_of_the_longest_run() -> None:
    rng = random.Random(0)
    for _ in range(50):
        text = [rng.randrange(3) for _ in range(rng.randrange(4, 30))]
        first, k = rng.randrange(1, len(text)), rng.randrange(1, 6)
        found = earliest_ngram(text[:first], text[first:], k)
        for place in range(first, len(text)):
            proposed, own = naive(text[:place], k), text[place:]
            same = [a == b for a, b in zip(proposed, own, strict=False)]
            assert found.proposed[place - first] == len(proposed)
            assert found.right[place - first] == [*same, False].index(False)


def test_servers_that_run_already_are_held_against_the_recipe(pair: VLLMPair, servers: Any) -> None:
    urls = {"base_url": servers[0].url, "draft_base_url": servers[1].url}
    with pytest.raises(FastDraftError, match=r"proposes 2 tokens a round; must be 3 here"):
        pair.write(PROMPTS[:1], Sampling(0.0), 4, 0, Proposer("draft", 3))
    wrong = VLLMPair(
        pair.target, pair.draft, VLLMSettings(base_url=servers[1].url, draft_base_url=servers[0].url)
    )
    with pytest.raises(FastDraftError, match=r"proposes 2 tokens a round; must be none here"):
        wrong.write(PROMPTS[:1], Sampling(0.0), 4, 0)
    servers[0].room = 8
    with pytest.raises(FastDraftError, match=r"max_model_len 8; must be 16 for prompt and answer"):
        pair.write(PROMPTS[:1], Sampling(0.0), 10, 0)
    assert VLLMRuntime(**urls).describe()["version"] == "0.32.0"
    assert measure_passes(pair.target, pair.draft, VLLMSettings(**urls), [1, 3], 8, [1]) is None


def test_a_server_that_fails_is_named_in_one_line(pair: VLLMPair, servers: Any) -> None:
    servers[0].faults.append("500")
    with pytest.raises(FastDraftError, match=rf"{servers[0].url[:-3]}: HTTP 500 \(out of luck\)"):
        pair.write(PROMPTS[:1], Sampling(0.0), 4, 0)
    servers[0].faults.append("drop")
    with pytest.raises(FastDraftError, match=r"no answer .*run the same command again"):
        pair.write(PROMPTS[:1], Sampling(0.0), 4, 0)


@pytest.mark.parametrize(
    ("key", "told"),
    [("", "wants a key; DRAFT_KEY is not set"), ("sk-secret", "the key in DRAFT_KEY is not accepted")],
)
def test_a_key_is_read_from_the_environment_and_never_told(
    servers: Any, monkeypatch: pytest.MonkeyPatch, key: str, told: str
) -> None:
    monkeypatch.setattr(servers[0], "key", "sk-right")
    monkeypatch.setenv("DRAFT_KEY", key)
    address = f"{servers[0].url}/"
    with pytest.raises(FastDraftError, match=f"HTTP 401; {told}") as caught:
        VLLMServer(address, "DRAFT_KEY").write([5], Sampling(0.0), 2, 0)
    assert "secret" not in f"{caught.value} {caught.value.fix}"
    monkeypatch.setenv("DRAFT_KEY", "sk-right")
    assert len(VLLMServer(address, "DRAFT_KEY").write([5], Sampling(0.0), 2, 0)) == 2


STUB = """#!{python}
import http.server, os, subprocess, sys, time
if "--version" in sys.argv: sys.exit(print("0.32.0"))
if "fail" in sys.argv: sys.exit(sys.argv[-5])
open("{folder}/seen", "w").write(" ".join(sys.argv[1:]) + "|" + os.environ.get("OMP_NUM_THREADS", "") + os.environ.get("VLLM_API_KEY", ""))
print("ERROR 11-29 15:31:20 [c.py:2] RuntimeError: heads of 20", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("{folder}/pids", "w").write(f"{{os.getpid()}} {{child.pid}}")
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(500 if self.path == "/broken" else 200); self.end_headers()
    def log_message(self, *a): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), H).serve_forever()
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Begins a server with a helper, as vLLM does."""
    path = tmp_path / "vllm"
    path.write_text(STUB.format(python=sys.executable, folder=tmp_path), encoding="utf-8")
    path.chmod(0o755)
    return path


def gone(folder: Path) -> bool:
    until = time.monotonic() + 20
    for pid in (folder / "pids").read_text(encoding="utf-8").split():
        status = Path(f"/proc/{pid}/status")
        with suppress(FileNotFoundError, ProcessLookupError):
            while time.monotonic() < until and "State:\tZ" not in status.read_text(encoding="utf-8"):
                time.sleep(0.02)
    return time.monotonic() < until


def test_a_started_server_has_its_settings_and_leaves_no_process(
    program: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "another's")
    settings = VLLMSettings(str(program), "--dtype float32", threads=2)
    server = start(tiny_target, tiny_target, settings, DRAFT, Room(4, 800, 256))
    seen, threads = (program.parent / "seen").read_text(encoding="utf-8").split("|")
    assert seen.startswith(
        f"serve {tiny_target} --max-model-len 256 --max-num-seqs 4 --kv-cache-memory-bytes "
    )
    config = json.dumps({"method": "draft_model", "model": str(tiny_target), "num_speculative_tokens": 2})
    assert f"--speculative-config {config} --dtype float32 --host 127.0.0.1 --port " in seen
    assert threads == "2"
    with pytest.raises(FastDraftError, match=r"answered HTTP 500: RuntimeError: heads of 20"):
        server.get("/broken")
    server.close()
    assert gone(program.parent)


def test_a_server_ends_with_a_process_that_is_killed(program: Path) -> None:
    if (child := os.fork()) == 0:
        StartedServer([str(program)], "x", {})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert gone(program.parent)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("(APIServer pid=7) WARNING 11-29 15:31:20 [a.py:2] errors like `OSError: [Errno 24] Too many`.", ""),
        ("pydantic_core._pydantic_core.ValidationError: 1 validation error for SpeculativeConfig", ""),
        ("  Value error, Target and draft model", "Value error, Target and draft model"),
        ("(EngineCore pid=7) ERROR 11-29 15:31:20 [b.py:2] ValueError: no room", "ValueError: no room"),
    ],
)
def test_a_server_that_cannot_start_tells_its_error(program: Path, said: str, told: str) -> None:
    with pytest.raises(FastDraftError, match=f"server for x could not start: {told or 'the end'}; see"):
        StartedServer([str(program), "fail", f"INFO 11-29 begin\n{said}\nthe end"], "x", {})


def test_the_program_is_a_python_or_vllm_itself(program: Path) -> None:
    assert VLLMSettings(str(program)).command("T") == [str(program), "serve", "T"]
    python = VLLMSettings(sys.executable).command("T")
    assert python == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "T"]
    assert VLLMRuntime(str(program)).describe()["version"] == "0.32.0"
    with pytest.raises(
        FastDraftError, match=r"benchmark.vllm.server: /no/python; must be the Python of an env"
    ):
        VLLMSettings("/no/python").command("T")
    with pytest.raises(FastDraftError, match="no vLLM"):
        VLLMRuntime("/bin/false").describe()
    line = VLLMRuntime().launch_line("bf16", "bf16", Proposer("lookup", 3))
    assert (
        '"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 3'
        in line
    )


def test_weights_are_called_by_the_precision_that_vllm_gives_them(tiny_target: Path) -> None:
    target = Target.at(tiny_target)
    assert precision(target, "--dtype float32 -x") == ("fp32", "fp32")
    assert precision(target, "--dtype=bfloat16") == ("bf16", "bf16")
    assert precision(target, "") == ("auto", "auto"), "float32 weights are not kept"
    target.config.dtype = "bfloat16"
    running = VLLMConfig(base_url="http://a", draft_base_url="http://b")
    named = [open_served(config, target, tiny_target, 1)[1] for config in (VLLMConfig(), running)]
    assert named == [[("bf16", "bf16")], [("auto", "auto")]], "a running server does not tell"


def test_an_untrained_shape_is_served_at_an_acceptance_by_chance(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    class Clock:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def write(self, prompt: Any, sampling: Any, tokens: int, seed: int, **more: Any) -> list[pairs.Pass]:
            return [pairs.Pass([7], self.seconds * (place + 1)) for place in range(tokens)]

        def close(self) -> None:
            begun.append(None)

    def begin(target: Path, draft: Path, settings: Any, proposer: Any, room: Any, **more: Any) -> Clock:
        begun.append((target.name, proposer, more, sorted(path.name for path in draft.iterdir())))
        return Clock(0.05 if proposer else 0.1 if target == tiny_target else 0.01)

    monkeypatch.setattr(pairs, "start", begin)
    monkeypatch.setattr(VLLMRuntime, "describe", lambda self: {"name": "vllm"})
    monkeypatch.setattr(VLLMRuntime, "device", "CUDA")  # where heads may be small
    settings = MeasureSettings(runtime="vllm", draft=["32x1"], num_speculative_tokens=[3], acceptance=1.0)
    found = measure(Target.at(tiny_target), [], settings, Console())
    assert begun[1::2] == [None] * 3, "each server has ended before the next begins"
    (draft, *_), _, (target, proposer, synthetic, files) = begun[::2]
    assert (draft, target, proposer) == ("32x1", tiny_target.name, Proposer("draft", 3))
    assert synthetic == {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [1.0] * 3}
    assert "config.json" in files
    assert not [name for name in files if name.endswith(".safetensors")]
    one = found.synthetic
    assert one is not None
    assert (one.speedup, one.predicted_speedup) == (pytest.approx(2.0), pytest.approx(0.4 / 0.13))


def test_a_cpu_serves_heads_of_some_sizes_and_samples_with_losses(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Target.at(tiny_target).architecture
    monkeypatch.setattr(runtimes, "pick_device", lambda name: torch.device("cpu"))
    assert (VLLMRuntime().device, VLLMRuntime().lossless_sampling) == ("CPU", False)
    assert VLLMRuntime(base_url="http://a").lossless_sampling
    check_shapes(shape, shape, "here", "CUDA")
    with pytest.raises(TargetError, match=r"here: heads of 8 in the target; .* its CPU backend 32, 64"):
        check_shapes(shape, shape, "here", VLLMRuntime().device)


def row(texts: dict[int, float], tokens: dict[int, float]) -> PassesRow:
    return PassesRow(
        target_weights="a", draft_weights="b", prefix_tokens=8, draft_seconds=texts[1], target_seconds=tokens,
        device="CPU", draft_device="CPU", runtime="vllm", draft_seconds_by_texts=texts,
    )  # fmt: skip


def test_up_to_how_many_texts_a_draft_pays_follows_from_the_costs_of_passes() -> None:
    assert [pays_until({1: 1.3, 4: 1.1, 16: 0.9, 64: 1.2}), pays_until({1: 0.9, 4: 2.0})] == [4, 0]
    assert [seconds_of({1: 1.0, 5: 2.0, 9: 6.0}, n) for n in (1, 3, 9, 11)] == [1.0, 1.5, 6.0, 8.0]
    assert at_a_time([], [row({1: 0.1, 4: 0.1}, {1: 1.0})]) is None


def test_the_prediction_stands_at_every_number_of_texts(swept: Any) -> None:
    found = at_a_time([swept(1, 1.3), swept(4, 0.9)], [row({1: 0.1, 4: 0.1}, {1: 1.0, 4: 1.0, 16: 4.0})])
    assert found is not None
    # 1 + 1.5 accepted of K = 3: at 4 texts 2.5 * 1 / (0.3 + 4); between, the pass over 8 tokens takes 2.
    assert found.predicted_speedup[1] == pytest.approx(2.5 / 1.3, abs=1e-4)
    assert found.predicted_speedup[2] == pytest.approx(2.5 / (0.3 + 2.0), abs=1e-4)
    assert found.predicted_speedup[4] == pytest.approx(2.5 / (0.3 + 4.0), abs=1e-4)
    assert (found.measured, found.predicted) == (1, 2)
    told = "The draft pays up to one text at a time (K = 3; predicted: 2, of at most 64)."
    assert found.sentence == told


@pytest.fixture
def swept() -> Any:
    def made(concurrency: int, speedup: float) -> BenchmarkRow:
        return BenchmarkRow(
            part="concurrency", task="own", target_weights="a", draft_weights="b", temperature=0.0,
            num_speculative_tokens=3, concurrency=concurrency, max_new_tokens=8, num_prompts=4, repeats=1,
            num_accepted_tokens_per_pos=[], num_tokens_alone=8, num_tokens_with_draft=8, texts=4, lossless=True,
            runtime="vllm", block_efficiency=2.5, speedup=speedup,
        )  # fmt: skip

    return made


def recipe_of(folder: Path, target: Path, servers: Any, **changes: Any) -> Any:
    (folder / "tasks.jsonl").write_text('{"prompt": "so it goes"}\n{"prompt": "a b c"}\n', encoding="utf-8")
    task = {"kind": "file", "name": "own", "path": str(folder / "tasks.jsonl"), "max_new_tokens": 12}
    urls = {"base_url": servers[0].url, "draft_base_url": servers[1].url}
    measured = {"runtimes": ["vllm"], "vllm": urls, "tasks": [task], "prompts": 2, "repeats": 1}
    measured |= {"num_speculative_tokens": [2], "temperatures": [0.0, 0.8]}
    measured |= {"sweep": {"prompt_tokens": [], "max_new_tokens": [], "concurrency": [2]}}
    later = ("prepare", "pretrain", "continue_pretrain", "synthesize", "align", "evaluate", "report")
    values = {"export": {"formats": ["huggingface"]}, "benchmark": measured | changes}
    path = write_recipe(folder, target, **dict.fromkeys(later), **values)
    return load_recipe(
        str(path), [f"design.draft={{kind: from, path: {changes.pop('draft', folder / 'draft')}}}"]
    )


def test_a_benchmark_over_two_running_servers(
    tmp_path: Path, tiny_target: Path, near_draft: Path, servers: Any
) -> None:
    (tmp_path / "draft").symlink_to(near_draft)
    run = pipeline.run(recipe_of(tmp_path, tiny_target, servers), only=["design", "export", "benchmark"])
    written = json.loads((run.folder("benchmark").path / "benchmark.json").read_text(encoding="utf-8"))
    results = BenchmarkResults.from_json(written)
    assert {(row.key, row.proposer) for row in results.rows} == {(("vllm", "auto", "auto"), "draft")}
    for each in results.rows:
        assert each.lossless
        assert each.num_accepted_tokens == each.replayed_accepted_tokens
        assert each.block_efficiency == each.replayed_block_efficiency
    assert all(each.same_text == each.texts for each in results.rows if each.temperature == 0)
    assert [each.concurrency for each in results.rows if each.part == "concurrency"] == [2]
    assert (results.memory, results.runtime.device) == ([], "server")
    assert results.launch.startswith("vllm serve path/to/target --speculative-config")


def test_what_does_not_fit_is_refused_before_any_stage(
    tmp_path: Path,
    tiny_target: Path,
    near_draft: Path,
    servers: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = tmp_path / "draft"
    short.mkdir()
    for path in near_draft.iterdir():
        (short / path.name).write_bytes(path.read_bytes())
    config = json.loads((short / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 128}), encoding="utf-8"
    )
    with pytest.raises(TargetError, match=r"design\.draft: context of the draft 128, of the target 256"):
        pipeline.run(recipe_of(tmp_path, tiny_target, servers))
    assert not (tmp_path / "runs" / "tiny" / "design").exists()
    (short / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        RecipeError, match=r"num_speculative_tokens: \[2, 3\]; a server that runs already has one K"
    ):
        pipeline.run(recipe_of(tmp_path, tiny_target, servers, num_speculative_tokens=[2, 3]))
    with pytest.raises(RecipeError, match="base_url and draft_base_url go together"):
        recipe_of(tmp_path, tiny_target, servers, vllm={"base_url": "http://x"})
    for address, rule in (("ftp://x", "such as http://"), ("http://u:k@x", "without a key")):
        with pytest.raises(RecipeError, match=rf"benchmark\.vllm\.base_url.*must be addresses {rule}"):
            recipe_of(tmp_path, tiny_target, servers, vllm={"base_url": address, "draft_base_url": address})
    monkeypatch.setattr(VLLMRuntime, "device", "CPU")
    with pytest.raises(TargetError, match=r"design\.draft: heads of 8 in the target; vLLM's attention wants"):
        pipeline.run(recipe_of(tmp_path, tiny_target, servers, vllm={"server": "/no/python"}))
    monkeypatch.setattr(VLLMRuntime, "device", "CUDA")
    assert cli.main(["check", str(tmp_path / "recipe.yaml")]) == 2
    assert (
        "benchmark.vllm.server: /no/python; must be the Python of an environment" in capsys.readouterr().err
    )
