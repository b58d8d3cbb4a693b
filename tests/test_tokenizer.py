"""The tokenizer that is loaded is the one in the file, whatever class is declared; what else its files say."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from conftest import CHAT_TEMPLATE, SPECIAL, TEXT
from fastdraft.data.chat import ChatTemplate
from fastdraft.data.logs import read_transcripts
from fastdraft.data.tokenize import DocumentEncoder
from fastdraft.errors import TargetError
from fastdraft.modeling.families import MULTIMODAL, TARGET_FAMILIES
from fastdraft.modeling.tokenizer import UnknownId
from fastdraft.modeling.traps import find_traps
from fastdraft.recipe.synthesize import TranscriptPrompts
from fastdraft.target import Target

CLASSES = ["LlamaTokenizerFast", "GPT2Tokenizer", "GPTNeoXTokenizer", "CohereTokenizer", None]
KINDS = ["byte-level", "sentencepiece", "unigram"]
STRINGS = [*TEXT, "x = 12345 != 0x1F", " a  b\t\tc\n\n\n  d", "数学 😀é", "", " lead", "x<|end|>y <|user|> z"]


def kind_of_tokenizer(kind: str) -> Tokenizer:
    """A small one: byte-level BPE whose digits stand alone, BPE as sentencepiece writes it, or Unigram."""
    told: Any = {"special_tokens": ["<unk>", *SPECIAL], "show_progress": False, "vocab_size": 320}
    if kind == "unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        core.train_from_iterator(TEXT, trainers.UnigramTrainer(unk_token="<unk>", **told))
    elif kind == "sentencepiece":
        core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        core.train_from_iterator(TEXT, trainers.BpeTrainer(**told))
    else:
        core = Tokenizer(models.BPE())
        digits = pre_tokenizers.Digits(individual_digits=True)
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        core.decoder = decoders.ByteLevel()
        core.train_from_iterator(
            TEXT, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **told)
        )
    return core


@pytest.fixture(scope="module")
def kinds() -> dict[str, Tokenizer]:
    return {kind: kind_of_tokenizer(kind) for kind in KINDS}


PAIRS = [(*pair, KINDS[place % 3]) for place, pair in enumerate(itertools.product(TARGET_FAMILIES, CLASSES))]
PAIRS += [("llama", name, kind) for name in CLASSES for kind in KINDS if ("llama", name, kind) not in PAIRS]


@pytest.mark.parametrize(("family", "declared", "kind"), PAIRS)
def test_ids_are_those_of_tokenizer_json_for_every_family_and_class(
    tmp_path: Path, kinds: dict[str, Tokenizer], family: str, declared: str | None, kind: str
) -> None:
    text: dict[str, Any] = {"vocab_size": 320}
    text |= {"model_type": "mistral"} if family in ("llava", "mistral3") else {}
    inner = {"text_config": text} if family in MULTIMODAL else text
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **inner}))
    kinds[kind].save(str(tmp_path / "tokenizer.json"))
    told: dict[str, Any] = {"eos_token": "<|end|>", "bos_token": "<|endoftext|>"}
    told |= {"tokenizer_class": declared} if declared else {}
    told["split_special_tokens"] = True
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    alone, tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), Target.at(tmp_path).tokenizer
    assert [tokenizer(text).input_ids for text in STRINGS] == [alone.encode(text).ids for text in STRINGS]
    found, wanted = json.loads(tokenizer.backend_tokenizer.to_str()), json.loads(alone.to_str())
    for part in ("normalizer", "pre_tokenizer", "decoder", "model"):
        assert found[part] == wanted[part]


def changed(source: Path, folder: Path, name: str = "tokenizer_config.json", **values: Any) -> Path:
    """A copy of a target's folder with other values in one of its JSON files; None takes a key out."""
    if not folder.exists():
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    old = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    new = {key: value for key, value in {**old, **values}.items() if value is not None}
    (folder / name).write_text(json.dumps(new))
    return folder


