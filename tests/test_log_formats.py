"""Lines of logs and data sets as many programs write them: what the target read and wrote, or why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdraft.data.chat import ChatTemplate
from fastdraft.data.logs import read_transcripts
from fastdraft.errors import DataError
from fastdraft.recipe.synthesize import TranscriptPrompts
from fastdraft.target import Target

ASK, SAID = "What is a fox?", "A fox ran."
USER = {"role": "user", "content": ASK}
ANSWER = {"role": "assistant", "content": SAID}
CHOICE = {"message": ANSWER, "finish_reason": "stop"}
PARTS = [{"type": "output_text", "text": SAID}]
THOUGHT = {**ANSWER, "reasoning_content": "Hm."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}

# Name of the program, a line: all say the same.
EQUAL: dict[str, dict[str, Any]] = {
    "OpenAI chat": {"messages": [USER], "choices": [CHOICE]},
    "last message": {"messages": [USER, ANSWER]},
    "response as text": {"messages": [USER], "response": SAID},
    "Responses": {
        "input": ASK,
        "output": [{"type": "message", "role": "assistant", "content": PARTS}],
        "status": "completed",
    },
    "Anthropic": {
        "messages": [USER],
        "response": {
            "content": [{"type": "text", "text": SAID}],
            "role": "assistant",
            "stop_reason": "end_turn",
        },
    },
    "Ollama": {"messages": [USER], "response": {"message": ANSWER, "done": True, "done_reason": "stop"}},
    "ShareGPT": {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": SAID}]},
    "columns of a data set": {"conversations": {"from": ["human", "gpt"], "value": [ASK, SAID]}},
    "nulls that Arrow wrote": {"messages": [{**USER, "from": None}, {**ANSWER, "value": None}]},
    "TRL": {"prompt": [USER], "completion": [ANSWER]},
    "Alpaca": {"instruction": ASK, "input": "", "output": SAID},
    "a model's own name": {"messages": [USER, {"role": "bard", "content": SAID}]},
    "a text that is JSON": {"messages": json.dumps([USER, ANSWER])},
}

GOOD = {"messages": [USER], "choices": [CHOICE]}

LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "thinking in a choice": ({"messages": [USER], "choices": [{**CHOICE, "message": THOUGHT}]}, "thinking"),
    "thinking in the last message": ({"messages": [USER, THOUGHT]}, "thinking"),
    "thinking in a response": ({"messages": [USER], "response": THOUGHT}, "thinking"),
    "tools that are called": ({"messages": [USER], "choices": [{**CHOICE, "message": CALL}]}, "tools"),
    "a picture": (
        {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "choices": [CHOICE],
        },
        "media",
    ),
    "settings of thinking": ({**GOOD, "thinking": {"type": "disabled"}}, "unsupported_thinking"),
    "two names nobody knows": (
        {"messages": [USER, {**ANSWER, "role": "alice"}, USER, {**ANSWER, "role": "bob"}]},
        "unknown_role",
    ),
    "a call that failed": ({"messages": [USER], "response": None}, "no_answer"),
    "an answer begun for the target": (
        {"messages": [USER, {"role": "assistant", "content": "A"}], "choices": [CHOICE]},
        "unsupported_prefix",
    ),
}


@pytest.fixture
def read(tmp_path: Path, tiny_target: Path) -> Any:
    target = Target.at(tiny_target)

    def of(*lines: dict[str, Any], template: str = "") -> Any:
        if template:
            target.tokenizer.chat_template = template
        path = tmp_path / "log.jsonl"
        path.write_text("".join(json.dumps({"temperature": 0, **line}) + "\n" for line in lines))
        config = TranscriptPrompts(kind="transcripts", name="log", path=str(path), logprobs="none")
        found = read_transcripts(config, ChatTemplate(target.tokenizer), target.vocabulary, 0)
        texts = [
            (
                target.tokenizer.decode(row.generation.prompt_ids),
                target.tokenizer.decode(row.generation.response_ids),
            )
            for row in found.rows
        ]
        kept = [text for row, text in zip(found.rows, texts, strict=True) if not row.generation.fault]
        faults = [row.generation.fault for row in found.rows if row.generation.fault]
        return kept, {**{key: n for key, n in found.refused.items() if n}, **dict.fromkeys(faults, 1)}

    return of


@pytest.mark.parametrize("name", EQUAL)
def test_the_same_talk_is_read_from_every_program(name: str, read: Any) -> None:
    wanted = f"<|user|>\n{ASK}<|end|>\n<|assistant|>\n", f"{SAID}<|end|>"
    assert read(EQUAL[name]) == ([wanted], {})


OPENS = "{{ messages[0].content }}<think>{{ '</think>' if enable_thinking is false }}"


@pytest.mark.parametrize(
    ("line", "said", "kept", "refused"),
    [
        ({}, SAID, [], {"thinking": 1}),
        ({}, f"hm</think>{SAID}", [(f"{ASK}<think>", f"hm</think>{SAID}<|end|>")], {}),
        (
            {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
            SAID,
            [(f"{ASK}<think></think>", f"{SAID}<|end|>")],
            {},
        ),
    ],
)
def test_an_answer_stands_behind_the_thinking_that_its_template_began(
    line: dict[str, Any], said: str, kept: list[Any], refused: dict[str, int], read: Any
) -> None:
    answer = {**CHOICE, "message": {**ANSWER, "content": said}}
    assert read({**GOOD, **line, "choices": [answer]}, template=OPENS) == (kept, refused)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_more_than_text_is_left_out_by_its_reason_wherever_it_stands(name: str, read: Any) -> None:
    line, reason = LEFT_OUT[name]
    kept, refused = read(GOOD, line)
    assert len(kept) == 1
    assert refused == {reason: 1}


@pytest.mark.parametrize(
    ("asked", "told", "ends"),
    [
        ({}, {}, True),
        ({"stop": ["."]}, {}, False),  # the string may have ended it
        ({"stop": ["."]}, {"stop_reason": "."}, False),
        ({"stop": ["."]}, {"stop_reason": None}, True),  # vLLM: null is the EOS
        ({}, {"finish_reason": "length"}, False),
    ],
)
def test_an_eos_stands_only_where_the_log_says_so(asked: Any, told: Any, ends: bool, read: Any) -> None:
    [(_, said)], _ = read({**GOOD, **asked, "choices": [{**CHOICE, **told}]})
    assert said.endswith("<|end|>") is ends


def test_a_prefix_that_the_server_goes_on_with_is_rendered(read: Any) -> None:
    begun = {"messages": [USER, {"role": "assistant", "content": "Sure: "}], "continue_final_message": True}
    [(prompt, _)], _ = read({**begun, "add_generation_prompt": False, "choices": [CHOICE]})
    assert prompt.endswith("<|assistant|>\nSure: ")


@pytest.mark.parametrize(
    "line", [{"messages": 5}, {"message": {}}, {"choices": [5]}, {"prompt": [[]]}, {"input": 7}]
)
def test_a_damaged_line_ends_in_one_line(line: dict[str, Any], read: Any) -> None:
    with pytest.raises(DataError, match="line 1"):
        read(line)
