"""Models through GGUF files and back: weights, ids, text; what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from conftest import TEXT, write_recipe
from family_fixture import TARGETS, designed, write_family
from fastdraft import cli
from fastdraft.commands import inspect
from fastdraft.console import Console
from fastdraft.errors import TargetError
from fastdraft.functional.generation import Sampling
from fastdraft.modeling.gguf_fields import pre_tokenizer_name, tokenizer_fields
from fastdraft.modeling.gguf_files import check_pair, read_gguf
from fastdraft.modeling.gguf_tokenizer import SPLITTINGS, tokenizer_files
from fastdraft.recipe.run import TargetConfig
from fastdraft.runtimes.gguf_export import export_gguf
from fastdraft.runtimes.llama_cpp_process import ServerSettings
from fastdraft.runtimes.llama_cpp_server import LlamaServer
from fastdraft.target import Target
from gguf_fixture import write_gguf

WRITTEN = ["llama", "llama-tied", "llama-rope-llama3", "llama-rope-yarn", "llama-rope-linear"]
WRITTEN += ["qwen2", "qwen3", "phi3-longrope"]
STRINGS = [*TEXT, "x = 12345 != 0x1F", " a  b\t\tc\n\n\n  d", "数学 😀é e\u0301"]
STRINGS += ["", " lead", "x<|end|>y <|user|> z"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDRAFT_CACHE", str(tmp_path / "cache"))


TARGETS["qwen2"] = ("qwen2", {"use_sliding_window": False})


def written(source: Target, file: Path, weights: Any = "f32") -> Target:
    export_gguf(source, file, weights, source)
    return Target.at(file)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_model_comes_back_from_its_file_with_its_logits_and_ids(name: str, tmp_path: Path) -> None:
    source = Target.at(write_family(tmp_path / "model", name))
    back = written(source, tmp_path / "m.gguf")
    assert back.vocabulary.size == source.vocabulary.size == 320
    assert back.vocabulary.eos_token_ids[0] == source.vocabulary.eos_token_ids[0]
    for text in STRINGS:
        assert back.tokenizer(text).input_ids == source.tokenizer(text).input_ids
    assert back.tokenizer.chat_template == source.tokenizer.chat_template
    ids = torch.arange(6, 18)[None]  # under the length at which a longrope changes
    with torch.no_grad():
        torch.testing.assert_close(
            back.model("cpu")(ids).logits, source.model("cpu")(ids).logits, atol=2e-4, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["llama", "llama-rope-llama3", "qwen2", "qwen3"])
def test_llama_cpp_writes_the_greedy_text_of_transformers(name: str, tmp_path: Path) -> None:
    source = Target.at(write_family(tmp_path / "model", name))
    export_gguf(source, tmp_path / "m.gguf", "f32", source)
    prompt, model = source.tokenizer(TEXT[0]).input_ids[:12], source.model("cpu")
    own = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
    with LlamaServer(ServerSettings(str(tmp_path / "m.gguf"), room=128, threads=1)) as server:
        found = server.complete(prompt, Sampling(0.0), 6, 0).ids
        assert [
            server.ask("/tokenize", {"content": text, "parse_special": True})["tokens"] for text in STRINGS
        ] == [source.tokenizer(text).input_ids for text in STRINGS]
    assert own[: len(found)] == list(found)


def test_smaller_precisions_make_smaller_files_of_nearly_the_same_model(tmp_path: Path) -> None:
    source = Target.at(write_family(tmp_path / "model", "llama"))
    ids, sizes = torch.arange(6, 18)[None], {}
    wanted = source.model("cpu")(ids).logits
    for weights, off in (("f32", 1e-4), ("f16", 0.05), ("q8_0", 0.5)):
        back = written(source, tmp_path / f"{weights}.gguf", weights)
        assert (back.model("cpu", torch.float32)(ids).logits - wanted).abs().max() < off
        sizes[weights] = sum(
            tensor.size for tensor in read_gguf(tmp_path / f"{weights}.gguf").tensors.values()
        )
    assert sizes["q8_0"] < 0.7 * sizes["f16"] < 0.4 * sizes["f32"]


def test_fields_of_a_gguf_target_are_copied_value_by_value(tmp_path: Path) -> None:
    file = read_gguf(write_gguf(tmp_path / "t.gguf"))
    own = {key: field for key, field in file.fields.items() if key.startswith("tokenizer.")}
    assert tokenizer_fields(Target.at(tmp_path / "t.gguf")) == own


@pytest.mark.parametrize("name", SPLITTINGS)
def test_every_splitting_has_the_name_under_which_it_is_written(name: str) -> None:
    splitting = SPLITTINGS[name]
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        for pattern in splitting.patterns
    ]
    end = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    state = {"model": {"ignore_merges": splitting.whole_words}}
    state |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, end]}}
    assert pre_tokenizer_name(state) == name
    splits[0]["pattern"] = {"Regex": "[a-z]"}
    assert pre_tokenizer_name(state) is None


def changed(source: Path, folder: Path, change: Any) -> Target:
    import shutil

    shutil.copytree(source, folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    change(state)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return Target.at(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "splits texts in a way"),
        (lambda s: s.update(normalizer={"type": "Lowercase"}), "splits texts in a way"),
        (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "splits texts in a way"),
    ],
)
def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused_and_told_by_inspect_and_check(
    change: Any, why: str, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = changed(tiny_target, tmp_path / "t", change)
    with pytest.raises(TargetError, match=why):
        export_gguf(target, tmp_path / "m.gguf", "f16", target)
    assert not (tmp_path / "m.gguf").exists()
    inspect.run(str(tmp_path / "t"), console=Console(quiet=True), as_json=True)
    [told] = [
        trap for trap in json.loads(capsys.readouterr().out)["traps"] if "No draft for llama.cpp" in trap
    ]
    assert why in told
    recipe = write_recipe(tmp_path, tmp_path / "t", export={"formats": ["gguf"]}, benchmark=None)
    assert cli.main(["check", str(recipe)]) == 2
    assert (
        f"{why} that llama.cpp has no name for; leave gguf out of export.formats" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt2", "family gpt2"),
        ("mistral-window", "layers that see 8"),
        ("llama-rope-dynamic", "rope type 'dynamic'"),
    ],
)
def test_a_model_that_llama_cpp_would_run_otherwise_is_refused(name: str, why: str, tmp_path: Path) -> None:
    source = Target.at(write_family(tmp_path / "model", name))
    with pytest.raises(TargetError, match=why):
        export_gguf(source, tmp_path / "m.gguf", "f16", source)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: b"PK" + d[2:], "a GGUF file begins with"),
        (lambda d: d[:10], "the file is cut short"),
        (cut, "cut short or damaged"),
        (lambda d: d[:4] + (9).to_bytes(4, "little") + d[8:], "GGUF version 9"),
        (lambda d: d[:4] + (3).to_bytes(4, "big") + d[8:], "big-endian"),
        (
            lambda d: d.replace(
                b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00llama",
                b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00mamba",
            ),
            "architecture 'mamba'",
        ),
        (lambda d: d.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"), "tokens"),
        (lambda d: d.replace(b"gpt-2", b"gpt-9"), "tokenizer.ggml.pre 'gpt-9'"),
        (
            lambda d: d.replace(b"blk.0.attn_q.weight", b"blk.0.attn_z.weight"),
            "blk.0.attn_z.weight has no place",
        ),
        (lambda d: d.replace(b"a b", b"a_b"), "merges: 'a_b'; must be two tokens"),
        (lambda d: d.replace(b"a b", b"a \x01"), "merges: 'a .x01'; must be two tokens"),
        (
            lambda d: d.replace(b"block_count\x04\x00\x00\x00\x02", b"block_count\x04\x00\x00\x00\x09"),
            "2 layers of tensors, block_count 9",
        ),
    ],
)
def test_a_damaged_or_unknown_file_is_refused_in_one_line(damage: Any, told: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t.gguf")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TargetError, match=told) as caught:
        assert Target.at(path).vocabulary
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def as_field(data: bytes, key: str, kind: int, value: bytes) -> bytes:
    """One field more in front of the others."""
    count = int.from_bytes(data[16:24], "little") + 1
    name = len(key).to_bytes(8, "little") + key.encode()
    return data[:16] + count.to_bytes(8, "little") + name + kind.to_bytes(4, "little") + value + data[24:]


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little")


@pytest.mark.parametrize(
    ("key", "kind", "value", "told"),
    [
        ("general.alignment", 4, number(0), "general.alignment 0; must be a multiple of 8"),
        ("general.alignment", 8, number(1, 8) + b"x", "'x'; must be a multiple of 8"),
        ("split.count", 8, number(1, 8) + b"x", "split.count 'x'; must be a whole number"),
        ("tokenizer.chat_template", 4, number(7), "tokenizer.chat_template 7; must be a text"),
        ("tokenizer.ggml.eot_token_id", 5, b"\xff" * 4, "eot_token_id -1; must be a whole number"),
        ("tokenizer.ggml.scores", 9, number(6) + number(1, 8) + b"\x00\x00\xc0\x7f", "must be a list of numbers"),
        ("tokenizer.ggml.more", 9, number(9) + number(1, 8) + number(4) + number(0, 8), "a value of type 9"),
        ("tokenizer.ggml.more", 9, number(4) + b"\xff" * 8, "cut short or damaged"),
        ("tokenizer.ggml.more", 9, number(8) + b"\xff" * 8, "cut short or damaged"),
        ("llama.rope.freq_base", 8, number(1, 8) + b"x", "rope.freq_base 'x'; must be a number"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_than_its_own_is_refused_in_one_line(
    key: str, kind: int, value: bytes, told: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "t.gguf")
    path.write_bytes(as_field(path.read_bytes(), key, kind, value))
    with pytest.raises(TargetError, match=told) as caught:
        Target.at(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("tokenizer.ggml.unknown_token_id", 9999, "unknown_token_id 9999; must be below 512"),
        ("tokenizer.ggml.scores", [0.0] * 5, "5 scores of 512 tokens"),
    ],
)
def test_a_damaged_sentencepiece_vocabulary_is_refused(
    key: str, value: Any, told: str, tmp_path: Path
) -> None:
    from fastdraft.modeling.gguf_files import GGUFField, GGUFFile

    tokens = ["<unk>", "<s>", "</s>", *(f"t{n}" for n in range(509))]
    fields = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
    }
    fields |= {"tokenizer.ggml.scores": [0.0] * 512, key: value}
    file = GGUFFile(
        tmp_path / "t.gguf", {name: GGUFField(0, None, what) for name, what in fields.items()}, {}
    )
    with pytest.raises(TargetError, match=told):
        tokenizer_files(file)


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "t.gguf").rename(tmp_path / "t-00001-of-00002.gguf")
    with pytest.raises(TargetError, match=r"t-00002-of-00002\.gguf is missing"):
        Target.at(tmp_path / "t-00001-of-00002.gguf")


def test_a_draft_of_another_vocabulary_is_no_pair(tmp_path: Path) -> None:
    target, other = (
        read_gguf(write_gguf(tmp_path / "t.gguf")),
        read_gguf(write_gguf(tmp_path / "d.gguf", size=420)),
    )
    check_pair(target.fields, target.fields, "t")
    with pytest.raises(TargetError, match="must differ by at most 128"):
        check_pair(target.fields, other.fields, "d.gguf")


PACKAGE = [
    ("package:made_up/model.gguf", ""),
    (
        "package:made_up/other.gguf",
        "no other.gguf in {folder}; `pip install --no-deps made-up`, or the package",
    ),
    (
        "package:not_there/model.gguf",
        "no Python package not_there for {python}; `pip install --no-deps not-there`",
    ),
    ("package:made_up", "must be package:MODULE/FILE"),
    ("package:/model.gguf", "must be package:MODULE/FILE"),
    ("package:made.up/model.gguf", "must be package:MODULE/FILE"),
]


@pytest.mark.parametrize(("model", "error"), PACKAGE)
def test_a_file_that_a_python_package_brings_is_found_without_running_its_code(
    model: str,
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "site" / "made_up"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    write_gguf(folder / "model.gguf")
    monkeypatch.syspath_prepend(str(folder.parent))
    assert cli.main(["inspect", model]) == (2 if error else 0)
    told = capsys.readouterr()
    if error:
        assert told.err.startswith(f"fastdraft: target.model: {model}: ")
        assert error.format(folder=folder, python=sys.executable) in told.err
        assert told.err.count("\n") == 1
    else:
        target = Target(TargetConfig(model=model))
        assert target.gguf_file == folder / "model.gguf"
        assert target.identity()["model"] == model


def test_a_sibling_that_is_a_gguf_file_becomes_the_draft_with_its_own_weights(tmp_path: Path) -> None:
    target, sibling = write_gguf(tmp_path / "t.gguf"), write_gguf(tmp_path / "s.gguf", noise=0.02)
    draft = {"kind": "from", "path": str(sibling)}
    folder, manifest = designed(tmp_path / "run", target, draft=draft)
    models = [AutoModelForCausalLM.from_pretrained(folder), Target.at(sibling).model("cpu")]
    weights = [model.state_dict() for model in models]
    assert manifest["initialization"] == "from"
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    write_gguf(sibling, noise=0.03)
    assert designed(tmp_path / "b", target, draft=draft)[1]["shape_digest"] != manifest["shape_digest"]
