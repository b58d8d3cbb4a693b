"""`inspect --measure`: what follows from measured passes, and that nothing is left behind. No time is
asserted.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from conftest import write_target
from family_fixture import family_config
from fastdraft import cli
from fastdraft.commands import measure
from fastdraft.commands.measure import ByLayers, with_layers
from fastdraft.commands.measurement import MeasuredModel, MeasuredShapes
from fastdraft.forecast import PAPER_K, RATES, acceptance_rate, block_efficiency, conditional_acceptance_rate
from fastdraft.modeling.architecture import Architecture, read_architecture
from fastdraft.modeling.text_part import text_only
from fastdraft.runtimes.openvino_export import export_random
from fastdraft.target import Target

RUNTIME = {"name": "openvino", "version": "2026.4.1", "device": "CPU", "device_name": "A CPU", "threads": 2}
SHAPE = Architecture("llama", 320, 32, 2, 4, 2, 8, 64, False, 256)


def measurement(*draft_seconds: float) -> MeasuredShapes:
    config = LlamaConfig()
    drafts = [
        MeasuredModel(f"{64 * i}x2", replace(SHAPE, hidden_size=64 * i), "int8", config, None, seconds)
        for i, seconds in enumerate(draft_seconds, 1)
    ]
    target = MeasuredModel("target", SHAPE, "int4", config)
    of_target = {1: 0.100, 2: 0.105, 3: 0.110, 4: 0.115, 5: 0.130, 6: 0.140}
    return MeasuredShapes(RUNTIME, 128, 15, target, of_target, drafts, (1, 2, 3, 4, 5))


def check_forecast(measured: dict[str, Any]) -> None:
    """Every forecast follows from the passes beside it."""
    seconds = {int(width): value for width, value in measured["target"]["seconds"].items()}
    for draft in measured["drafts"]:
        assert draft["cost_ratio_latency"] == pytest.approx(draft["seconds"] / seconds[1])
        for rate, by_k in draft["predicted_speedup"].items():
            chance = conditional_acceptance_rate(float(rate))
            assert acceptance_rate(chance, PAPER_K) == pytest.approx(float(rate))
            for k, speedup in by_k.items():
                round_seconds = int(k) * draft["seconds"] + seconds[int(k) + 1]
                assert speedup == pytest.approx(block_efficiency(chance, int(k)) * seconds[1] / round_seconds)
    for rate, best in measured["best"].items():
        highest = max(
            speedup for d in measured["drafts"] for speedup in d["predicted_speedup"][rate].values()
        )
        assert best["predicted_speedup"] == highest
        assert best["use_a_draft"] == (highest > 1)


def test_the_forecast_follows_from_the_measured_passes() -> None:
    measured = measurement(0.002, 0.02).as_dict()
    check_forecast(measured)
    assert measured["best"]["0.6"]["draft"] == "64x2"
    assert set(measured["best"]) == {str(rate) for rate in RATES}
    assert json.loads(json.dumps(measured)) == measured


def test_the_tables_fit_80_columns_and_name_the_best_draft_or_none() -> None:
    hopeless = measurement(0.09)
    assert hopeless.sentence().count("do not use a draft: ") == len(RATES)
    assert not any(best["use_a_draft"] for best in hopeless.as_dict()["best"].values())
    found = measurement(0.002, 0.02)
    text = found.text()
    assert max(map(len, text.splitlines())) <= 80
    draft, k, speedup = found.best(0.6)
    words = f"At an acceptance rate of 0.6, {draft.name} at K = {k} is forecast to be {speedup:.2f} times as fast."
    assert words in " ".join(text.split())
    assert "do not use a draft" not in text


def test_a_draft_pays_above_the_acceptance_rate_at_which_its_forecast_is_1() -> None:
    found = measurement(0.02, 0.09, 0.2)
    cheap, dear, hopeless = (found.break_even(draft) for draft in found.drafts)
    assert cheap is not None
    assert dear is not None
    assert 0 < cheap < dear < 1
    assert hopeless is None
    assert found.speedup(found.drafts[0], cheap, found.best_k(found.drafts[0], cheap)) == pytest.approx(1)


def test_a_deep_models_time_follows_from_two_shallow_ones() -> None:
    shallow, deep = (
        SimpleNamespace(read=lambda width, d=d: 0.5 * width + 0.3 * d, weights="int4") for d in measure.DEPTHS
    )
    whole: Any = ByLayers(shallow, deep, 32)  # type: ignore[arg-type]
    assert whole.read(1) == pytest.approx(0.5 + 0.3 * 32)
    assert whole.read(4) == pytest.approx(2.0 + 0.3 * 32)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2-mixed", "gemma3-pictures", "qwen2-vl", "gpt2", "phi3-longrope"]
)
def test_a_config_can_be_given_another_depth(name: str) -> None:
    config = text_only(family_config(name), tied=False)
    deeper = read_architecture(with_layers(config, 5))
    assert deeper.num_layers == 5
    assert deeper.hidden_size == 32


needs_converter = pytest.mark.skipif(
    not all(find_spec(name) for name in ("openvino_genai", "nncf", "optimum")),
    reason="OpenVINO's converter is not here",
)


@needs_converter
def test_what_a_layer_adds_to_an_export_at_two_depths_holds_for_the_whole_model(
    tiny_target: Path, tmp_path: Path
) -> None:
    import openvino

    target, sizes = Target.at(tiny_target), {}
    for layers in (*measure.DEPTHS, 9):
        folder = tmp_path / str(layers)
        folder.mkdir()
        export_random(with_layers(target.config, layers), target, folder, "int8")
        model = openvino.Core().read_model(folder / "openvino_model.xml")
        kinds = [op.get_type_name() for op in model.get_ops()]
        constants = (op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")
        read = sum(size for size in constants if size > 256)
        sizes[layers] = (kinds.count("MatMul"), kinds.count("ReadValue"), read)
    few, more, whole = sizes.values()
    missing = (9 - measure.DEPTHS[1]) / (measure.DEPTHS[1] - measure.DEPTHS[0])
    assert [b + missing * (b - a) for a, b in zip(few, more, strict=True)] == list(whole)


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--draft", "wide"], "HIDDENxLAYERS"), (["--draft", "0x2"], "at least 1")]
)
def test_wrong_settings_are_one_line(
    tiny_target: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino_genai")
    assert cli.main(["inspect", str(tiny_target), "--json", "--measure", *arguments]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdraft: ")]
    assert len(told) == 1
    assert words in told[0]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@needs_converter
def test_target_and_drafts_are_measured_untrained_and_nothing_is_left(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = write_target(tmp_path / "target", layers=8)
    (target / "model.safetensors").unlink()
    capsys.readouterr()
    monkeypatch.setattr(measure, "REPEATS", 2)
    arguments = [
        "--json",
        "--measure",
        "--draft",
        "16x1",
        "--draft",
        "32x1",
        "-k",
        "3",
        "-k",
        "1",
        "--weights",
        "int8",
        "--threads",
        "1",
    ]
    assert cli.main(["inspect", str(target), *arguments]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert [measured["runtime"][key] for key in ("name", "device", "threads")] == ["openvino", "CPU", 1]
    assert (measured["prefix_tokens"], measured["repeats"]) == (128, 2)
    assert (measured["target"]["weights"], measured["target"]["random"]) == ("int8", True)
    assert list(measured["target"]["seconds"]) == ["1", "2", "4"]
    assert [draft["name"] for draft in measured["drafts"]] == ["16x1", "32x1"]
    check_forecast(measured)
    assert list(scratch.iterdir()) == []


@pytest.fixture
def gguf_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    from gguf_fixture import write_gguf

    monkeypatch.setenv("FASTDRAFT_CACHE", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "t.gguf")


def test_in_llama_cpp_the_file_itself_is_timed_beside_drafts_written_as_files(
    gguf_target: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastdraft.modeling.gguf_files import read_gguf

    timed: list[tuple[str, int, int]] = []

    def seconds(path: Path, width: int, settings: Any, prefix: int) -> list[float]:
        timed.append((path.name, width, read_gguf(path).value("llama.embedding_length")))
        return [0.01 * width] * 5 if path == gguf_target else [0.001] * 5

    monkeypatch.setattr(measure, "pass_seconds", seconds)
    arguments = ["inspect", str(gguf_target), "--measure", "--runtime", "llamacpp", "--draft", "16x1"]
    assert cli.main([*arguments, "--draft", str(gguf_target), "-k", "3", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert timed == [("t.gguf", 1, 32), ("model.gguf", 1, 16), ("t.gguf", 1, 32), ("t.gguf", 4, 32)]
    check_forecast(measured)
    assert measured["target"]["ceiling"] == {"3": 1.0}  # four tokens at the price of four
    assert measured["runtime"]["name"] == "llamacpp"
    assert [draft["weights"] for draft in measured["drafts"]] == ["F32", "Q8_0"]
    assert measured["target"]["weights"] == "F32"
    assert "A free draft that is always right would reach 1.00 at K = 3." in measured["sentence"]
    assert list(scratch.iterdir()) == []
    monkeypatch.setattr(measure, "pass_seconds", lambda *asked: [])
    assert cli.main([*arguments, "-k", "3"]) == 2
    assert "does not go on with a text that repeats itself" in capsys.readouterr().err
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--draft-weights", "int4"], "--draft-weights: int4; of a GGUF draft fp32, fp16 or int8"),
        (["--draft", "none.gguf"], "--draft: none.gguf; must be HIDDENxLAYERS, such as 512x6, or a draft's"),
        (["--server", "/no/llama-server"], "server: /no/llama-server: must be llama.cpp's llama-server"),
    ],
)
def test_in_llama_cpp_wrong_settings_are_one_line_too(
    gguf_target: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    measuring = ["--measure", "--runtime", "llamacpp", *arguments]
    assert cli.main(["inspect", str(gguf_target), *measuring]) == 2
    assert words in capsys.readouterr().err


def test_only_a_gguf_file_is_measured_in_llama_cpp(
    tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    assert cli.main(["inspect", str(tiny_target), "--measure", "--runtime", "llamacpp"]) == 2
    assert "no GGUF file; llama.cpp runs a GGUF file; name FILE.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemError, "stop"])
def test_the_temporary_folder_goes_however_it_ends(
    tiny_target: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, ending: Any
) -> None:
    pytest.importorskip("openvino_genai")

    def end(config: Any, tokenizer: Target, folder: Path, weights: str) -> None:
        assert list(scratch.iterdir())
        if ending != "stop":
            raise ending
        import signal

        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(measure, "export_random", end)
    arguments = ["inspect", str(tiny_target), "--measure", "--draft", "16x1"]
    if ending is SystemError:
        with pytest.raises(SystemError):
            cli.main(arguments)
    else:
        assert cli.main(arguments) == 130
    assert list(scratch.iterdir()) == []
