"""`fastdraft generate`: what goes to stdout, when it is coloured, what it reports and refuses."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from conftest import write_target
from fastdraft.commands import generate
from fastdraft.commands.generate import choose_lengths, find_exports, find_pair
from fastdraft.console import Console
from fastdraft.decoding.token_stream import TokenStream, text_pieces
from fastdraft.errors import DataError, FastDraftError, RecipeError, TargetError
from fastdraft.run_folder import write_json
from fastdraft.target import Target
from report_fixture import benchmark, results, timed_lookup, with_lookup


def call(target: Path, draft: Path, **changes: Any) -> None:
    settings = {
        "prompt": "Once upon a time",
        "chat": False,
        "proposer": "both",
        "num_speculative_tokens": 3,
        "temperature": 0.0,
    }
    settings |= {"top_k": 0, "top_p": 1.0, "max_new_tokens": 20, "seed": 0, "device": "cpu", "color": None}
    settings |= {"compare": False, "console": Console()}
    generate.run(target=str(target), draft=str(draft), **(settings | changes))


def test_proposals_are_as_long_as_was_fastest_in_the_run_and_without_one_3_and_5(tmp_path: Path) -> None:
    run, exports = str(tmp_path), (tmp_path, tmp_path)
    for given in ((None, None), (run, None), (run, exports)):
        assert choose_lengths(*given) == {"draft": 3, "lookup": 5}
    counted, timed = with_lookup(results()), timed_lookup(benchmark())
    best: Any = {"pretrain": 7, "align": 2, "lookup": 6, "lookup_draft": 1}  # by what the rows are of

    def told(row: Any, speedup: str, name: str) -> Any:
        return replace(row, **{speedup: 2.0 if row.num_speculative_tokens == best.get(name) else 1.0})

    rows = [told(row, "predicted_speedup", row.checkpoint) for row in counted.rows]
    lookup = [told(row, "predicted_speedup", row.proposer) for row in counted.lookup]
    write_json(tmp_path / "evaluate" / "results.json", replace(counted, rows=rows, lookup=lookup).to_json())
    assert choose_lengths(run, None) == {"draft": 2, "lookup": 6}
    assert choose_lengths(run, exports) == {"draft": 3, "lookup": 5}  # other costs than those of transformers
    best |= {"draft": 4, "lookup": 3}
    clocked = replace(timed, rows=[told(row, "speedup", row.proposer) for row in timed.rows])
    write_json(tmp_path / "benchmark" / "benchmark.json", clocked.to_json())
    assert choose_lengths(run, exports) == {"draft": 4, "lookup": 3}


def test_lookup_may_propose_more_than_the_draft(
    tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(tiny_target, tiny_target, num_speculative_tokens=1, num_lookup_tokens=4, max_new_tokens=40)
    assert "a round at most 1 of draft, 4 of lookup" in capsys.readouterr().err


def test_stdout_holds_the_targets_text_and_nothing_else(tiny_target: Path, tiny_draft: Path, capsys) -> None:
    call(tiny_target, tiny_draft, compare=True)
    with_draft = capsys.readouterr()
    call(tiny_target, tiny_target, compare=False)
    assert with_draft.out == capsys.readouterr().out
    assert "tokens per pass" in with_draft.err
    assert "speed-up against the target alone" in with_draft.err
    assert "same text as the target alone" in with_draft.err


def test_accepted_tokens_are_coloured_when_asked_for(tiny_target: Path, capsys) -> None:
    texts: list[str] = []
    draft, lookup = (color for color, _ in generate.COLORS.values())
    call(tiny_target, tiny_target)
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    for proposer, used in (
        ("draft", {draft}),
        ("lookup", {lookup}),
        ("both", {draft, lookup}),
        ("nothing", set()),
    ):
        call(
            tiny_target,
            tiny_target,
            color=True,
            proposer=proposer,
            prompt="one two one two one two",
            max_new_tokens=40,
        )
        coloured, told = capsys.readouterr()
        assert {color for color in (draft, lookup) if color in coloured} == used
        for color in (draft, lookup, generate.RESET):
            coloured = coloured.replace(color, "")
        assert len(set(texts := [*texts, coloured])) == 1
        assert ("of draft (green)" in told, "of lookup (cyan)" in told) == (draft in used, lookup in used)
        assert "of the target itself" in told


def test_without_a_proposer_that_drafts_no_draft_is_needed(tmp_path: Path) -> None:
    for proposer in ("lookup", "nothing"):
        assert find_pair(None, "a/b", None, proposer)[1] is None
    with pytest.raises(RecipeError, match="--draft"):
        find_pair(None, "a/b", None, "both")


@pytest.mark.parametrize("end", ["", "\n"])
def test_the_prompt_may_come_from_stdin_with_the_line_end_that_echo_adds(
    tiny_target: Path, tiny_draft: Path, capsys, monkeypatch, end: str
) -> None:
    call(tiny_target, tiny_draft)
    given = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Once upon a time{end}"))
    call(tiny_target, tiny_draft, prompt=None)
    assert capsys.readouterr().out == given


def test_a_conversation_goes_on_until_the_input_ends(
    tiny_target: Path, tiny_draft: Path, capsys, monkeypatch
) -> None:
    said = iter(["Hello", "", "And then?", EOFError])

    def answer(_: str) -> str:
        if (text := next(said)) is EOFError:
            raise EOFError
        return text

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    call(tiny_target, tiny_draft, prompt=None, chat=True, max_new_tokens=5)
    found = capsys.readouterr()
    assert "10 tokens in" in found.err
    assert found.out.endswith("\n")


@pytest.mark.parametrize(
    ("change", "error", "found"),
    [
        ({"num_speculative_tokens": 0}, RecipeError, "at least 1"),
        ({"prompt": "  "}, DataError, "--prompt"),
        ({"prompt": "word " * 500}, DataError, "context holds 256"),
        ({"device": "abacus"}, RecipeError, "--device: abacus"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    tiny_target: Path, tiny_draft: Path, change: dict[str, Any], error: type[FastDraftError], found: str
) -> None:
    with pytest.raises(error, match=found) as raised:
        call(tiny_target, tiny_draft, **change)
    assert "\n" not in str(raised.value)


def test_a_draft_of_another_vocabulary_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError):
        call(tiny_target, write_target(tmp_path / "other", padded_vocab=330, layers=1, hidden=16))


@pytest.mark.parametrize(
    "text", ["The fox – jumps: 日本語 and naïve 🦊 again", "def f(x):\n    return x  # plain"]
)
def test_pieces_join_to_the_text_whatever_bytes_the_tokens_end_in(tiny_target: Path, text: str) -> None:
    tokenizer = Target.at(tiny_target).tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    stream = TokenStream(tokenizer)
    assert "".join([stream.feed(token) for token in ids] + [stream.finish()]) == text
    pieces = text_pieces(tokenizer, [*ids, 3], [i % 3 > 0 for i in range(len(ids) + 1)])
    assert "".join(str(piece["text"]) for piece in pieces) == text
    assert all(a["accepted"] != b["accepted"] for a, b in pairwise(pieces))


def test_a_run_gives_its_target_with_the_revision_and_precision_it_used(tmp_path: Path) -> None:
    write_json(tmp_path / "recipe.yaml", {"target": {"model": "a/b", "revision": "v2", "dtype": "bf16"}})
    write_json(tmp_path / "design" / "draft" / "config.json", {})
    target, draft = find_pair(str(tmp_path), None, None)
    assert (target.model, target.revision, target.dtype) == ("a/b", "v2", "bf16")
    assert draft == str(tmp_path / "design" / "draft")
    assert find_pair(str(tmp_path), "c/d", None)[0].revision is None


def test_openvino_runs_what_is_exported_for_it_and_is_refused_where_nothing_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for role in ("target", "draft"):
        folder = tmp_path / "run" / "export" / "openvino" / role
        folder.mkdir(parents=True)
        (folder / "openvino_model.xml").touch()
    monkeypatch.setattr(generate, "import_genai", lambda: None)
    monkeypatch.setattr(generate, "find_spec", lambda name: True)
    run, exports = str(tmp_path / "run"), (folder.parent / "target", folder)
    for runtime, target, device, expected in (
        (None, None, "cpu", exports),
        ("openvino", None, "auto", exports),
        ("openvino", str(folder), "cpu", (folder, folder)),
        ("transformers", None, "cpu", None),
        (None, str(tmp_path), "cpu", None),
    ):
        assert find_exports(runtime, run, target, None, device) == expected  # type: ignore[arg-type]
    assert find_exports(None, run, None, None, "cpu", "lookup") == (exports[0], None)
    with pytest.raises(RecipeError, match="--device: cuda; with --runtime openvino it must be cpu"):
        find_exports("openvino", run, None, None, "cuda")
    with pytest.raises(FastDraftError, match=r"no openvino_model\.xml; --runtime openvino runs"):
        find_exports("openvino", str(tmp_path), None, None, "cpu")
    monkeypatch.setattr(generate, "find_spec", lambda name: None)
    assert find_exports(None, run, None, None, "cpu") is None
