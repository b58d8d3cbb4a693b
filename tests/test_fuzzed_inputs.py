"""What users bring, damaged by the hundred: logs, prompts, tasks, models, resume checkpoints, locks. What was written, or one line of ours.

Derandomised: the same damage every time. Bytes go wrong anywhere, or a value anywhere in a file becomes an odd one.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from fastdraft.console import Console
from fastdraft.data.chat import Conversation, prompt_ids
from fastdraft.data.logs import read_transcripts
from fastdraft.errors import DataError, FastDraftError, TargetError
from fastdraft.modeling.drafts import load_draft
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.recipe.data import JsonlPrompts, TranscriptLog
from fastdraft.run_folder import RunFolder, file_sha256, write_json
from fastdraft.target import Target
from fastdraft.evaluation.tasks import read_prompts
from fastdraft.training.checkpoint import Checkpoints, TrainingState
from test_fuzzed_files import damage, few, read

ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    3,
    10**400,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    0.5,
    "",
    "x",
    "\ud83d",
    "\0",
    "\u202e\x1b[2J",
    "../../x",
    "token_id:" + "9" * 5000,
    [],
    {},
    [[]],
    [None],
    [[1, 2], [3]],
    [-1],
    [999_999],
    [2**70],
    ["a"],
    {"content": 5},
    {"type": [1]},
]
"""What may stand where something else is expected."""


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value; of long ones the first few."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inside)[:40]:
        yield (*above, key)
        yield from places(item, (*above, key))


def changed(value: Any, place: tuple[Any, ...], odd: Any) -> Any:
    """A copy of a JSON value in which something else stands at that place."""
    value = whole = copy.deepcopy(value)
    for key in place[:-1]:
        value = value[key]
    value[place[-1]] = odd
    return whole


def oddly(value: Any) -> st.SearchStrategy[Any]:
    """The value with an odd one somewhere in it."""
    return st.builds(
        lambda place, odd: changed(value, place, odd),
        st.sampled_from(list(places(value))),
        st.sampled_from(ODD),
    )


# ---- logs of a target

IDS, LOGPROBS, WORDS = (
    [5, 6, 7, 3],
    [-0.5, -0.25, -0.125, -0.0625],
    [{"role": "user", "content": "What is a fox?"}],
)
LISTED = {"token_ids": IDS, "finish_reason": "stop", "logprobs": {"token_logprobs": LOGPROBS}}
CONTENT = {"content": [{"id": i, "logprob": p} for i, p in zip(IDS, LOGPROBS, strict=True)]}
SGLANG = {"output_token_logprobs": [[p, i, "?"] for i, p in zip(IDS, LOGPROBS, strict=True)]}
SAID = {"message": {"role": "assistant", "content": "%&'"}, "finish_reason": "stop"}
LINES: list[dict[str, Any]] = [
    {
        "messages": [{"role": "system", "content": "Short."}, *WORDS],
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "choices": [LISTED],
    },
    {
        "request": {"messages": WORDS, "temperature": 1},
        "response": {"choices": [SAID | {"logprobs": CONTENT}]},
    },
    {
        "body": {"messages": WORDS, "temperature": 1},
        "response": {"status_code": 200, "body": {"choices": [SAID | {"meta_info": SGLANG}]}},
    },
    {"prompt": [5, 6, 7], "temperature": 0.7, "choices": [LISTED], "prompt_token_ids": [5, 6]},
    {
        "prompt": "The",
        "temperature": 1,
        "choices": [{"text": " fox", "finish_reason": "length"}],
        "usage": {"completion_tokens": 2},
    },
    {
        "messages": WORDS,
        "response": "%&'",
        "token_ids": IDS,
        "logprobs": LOGPROBS,
        "finish_reason": "stop",
        "temperature": 0.7,
    },
    {
        "messages": [*WORDS, {"role": "assistant", "content": [{"type": "text", "text": "A fox."}]}],
        "temperature": 0,
    },
]


@pytest.fixture(scope="module")
def reading(tiny_target: Path) -> tuple[Any, Vocabulary]:
    """Tokenizer and vocabulary of the tiny target."""
    return Target.at(tiny_target).tokenizer, Target.at(tiny_target).vocabulary


def log_of(folder: Path, *lines: Any, **values: Any) -> TranscriptLog:
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return TranscriptLog(kind="transcripts", name="log", path=str(path), logprobs="processed", **values)


@settings(few, max_examples=150)
@given(st.sampled_from(LINES).flatmap(oddly))
def test_a_damaged_line_of_a_log_is_one_line_or_an_answer_that_can_be(
    tmp_path: Path, reading: tuple[Any, Vocabulary], line: Any
) -> None:
    log, size = log_of(tmp_path, line), reading[1].size
    for row in [] if (found := read(lambda: read_transcripts(log, *reading, 0))) is None else found.rows:
        answer, sampling = row.generation, row.sampling
        assert all(0 <= token < size for token in [*answer.prompt_ids, *answer.response_ids])
        assert all(-9999 < value <= 0 for value in answer.logprobs)
        assert len(answer.logprobs) in (0, len(answer.response_ids))
        assert 0 <= sampling.temperature <= 10
        assert 0 < sampling.top_p <= 1


@settings(few, max_examples=40)
@given(damage())
def test_a_log_with_wrong_bytes_is_one_line_or_answers(
    tmp_path: Path, reading: tuple[Any, Vocabulary], damaged: Callable[[bytes], bytes]
) -> None:
    log = log_of(tmp_path, *LINES)
    Path(log.path).write_bytes(damaged(Path(log.path).read_bytes()))
    read(lambda: read_transcripts(log, *reading, 0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": True}, "temperature True"),
        ({"top_p": 0}, "top_p 0"),
        ({"top_k": 1.5}, "top_k 1.5"),
        ({"choices": [{"delta": {"content": "A"}, "finish_reason": None}]}, "a piece of a streamed answer"),
    ],
)
def test_a_line_that_would_be_read_as_something_else_is_refused(
    tmp_path: Path, reading: tuple[Any, Vocabulary], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=f"log.jsonl line 1: {said}"):
        read_transcripts(log_of(tmp_path, LINES[0] | change), *reading, 0)


def test_pictures_and_tool_calls_of_a_log_are_counted_and_left_out(
    tmp_path: Path, reading: tuple[Any, Vocabulary]
) -> None:
    picture = {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": "x"}},
        ],
    }
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    seen = [
        {"messages": messages, "temperature": 0, "response": "A fox."}
        for messages in ([picture], [*WORDS, call, *WORDS], WORDS)
    ]
    found = read_transcripts(log_of(tmp_path, *seen), *reading, 0)
    assert (len(found.rows), found.refused["unsupported"]) == (1, 2)


def test_log_probs_that_cannot_be_count_as_not_told_and_a_missing_entry_moves_no_other(
    tmp_path: Path, reading: tuple[Any, Vocabulary]
) -> None:
    for bad in (0.5, math.inf, -math.inf, -9999.0, None, "x", 10**400):
        line = changed(LINES[0], ("choices", 0, "logprobs", "token_logprobs", 1), bad)
        answer = read_transcripts(log_of(tmp_path, line), *reading, 0).rows[0].generation
        assert (answer.response_ids, answer.logprobs) == (IDS, [])
    gap = changed(LINES[1], ("response", "choices", 0, "logprobs", "content", 1), "gone")
    assert read_transcripts(log_of(tmp_path, gap), *reading, 0).rows[0].generation.response_ids != [
        IDS[0],
        *IDS[2:],
    ]
    broken = changed(LINES[0], ("choices", 0, "logprobs", "token_logprobs", 1), math.nan)
    assert read_transcripts(log_of(tmp_path, broken), *reading, 0).rows[0].generation.fault == "not_finite"


# ---- prompts and tasks

ASKED = {"id": "a", "prompt": "What is a fox?", "reference": "An animal."}
TALK = {
    "id": "b",
    "messages": [
        {"role": "system", "content": "Short."},
        *WORDS,
        {"from": "gpt", "value": [{"type": "text", "text": "A."}]},
    ],
}


@settings(few, max_examples=100)
@given(oddly([ASKED, TALK]) | damage())
def test_damaged_prompts_and_tasks_are_one_line_or_can_be_asked(
    tmp_path: Path, reading: tuple[Any, Vocabulary], change: Any
) -> None:
    path, lines = tmp_path / "prompts.jsonl", [ASKED, TALK]
    content = "".join(json.dumps(line) + "\n" for line in (lines if callable(change) else change)).encode()
    path.write_bytes(change(content) if callable(change) else content)
    for task in read(lambda: read_prompts(path)) or []:
        prompt_ids(reading[0], task.text, True)
        assert json.dumps(task.id)
    for name in ("prompt", "messages"):
        asked = JsonlPrompts(kind="jsonl", name="own", path=str(path), field=name)
        for prompt in read(lambda asked=asked: list(asked.prompts())) or []:  # type: ignore[misc]
            for text in prompt.users if isinstance(prompt, Conversation) else [prompt or ""]:
                prompt_ids(reading[0], text, True)


# ---- models

NAMES = ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"]


def opened(folder: Path) -> Any:
    """Everything that is read of a draft before it works; its weights are given."""
    Target.at(folder).vocabulary
    prompt_ids(Target.at(folder).tokenizer, "a fox", True)
    return load_draft(folder).state_dict()


@settings(few, max_examples=25)
@given(st.data())
def test_a_model_with_an_odd_value_loads_or_is_one_line(
    tmp_path: Path, tiny_draft: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "draft"
    shutil.copytree(tiny_draft, folder, dirs_exist_ok=True)
    path = folder / data.draw(st.sampled_from(NAMES))
    path.write_text(
        json.dumps(data.draw(oddly(json.loads(path.read_text(encoding="utf-8"))))), encoding="utf-8"
    )
    read(lambda: opened(folder))


@settings(few, max_examples=25)
@given(damage(), st.sampled_from(["head", "any"]))
def test_damaged_weights_are_the_weights_that_were_written_or_one_line(
    tmp_path: Path, tiny_draft: Path, damaged: Callable[[bytes], bytes], where: str
) -> None:
    """Nothing is said of bytes among the numbers: finished stages have their checksums, these files none."""
    folder = tmp_path / "draft"
    shutil.copytree(tiny_draft, folder, dirs_exist_ok=True)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    head = 8 + struct.unpack("<Q", content[:8])[0]
    path.write_bytes(
        damaged(content[:head]) + content[head:]
        if where == "head"
        else content[: len(damaged(content)) % len(content)]
    )
    found, wanted = read(lambda: load_draft(folder).state_dict()), load_draft(tiny_draft).state_dict()
    assert found is None or all(torch.equal(found[name], wanted[name]) for name in wanted)


def retold(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Rewrites the header of a safetensors file."""

    def apply(path: Path) -> None:
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Rewrites the tensors of a safetensors file."""

    def apply(path: Path) -> None:
        found = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(found)
        save_file(found, path, metadata={"format": "pt"})

    return apply


NORM = "model.norm.weight"
HARMS: dict[str, Callable[[Path], None]] = {
    "a huge header": lambda path: path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:]) and None,
    "integers": retold(lambda header: header[NORM].update(dtype="I32")),
    "a missing tensor": tensors(lambda found: found.pop(NORM)),
    "another shape": tensors(lambda found: found.update({NORM: torch.ones(2)})),
    "not a number": tensors(lambda found: found[NORM].fill_(math.nan)),
    "a tensor too far": retold(lambda header: header[NORM].update(data_offsets=[0, 2**50])),
}


@pytest.mark.parametrize("harm", HARMS)
def test_weights_of_another_model_or_of_none_are_one_line(
    tmp_path: Path, tiny_draft: Path, harm: str
) -> None:
    shutil.copytree(tiny_draft, tmp_path / "draft")
    HARMS[harm](tmp_path / "draft" / "model.safetensors")
    with pytest.raises(FastDraftError, match=r"draft.*; delete its stage's folder"):
        load_draft(tmp_path / "draft")


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        ("tokenizer.json", ("model", "vocab", "a"), 10**9, "the number 1000000000"),
        ("tokenizer_config.json", ("model_max_length",), [], r"model_max_length \[\]"),
        (
            "tokenizer.json",
            ("model",),
            {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"},
            "must load",
        ),
    ],
)
def test_a_tokenizer_that_would_fail_later_is_refused_when_it_is_loaded(  # noqa: PLR0917
    tmp_path: Path, tiny_draft: Path, name: str, place: tuple[str, ...], value: Any, said: str
) -> None:
    shutil.copytree(tiny_draft, tmp_path / "draft")
    path = tmp_path / "draft" / name
    path.write_text(
        json.dumps(changed(json.loads(path.read_text(encoding="utf-8")), place, value)), encoding="utf-8"
    )
    with pytest.raises(TargetError, match=said):
        Target.at(tmp_path / "draft").tokenizer


# ---- resume checkpoints


def saved(folder: Path) -> tuple[Checkpoints, nn.Module, Path]:
    """A model of two weights after one step, its checkpoints, and the folder of the only one."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameters(), lr=0.1)]
    model(torch.ones(2, 4)).square().mean().backward()
    optimizers[0].step()
    console = Console(quiet=True)
    console.warn = lambda text: None  # type: ignore[method-assign]
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints = Checkpoints(folder, model, optimizers, console)
    checkpoints.save(TrainingState(step=1, tokens=8, trained_tokens=8))
    return checkpoints, model, folder / "steps" / "step-000000001"


