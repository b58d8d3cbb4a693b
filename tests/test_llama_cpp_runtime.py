"""llama.cpp as a runtime of the benchmark: what it says of itself, which pairs it refuses, how it is launched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

from fastdraft.benchmark.memory import measure_memory
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.errors import FastDraftError, TargetError
from fastdraft.functional.acceptance import TOTALS, counts_from_array
from fastdraft.functional.generation import Sampling
from fastdraft.functional.lookup import lookup_counts
from fastdraft.runtimes.llama_cpp_process import ServerSettings
from fastdraft.runtimes.llama_cpp_runtime import LlamaCppRuntime, ngram_simple
from fastdraft.runtimes.llama_cpp_server import LlamaServer
from fastdraft.runtimes.runtime import Proposer
from gguf_fixture import CONTEXT, SIZE, write_gguf

RUNTIME = LlamaCppRuntime(threads=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    made = []
    for name, noise in (("target", 0.0), ("draft", 0.02)):
        made.append(write_gguf(tmp_path_factory.mktemp(name) / "m.gguf", noise=noise))
    return made[0], made[1]


def test_a_pair_is_opened_with_the_context_of_its_files(files: tuple[Path, Path]) -> None:
    pair = RUNTIME.open(*files)
    assert (pair.context_length, pair.settings) == (CONTEXT, RUNTIME)
    [text] = pair.write([[5, 7, 9]], Sampling(0.0), 6, 0, Proposer("draft", 2))
    assert len(text.response_ids) == 6
    pair.close()


def test_a_draft_that_the_server_would_leave_out_is_refused_before_it_starts(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_gguf(tmp_path / "other.gguf", size=SIZE + 200)
    with pytest.raises(TargetError, match="must differ by at most 128"):
        RUNTIME.open(files[0], other)


def test_bytes_are_those_of_the_weights(files: tuple[Path, Path]) -> None:
    size = RUNTIME.weights_bytes(files[0])
    assert size % 4 == 0
    assert 0 < files[0].stat().st_size - size < 20_000  # the head


def test_memory_is_that_of_the_server(files: tuple[Path, Path]) -> None:
    found = measure_memory(RUNTIME, *files, [5, 7, 9], 4)
    assert found is not None
    assert found > 20_000_000  # of a process with the wheel loaded; ours has loaded nothing


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_lookup_follows_the_rule_of_ngram_simple(k: int) -> None:
    """Against a search from scratch in its words: what is known without the last token, and that token."""
    random = np.random.default_rng(k)
    for _ in range(40):
        text = random.integers(0, 3, 30).tolist()
        prompt, response = text[:8], text[8:]
        found = ngram_simple(prompt, response, k)
        for place in range(len(response)):
            known, last = text[: 8 + place - 1], text[8 + place - 1]
            size, draft = min(3, k), list[int]()
            pattern = [*known[len(known) - size + 1 :], last]
            starts = range(len(known) - size - 1, 0, -1) if len(known) > size + k + 1 else range(0)
            at = next((j for j in starts if known[j : j + size] == pattern), 0)
            width = min(k, len(known) - at - size) if at else 0
            draft = known[at + size : at + size + width] if width >= size else []
            own = response[place : place + len(draft)]
            right = next((j for j, (a, b) in enumerate(zip(draft, own, strict=False)) if a != b), len(own))
            assert (found.proposed[place], found.right[place]) == (len(draft), right)


@pytest.mark.parametrize("kind", ["lookup", "lookup_draft"])
def test_lookups_passes_and_accepted_tokens_are_those_that_its_rule_predicts(
    files: tuple[Path, Path], kind: ProposerKind
) -> None:
    prompts = [
        [int(token) for token in np.random.default_rng(seed).integers(40, 44, 60)] for seed in range(8)
    ]
    pair, greedy, finds = RUNTIME.open(*files), Sampling(0.0), 0.0
    with LlamaServer(ServerSettings(str(files[1]), room=256, threads=1)) as favourites:
        for text, prompt in zip(
            pair.write(prompts, greedy, 60, 0, Proposer(kind, 3), exact_counts=True), prompts, strict=True
        ):
            begun, rest = [*prompt, text.response_ids[0]], text.response_ids[1:]
            found = ngram_simple(begun, rest, 3)
            own = [favourites.complete([*begun, *rest[:n]], greedy, 1, 0).ids[0] for n in range(len(rest))]
            accepts = [np.array([float(a == b) for a, b in zip(own, rest, strict=True)])]
            line = lookup_counts([found], [3], accepts if kind == "lookup_draft" else None)[0, 0]
            counts = counts_from_array(line[: TOTALS + 3])
            assert text.counts.num_drafts == counts.num_drafts
            # At its limit the server asks for one proposal less, and writes that token itself.
            assert 0 <= counts.num_accepted_tokens - text.counts.num_accepted_tokens <= 1
            finds += line[-1]
    pair.close()
    assert finds > 0


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("draft", "-md path/to/draft-f16.gguf --spec-draft-n-max 4 --spec-type draft-simple"),
        ("lookup", "--spec-type ngram-simple --spec-ngram-simple-size-n 3 --spec-ngram-simple-size-m 4"),
        (
            "lookup_draft",
            "-md path/to/draft-f16.gguf --spec-draft-n-max 4 --spec-type ngram-simple,draft-simple"
            " --spec-ngram-simple-size-n 3 --spec-ngram-simple-size-m 4",
        ),
    ],
)
def test_what_a_user_types(kind: ProposerKind, wanted: str) -> None:
    line = RUNTIME.launch_line("Q4_K_M", "f16", Proposer(kind, 4))
    assert line == f"llama-server -m path/to/target-Q4_K_M.gguf {wanted}"


def test_a_server_without_proposals_is_asked_for_nothing_that_an_older_one_lacks() -> None:
    line = ServerSettings("t.gguf", room=512, slots=4).arguments(80)
    assert " ".join(line) == ("-m t.gguf --cache-ram 0 --fit off --host 127.0.0.1 --port 80 -c 2048 -np 4")


def test_the_release_is_told_or_the_program_is_refused(tmp_path: Path) -> None:
    told = RUNTIME.describe()
    assert told["version"].startswith("xllamacpp 20")
    assert (told["name"], told["device"], told["threads"]) == ("llamacpp", "CPU", 1)
    program = tmp_path / "llama-server"
    told = "#!/bin/sh\necho 'version: 11549 (abc)' >&2\n"
    program.write_text(told, encoding="utf-8")
    program.chmod(0o755)
    with pytest.raises(FastDraftError, match="--help names no --spec-type; it is too old"):
        LlamaCppRuntime(server=str(program)).describe()
    program.write_text(f"{told}echo --spec-type\n", encoding="utf-8")
    assert LlamaCppRuntime(server=str(program)).describe()["version"] == "llama-server 11549 (abc)"
    program.write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")
    with pytest.raises(FastDraftError, match="exit code 3; must be llama.cpp's llama-server"):
        LlamaCppRuntime(server=str(program)).describe()