NAMED = [
    {"name": name, "template": f"{name}: {{{{ messages[0]['content'] }}}}"} for name in ("default", "rag")
]
IMAGE = {"id": 320, "content": "<image>", "special": True}
IMAGE |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
WORD = {**IMAGE, "content": "wordless", "special": False}


def with_added(folder: Path, token: dict[str, Any]) -> Path:
    """The tokenizer filled up to the config's 320 rows, and one token more."""
    state = json.loads((folder / "tokenizer.json").read_text())
    extra = [{**IMAGE, "id": place, "content": f"<{place}>"} for place in range(300, 320)]
    return changed(folder, folder, "tokenizer.json", added_tokens=[*state["added_tokens"], *extra, token])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"tokenizer_class": "LlamaTokenizerFast"},
            "tokenizer_class LlamaTokenizerFast: transformers 5 puts",
        ),
        ({"tokenizer_class": None}, "No tokenizer_class: transformers"),
        ({"pad_token": "[PAD]"}, "id 300 [PAD]"),
        ({"chat_template": NAMED}, "Several chat templates (default, rag): `default` is used"),
        ({"chat_template": NAMED[1:]}, "Chat templates rag, and none is the default"),
    ],
)
def test_what_tokenizer_config_says_is_told(
    tiny_target: Path, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    folder = changed(tiny_target, tmp_path / "t", **values)
    (folder / "chat_template.jinja").unlink()
    if "pad_token" in values:
        changed(folder, folder, "config.json", vocab_size=300)
    assert [trap for trap in find_traps(Target.at(folder)) if said in trap]
    assert not [trap for trap in find_traps(Target.at(tiny_target)) if said in trap]


def test_a_token_without_a_row_is_told_and_only_a_text_that_holds_it_refused(
    tiny_target: Path, tmp_path: Path
) -> None:
    target = Target.at(with_added(changed(tiny_target, tmp_path / "t", pad_token="<image>"), IMAGE))
    assert "id 320 <image> has no row: never fed, never proposed." in find_traps(target)
    assert (target.vocabulary.num_tokens, target.vocabulary.pad_token_id) == (320, 0)
    assert ChatTemplate(target.tokenizer).prompt_ids("A fox")
    with pytest.raises(UnknownId, match=r"a text holds <image> \(id 320\)"):
        ChatTemplate(target.tokenizer).prompt_ids("A fox <image>")
    path = tmp_path / "log.jsonl"
    rows = [{"prompt": f"A {word}", "response": "A fox.", "temperature": 0} for word in ("fox", "<image>")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = TranscriptPrompts(kind="transcripts", name="log", path=str(path))
    assert (
        read_transcripts(log, ChatTemplate(target.tokenizer), target.vocabulary, 0).refused["unknown_id"] == 1
    )


def test_corpora_read_a_word_without_a_row_as_its_letters(tiny_target: Path, tmp_path: Path) -> None:
    target = Target.at(with_added(changed(tiny_target, tmp_path / "t"), WORD))
    assert target.tokenizer("wordless").input_ids == [320]
    [ids] = DocumentEncoder(target.tokenizer, 320).encode(["wordless"])
    assert (len(ids) > 1, max(ids) < 300) == (True, True)


def test_an_eos_behind_every_text_is_left_out_of_prompts_and_told(tiny_target: Path, tmp_path: Path) -> None:
    folder = changed(tiny_target, tmp_path / "t")
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [("<|endoftext|>", 0), ("<|end|>", 3)]
    core.post_processor = processors.TemplateProcessing("<|endoftext|> $A <|end|>", None, special)
    core.save(str(folder / "tokenizer.json"))
    target = Target.at(folder)
    whole = target.tokenizer("A fox").input_ids
    assert (whole[0], whole[-1]) == (0, 3)
    assert ChatTemplate(target.tokenizer).prompt_ids("A fox", chat=False) == whole[:-1]
    assert [trap for trap in find_traps(target) if "puts <|end|> behind every text" in trap]


def test_dropout_of_merges_is_switched_off_and_told(tiny_target: Path, tmp_path: Path) -> None:
    folder = changed(tiny_target, tmp_path / "t")
    state = json.loads((folder / "tokenizer.json").read_text())
    changed(folder, folder, "tokenizer.json", model={**state["model"], "dropout": 0.9})
    target = Target.at(folder)
    assert target.tokenizer(TEXT[0]).input_ids == Target.at(tiny_target).tokenizer(TEXT[0]).input_ids
    assert any("at random (0.9)" in trap for trap in find_traps(target))


def test_a_processors_chat_template_counts_and_a_list_needs_a_default(
    tiny_target: Path, tmp_path: Path
) -> None:
    def rendered(folder: Path) -> str:
        tokenizer = Target.at(folder).tokenizer
        return str(tokenizer.decode(ChatTemplate(tokenizer).prompt_ids("Hello")))

    wanted = rendered(tiny_target)
    folder = changed(tiny_target, tmp_path / "t", "chat_template.json", chat_template=CHAT_TEMPLATE)
    (folder / "chat_template.jinja").unlink()
    assert rendered(folder) == wanted
    assert "The chat template is the processor's, of chat_template.json." in find_traps(Target.at(folder))
    (folder / "chat_template.json").unlink()
    extra = folder / "additional_chat_templates"
    extra.mkdir()
    (extra / "rag.jinja").write_text("rag")
    with pytest.raises(TargetError, match="chat templates rag; one must be the default"):
        rendered(folder)
    changed(folder, folder, chat_template=NAMED)
    assert rendered(folder) == "default: Hello"


@pytest.mark.parametrize(
    ("declared", "said"), [("GPT2Tokenizer", ""), ("LlamaTokenizer", "LlamaTokenizer, which does not read")]
)
def test_vocab_and_merges_are_read_by_a_class_that_knows_them(
    tiny_target: Path, tmp_path: Path, declared: str, said: str
) -> None:
    folder = changed(tiny_target, tmp_path / "t", tokenizer_class=declared)
    wanted = Target.at(folder).tokenizer(TEXT[1]).input_ids
    Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    if not said:
        assert Target.at(folder).tokenizer(TEXT[1]).input_ids == wanted
        assert any("No tokenizer.json: the rules" in trap for trap in find_traps(Target.at(folder)))
        return
    with pytest.raises(TargetError, match=said):
        _ = Target.at(folder).tokenizer


@pytest.mark.parametrize(("head", "library"), [(b"\n\x0e", "sentencepiece"), (b"IQ== 0\n", "tiktoken")])
def test_the_library_that_a_tokenizer_model_needs_is_named(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes, library: str
) -> None:
    folder = changed(tiny_target, tmp_path / "t")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(head)
    monkeypatch.setattr("fastdraft.modeling.tokenizer.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=f"needs {library}, which is not installed"):
        _ = Target.at(folder).tokenizer


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer_config.json", "[1]", "tokenizer_config.json: a JSON list; must be an object"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template 5; must be text, or a list"),
        ("tokenizer_config.json", '{"chat_template": ["x"]}', "chat_template .'x'.; must be text, or a list"),
        ("chat_template.json", "{{ x }}", "chat_template.json: not JSON"),
        ("generation_config.json", "[1]", "generation_config.json: .*; must be a JSON object"),
    ],
)
def test_a_file_of_another_kind_is_one_line(
    tiny_target: Path, tmp_path: Path, name: str, text: str, said: str
) -> None:
    (changed(tiny_target, tmp_path / "t") / name).write_text(text)
    with pytest.raises(TargetError, match=said) as caught:
        _ = Target.at(tmp_path / "t").vocabulary
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("eos", "ends"), [(-1, (3,)), ([-1, 5], (3, 5)), (99999, None), ([3, 320], None)])
def test_an_eos_of_minus_one_is_none_and_one_without_a_row_is_refused(
    tiny_target: Path, tmp_path: Path, eos: Any, ends: tuple[int, ...] | None
) -> None:
    target = Target.at(changed(tiny_target, tmp_path / "t", "generation_config.json", eos_token_id=eos))
    if ends:
        assert target.vocabulary.eos_token_ids == ends
    else:
        with pytest.raises(TargetError, match="eos_token_id .*; must be below the vocab_size of 320"):
            _ = target.vocabulary
