"""Templates as published models write them: words as text or as parts, the clock, arguments, thinking; and that
a prompt holds what was asked.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conftest import CHAT_TEMPLATE, write_tokenizer
from fastdraft.data.chat import ChatTemplate, Conversation
from fastdraft.errors import RecipeError, TargetError
from fastdraft.functional.generation import Generation
from fastdraft.recipe.base import load_config
from fastdraft.recipe.run import TargetConfig
from fastdraft.run_folder import RunFolder


def turns(words: str) -> str:
    """A template whose turns hold `words`."""
    begin, end = "{% for m in messages %}<|{{ m['role'] }}|>\n", "<|end|>\n{% endfor %}"
    return f"{begin}{words}{end}{{% if add_generation_prompt %}}<|assistant|>\n{{% endif %}}"


PARTS = turns(
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] }}{% endfor %}"
)
INDEX = turns("{{ m['content'][0]['text'] }}")
STRING = turns("{{ m['content'] }}")
EITHER = turns(
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] | upper }}{% endif %}"
)
MIXED = turns("{{ m['content'] if m['role'] == 'assistant' else m['content'][0]['text'] }}")
ONLY_PARTS = turns("{{ raise_exception('no parts') if m['content'] is string else m['content'][0]['text'] }}")
LLAMA = (
    "{% if date_string is not defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}Today Date: {{ date_string }}\n"
    + STRING
)
CLOCK = "{{ strftime_now('%Y-%m-%d') }}\n" + STRING
THINKS = STRING.replace(
    "<|assistant|>\n{% endif %}",
    "<|assistant|>\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
TALK = Conversation(("First?", "Second?"), "Be brief.")
WHOLE = "<|system|>\nBe brief.<|end|>\n<|user|>\nFirst?<|end|>\n<|assistant|>\nOne.<|end|>\n<|user|>\nSecond?<|end|>\n<|assistant|>\n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def chat_of(tokenizer: Any, template: str, **settings: Any) -> ChatTemplate:
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, **settings)


@pytest.mark.parametrize("template", [STRING, PARTS, INDEX, EITHER, MIXED, ONLY_PARTS])
def test_every_word_stands_in_the_prompt_whether_a_template_reads_text_or_parts(
    tokenizer: Any, template: str
) -> None:
    chat = chat_of(tokenizer, template)
    assert not chat.note([TALK])
    assert tokenizer.decode(chat.prompt_ids(TALK, ["One."])) == WHOLE
    assert tokenizer.decode(chat.prompt_ids("First?")) == "<|user|>\nFirst?<|end|>\n<|assistant|>\n"
    assert tokenizer.decode(chat.user_prefix_ids()) == "<|user|>\n"
    assert chat.render([{"role": "user", "content": "a"}]).messages == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("<|user|>\n<|end|>\n", "drops the user's words"),
        (turns("{{ m['words'] }}"), "drops the user's words"),
        (turns("{{ m['content'] }} {{ m['content'] }}"), "repeats the user's words"),
        (turns("{{ m['content'][:10] }}"), "drops the user's words"),
        ("{{ raise_exception('not today') }}", "not today"),
    ],
)
def test_a_template_that_drops_the_words_in_both_forms_is_one_line(
    tokenizer: Any, template: str, words: str
) -> None:
    for ask in (lambda chat: chat.prompt_ids("a"), lambda chat: chat.note([Conversation(("a",))])):
        with pytest.raises(TargetError, match=words) as failure:
            ask(chat_of(tokenizer, template))
        assert "\n" not in str(failure.value)
    assert tokenizer.decode(chat_of(tokenizer, template).prompt_ids("a", chat=False)) == "a"


def test_a_template_that_forgets_earlier_questions_is_refused_for_conversations(tokenizer: Any) -> None:
    forgets = STRING.replace("in messages", "in messages[-2:]")
    chat = chat_of(tokenizer, forgets)
    assert chat.prompt_ids("a")
    with pytest.raises(TargetError, match="drops earlier answers|earlier"):
        chat.note([TALK])


@pytest.mark.parametrize(
    ("template", "arguments", "begins", "served"),
    [
        (LLAMA, {}, "Today Date: 24 Dec 2023\n", {"date_string": "24 Dec 2023"}),
        (LLAMA, {"date_string": "1 May 1999"}, "Today Date: 1 May 1999\n", {"date_string": "1 May 1999"}),
        (CLOCK, {}, "2023-12-24\n", {}),
        (CHAT_TEMPLATE, {}, "<|user|>\n", {}),
    ],
)
def test_a_template_that_asks_for_today_is_told_the_day_of_the_run(
    tokenizer: Any, template: str, arguments: dict[str, Any], begins: str, served: dict[str, str]
) -> None:
    chat = chat_of(tokenizer, template, arguments=arguments, date=datetime.date(2023, 12, 24))
    prompt = chat.render([{"role": "user", "content": "a"}])
    assert tokenizer.decode(prompt).startswith(begins)
    assert prompt.arguments == served
    assert chat.settings["date"] == ("2023-12-24" if "strftime_now" in template else None)


def test_a_run_keeps_the_day_on_which_it_was_begun(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.date == datetime.date.today()
    (tmp_path / "begun.json").write_text('"2020-02-29"')
    run.keep_date()
    assert run.date == datetime.date(2020, 2, 29)
    other = RunFolder(tmp_path / "other")
    other.keep_date()
    assert (other.root / "begun.json").read_text() == f'"{datetime.date.today()}"\n'


def test_arguments_of_the_recipe_reach_the_template_and_the_server(tokenizer: Any) -> None:
    off = chat_of(tokenizer, THINKS, arguments={"enable_thinking": False})
    prompt = off.render([{"role": "user", "content": "a"}])
    assert tokenizer.decode(prompt).endswith("<|assistant|>\n<think>\n\n</think>\n\n")
    assert prompt.arguments == {"enable_thinking": False}
    assert not tokenizer.decode(chat_of(tokenizer, THINKS).prompt_ids("a")).endswith("</think>\n\n")
    with pytest.raises(RecipeError, match="target.chat_template_kwargs.*'tokenize' is set by FastDraft"):
        load_config(TargetConfig, {"model": "m", "chat_template_kwargs": {"tokenize": True}}, "target")


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("◁think▷", "◁/think▷"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|reasoning_start|>", "<|reasoning_end|>"),
        ("[REASONING]", "[/REASONING]"),
        ("<think>", "</think>"),
    ],
)
def test_thinking_is_told_by_the_tokenizers_own_marks(tokenizer: Any, begin: str, end: str) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": [begin, end]})
    chat = chat_of(tokenizer, STRING)
    assert (begin, end) in chat.thinking

    def answer(text: str, chat: ChatTemplate = chat) -> str | None:
        return chat.answer(Generation([1], tokenizer(text).input_ids, [], "length"))

    assert answer(f"{begin}hm") is None
    assert answer(f"{begin}hm{end}One.") == f"{begin}hm{end}One."
    opens = chat_of(
        tokenizer, STRING.replace("<|assistant|>\n{% endif %}", f"<|assistant|>\n{begin}{{% endif %}}")
    )
    assert answer("hm", opens) is None
    assert answer(f"hm{end}One.", opens) == f"{begin}hm{end}One."