def resumed(checkpoints: Checkpoints, model: nn.Module) -> TrainingState:
    """Goes on for one step."""
    state = checkpoints.load_latest()
    model(torch.ones(2, 4)).square().mean().backward()
    checkpoints._optimizers[0].step()
    return state


@settings(few, max_examples=40)
@given(
    damage(),
    st.sampled_from(["state.json", "model.safetensors", "optimizer.safetensors", "random.safetensors"]),
)
def test_a_damaged_resume_checkpoint_is_whole_or_one_line(
    tmp_path: Path, damaged: Callable[[bytes], bytes], name: str
) -> None:
    checkpoints, model, folder = saved(tmp_path)
    weight = model.weight.detach().clone()  # type: ignore[union-attr,operator]
    (folder / name).write_bytes(damaged((folder / name).read_bytes()))
    state = read(checkpoints.load_latest)
    assert state is None or state == TrainingState(step=1, tokens=8, trained_tokens=8)
    assert state is None or torch.equal(model.weight, weight)


@settings(few, max_examples=40)
@given(st.data())
def test_a_state_of_odd_values_is_counters_or_one_line(tmp_path: Path, data: st.DataObject) -> None:
    checkpoints, model, folder = saved(tmp_path)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    write_json(folder / "state.json", data.draw(oddly(state)))
    found = read(lambda: resumed(checkpoints, model))
    assert found is None or all(value is None or value >= -1 for value in vars(found).values())


