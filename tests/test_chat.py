"""Chat templates: how prompts are rendered, and where the user's words stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from conftest import write_tokenizer
from fastdraft.data.chat import ChatTemplate, special_ids
from fastdraft.errors import TargetError
from fastdraft.modeling.tokenizer import ids_around

HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(params=[True])
def tokenizer(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    write_tokenizer(tmp_path, chat=request.param)
    return AutoTokenizer.from_pretrained(tmp_path)


plain = pytest.mark.parametrize("tokenizer", [False], indirect=True, ids=["plain"])


def test_a_prompt_is_rendered_as_the_tokenizer_itself_would(tokenizer: Any) -> None:
    chat = ChatTemplate(tokenizer)
    ids = chat.render(HELLO)
    assert tokenizer.decode(ids) == "<|user|>\nHello there<|end|>\n<|assistant|>\n"
    own = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert ids == list(own["input_ids"]) == chat.prompt_ids("Hello there")
    assert tokenizer.decode(chat.prompt_ids("Hello there", chat=False)) == "Hello there"


def test_the_template_tells_where_the_users_words_begin_and_end(tokenizer: Any) -> None:
    chat = ChatTemplate(tokenizer)
    prefix = chat.user_prefix_ids()
    assert tokenizer.decode(prefix) == "<|user|>\n"
    assert chat.render(HELLO)[: len(prefix)] == prefix
    assert chat.end_of_turn_ids() == {tokenizer.convert_tokens_to_ids("<|end|>")}
    added = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
    assert set(map(tokenizer.convert_tokens_to_ids, added)) <= special_ids(tokenizer)


@plain
def test_a_template_that_ends_turns_with_plain_text_has_no_end_of_turn_id(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Assistant:"
    chat = ChatTemplate(tokenizer)
    assert chat.end_of_turn_ids() == frozenset()
    assert tokenizer.decode(chat.user_prefix_ids()) == "User: "


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("Assistant:", "drops the user's words"),
        ("{{ raise_exception('no system message') }}", "no system message"),
        (None, "no chat template"),
    ],
)
@plain
def test_a_template_of_no_use_is_one_line(tokenizer: Any, template: str | None, words: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(TargetError, match=words):
        ChatTemplate(tokenizer).user_prefix_ids()


@plain
def test_without_a_template_prompts_are_plain_text(tokenizer: Any) -> None:
    chat = ChatTemplate(tokenizer)
    assert chat.prompt_ids("Hello there") == tokenizer("Hello there").input_ids
    assert ids_around(tokenizer) == ([], [])
    begins = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = begins
    assert ids_around(tokenizer) == ([0], [])
