"""Chat templates: how prompts are rendered, and where the user's words stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conftest import write_tokenizer
from fastdraft.data.chat import (
    end_of_turn_ids,
    has_chat_template,
    plain_prefix_ids,
    prompt_ids,
    render_prompt,
    special_ids,
    user_prefix_ids,
)
from fastdraft.errors import TargetError

HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def plain(tmp_path: Path) -> PreTrainedTokenizerBase:
    write_tokenizer(tmp_path, chat=False)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_a_rendered_prompt_is_the_template_up_to_where_the_answer_begins(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = render_prompt(tokenizer, HELLO)
    assert tokenizer.decode(ids) == "<|user|>\nHello there<|end|>\n<|assistant|>\n"
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|user|>")


def test_rendering_agrees_with_the_tokenizers_own_encoding(tokenizer: PreTrainedTokenizerBase) -> None:
    own = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    assert render_prompt(tokenizer, HELLO) == list(own)


def test_the_user_prefix_is_the_beginning_of_every_rendered_prompt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prefix = user_prefix_ids(tokenizer)
    assert tokenizer.decode(prefix) == "<|user|>\n"
    assert render_prompt(tokenizer, HELLO)[: len(prefix)] == prefix


def test_the_end_of_a_users_turn_is_found_in_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    assert end_of_turn_ids(tokenizer) == {tokenizer.convert_tokens_to_ids("<|end|>")}


def test_a_template_that_ends_turns_with_plain_text_has_no_end_of_turn_id(
    plain: PreTrainedTokenizerBase,
) -> None:
    plain.chat_template = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Assistant:"
    assert end_of_turn_ids(plain) == frozenset()
    assert plain.decode(user_prefix_ids(plain)) == "User: "


def test_a_template_that_drops_the_users_words_is_refused(plain: PreTrainedTokenizerBase) -> None:
    plain.chat_template = "Assistant:"
    with pytest.raises(TargetError, match="drops the user's words"):
        user_prefix_ids(plain)


def test_a_template_that_fails_is_one_line(plain: PreTrainedTokenizerBase) -> None:
    plain.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(TargetError, match="no system message"):
        render_prompt(plain, HELLO)


def test_without_a_template_prompts_are_plain_text(plain: PreTrainedTokenizerBase) -> None:
    assert not has_chat_template(plain)
    assert prompt_ids(plain, "Hello there", chat=True) == plain("Hello there").input_ids
    with pytest.raises(TargetError, match="no chat template"):
        render_prompt(plain, HELLO)


def test_plain_prompts_keep_clear_of_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(prompt_ids(tokenizer, "Hello there", chat=False)) == "Hello there"
    assert tokenizer.decode(prompt_ids(tokenizer, "Hello there", chat=True)).startswith("<|user|>")


def test_what_the_tokenizer_puts_before_plain_text_is_found(plain: PreTrainedTokenizerBase) -> None:
    assert plain_prefix_ids(plain) == []
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert plain_prefix_ids(plain) == [0]


def test_added_tokens_count_as_special(tokenizer: PreTrainedTokenizerBase) -> None:
    assert {
        tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
    } <= special_ids(tokenizer)