OTHER_TENSORS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = {
    "a weight is missing": ("model.safetensors", lambda found: found.pop("bias")),
    "a weight of another shape": ("model.safetensors", lambda found: found.update(bias=torch.ones(1))),
    "a weight of whole numbers": (
        "model.safetensors",
        lambda found: found.update(bias=torch.ones(3, dtype=torch.int64)),
    ),
    "a moment is missing": ("optimizer.safetensors", lambda found: found.pop("0/bias/exp_avg_sq")),
    "a weight's moments are missing": (
        "optimizer.safetensors",
        lambda found: [found.pop(name) for name in list(found) if "bias" in name],
    ),
    "a moment of another shape": (
        "optimizer.safetensors",
        lambda found: found.update({"0/bias/exp_avg": torch.ones(1)}),
    ),
    "a moment of no weight": (
        "optimizer.safetensors",
        lambda found: found.update({"0/other/exp_avg": torch.ones(3)}),
    ),
    "no random state": ("random.safetensors", lambda found: found.update(cpu=torch.ones(3))),
}


@pytest.mark.parametrize("harm", OTHER_TENSORS)
def test_a_checkpoint_of_other_tensors_is_one_line_though_its_checksums_are_right(
    tmp_path: Path, harm: str
) -> None:
    checkpoints, model, folder = saved(tmp_path)
    name, change = OTHER_TENSORS[harm]
    tensors(change)(folder / name)
    record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    record["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    write_json(folder / "state.json", record)
    with pytest.raises(FastDraftError, match="every checkpoint is damaged"):
        resumed(checkpoints, model)


def test_best_weights_of_other_shapes_are_one_line(tmp_path: Path) -> None:
    checkpoints, model, _ = saved(tmp_path)
    checkpoints.save_best(1, model)
    with pytest.raises(FastDraftError, match="does not fit"):
        checkpoints.load_best(1, nn.Linear(4, 2))


# ---- the lock


@settings(few, max_examples=40)
@given(st.binary(max_size=60) | st.just(b"999999999999999999999\nhost\n") | st.just(b"0\n\n"))
def test_a_lock_file_of_any_content_does_not_block_and_a_marker_is_one_line_or_taken(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / ".lock").write_bytes(content)
    with RunFolder(tmp_path).lock():
        pass


def test_a_folder_where_the_lock_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(FastDraftError, match=r"\.lock"), RunFolder(tmp_path).lock():
        pass


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_a_damaged_marker_of_a_dead_owner_is_one_line_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    from faults_fixture import failing, os_error

    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, 1, os_error(errno.ENOLCK)))
    for content in (
        b"",
        b"\xff\xfe",
        b"999999999999999999999\nhost\n",
        b"1.5\n\n",
        b"-1\n" + os.uname().nodename.encode(),
    ):
        (tmp_path / ".lock.held").write_bytes(content)
        with pytest.raises(FastDraftError, match=r"in use by another process"), RunFolder(tmp_path).lock():
            pass
