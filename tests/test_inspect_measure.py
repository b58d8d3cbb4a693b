"""`inspect --measure`: what follows from measured passes, and that nothing is left behind. No time is asserted."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fastdraft import cli
from fastdraft.commands import inspect_measure
from fastdraft.commands.inspect_forecast import DraftCost, Measurement
from fastdraft.commands.inspect_measure import MeasureSettings, settings_of
from fastdraft.errors import RecipeError
from fastdraft.forecast import PAPER_K, RATES, acceptance_rate, block_efficiency, conditional_acceptance_rate
from fastdraft.modeling.architecture import Architecture
from fastdraft.target import Target

RUNTIME = {
    "name": "openvino",
    "version": "2026.4.1",
    "device": "CPU",
    "device_name": "A Processor",
    "threads": 2,
}


@pytest.fixture
def shape(tiny_target: Path) -> Architecture:
    return Target.at(tiny_target).architecture


def measurement(shape: Architecture, *draft_seconds: float) -> Measurement:
    drafts = [
        DraftCost(
            f"{64 * (i + 1)}x2",
            replace(shape, hidden_size=64 * (i + 1), num_layers=2),
            "int8",
            True,
            seconds,
            0.1,
        )
        for i, seconds in enumerate(draft_seconds)
    ]
    of_target = {1: 0.100, 2: 0.105, 3: 0.110, 4: 0.115, 5: 0.130, 6: 0.140}
    return Measurement(RUNTIME, 128, 15, "int4", True, of_target, drafts, (1, 2, 3, 4, 5))


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
            speedup for draft in measured["drafts"] for speedup in draft["predicted_speedup"][rate].values()
        )
        assert best["predicted_speedup"] == highest
        assert best["use_a_draft"] == (highest > 1)
        chosen = next(draft for draft in measured["drafts"] if draft["name"] == best["draft"])
        assert chosen["predicted_speedup"][rate][str(best["num_speculative_tokens"])] == highest


def test_the_forecast_follows_from_the_measured_passes(shape: Architecture) -> None:
    measured = measurement(shape, 0.002, 0.02).as_dict()
    check_forecast(measured)
    assert measured["best"]["0.6"]["draft"] == "64x2"
    assert set(measured["best"]) == {str(rate) for rate in RATES}
    assert json.loads(json.dumps(measured)) == measured


def test_the_tables_fit_80_columns_and_name_the_best_draft(shape: Architecture) -> None:
    found = measurement(shape, 0.002, 0.02)
    text = found.text()
    assert max(map(len, text.splitlines())) <= 80
    draft, k, speedup = found.best(0.6)
    assert (
        f"At an acceptance rate of 0.6, {draft.name} at K = {k} is forecast to be {speedup:.2f} times as fast."
        in " ".join(text.split())
    )
    assert "Do not use a draft here" not in text


def test_a_draft_that_never_pays_is_advised_against(shape: Architecture) -> None:
    found = measurement(shape, 0.09)
    assert found.sentence().startswith("Do not use a draft here: ")
    assert not any(best["use_a_draft"] for best in found.as_dict()["best"].values())


def test_a_draft_pays_above_the_acceptance_rate_at_which_its_forecast_is_1(shape: Architecture) -> None:
    found = measurement(shape, 0.02, 0.09, 0.2)
    cheap, dear, hopeless = (found.break_even(draft) for draft in found.drafts)
    assert cheap is not None
    assert dear is not None
    assert 0 < cheap < dear < 1
    assert hopeless is None
    assert found.speedup(found.drafts[0], cheap, found.best_k(found.drafts[0], cheap)) == pytest.approx(1)
    assert found.as_dict()["drafts"][2]["break_even_acceptance_rate"] is None


def test_settings_without_measure_are_refused() -> None:
    assert settings_of({"measure": False}) is None
    assert settings_of({"measure": True, "threads": 2, "target": "x"}) == MeasureSettings(threads=2)
    with pytest.raises(RecipeError, match="--draft-weights: given without --measure"):
        settings_of({"measure": False, "draft_weights": "int8"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-speculative-tokens", "0"], "must be at least 1"),
        (["--prefix", "0"], "--prefix"),
        (["--threads", "-1"], "--threads"),
        (["--draft", "wide"], "HIDDENxLAYERS"),
        (["--draft", "0x2"], "at least 1"),
        (["--device", "GPU.7"], "OpenVINO sees"),
    ],
)
def test_wrong_settings_are_one_line(
    tiny_target: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino_genai")
    assert cli.main(["inspect", str(tiny_target), "--json", "--measure", *arguments]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdraft: ")]
    assert len(told) == 1
    assert words in told[0]


def test_without_openvino_the_extra_is_named(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    assert cli.main(["inspect", str(tiny_target), "--json", "--measure", "--draft", "16x1"]) == 2
    assert "fastdraft[openvino]" in capsys.readouterr().err


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_target_and_drafts_are_measured_untrained_and_nothing_is_left(
    tiny_target: Path,
    tmp_path: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not all(
        find_spec(name) for name in ("openvino_genai", "nncf", "optimum")
    ):  # imported here, nncf would log to our stdout
        pytest.skip("OpenVINO's converter is not installed")
    bare = tmp_path / "target"
    bare.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((tiny_target / name).read_bytes())
    monkeypatch.setattr(inspect_measure, "REPEATS", 2)
    arguments = [
        "--measure",
        "--draft",
        "16x1",
        "32x1",
        "--num-speculative-tokens",
        "3",
        "1",
        "--weights",
        "int8",
        "--threads",
        "1",
    ]
    assert cli.main(["inspect", str(bare), "--json", *arguments]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert {key: measured["runtime"][key] for key in ("name", "device", "threads")} == {
        "name": "openvino",
        "device": "CPU",
        "threads": 1,
    }
    assert (measured["prefix_tokens"], measured["repeats"]) == (128, 2)
    assert measured["target"]["weights"] == "int8"
    assert measured["target"]["random"] is True
    assert list(measured["target"]["seconds"]) == ["1", "2", "4"]
    assert [draft["name"] for draft in measured["drafts"]] == ["16x1", "32x1"]
    check_forecast(measured)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemError, "SIGTERM"])
def test_the_temporary_folder_goes_however_it_ends(
    tiny_target: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException] | str
) -> None:
    pytest.importorskip("openvino_genai")

    def end(models: Any, tokenizer: str, revision: str | None, temporary: Path, console: Any) -> None:
        (temporary / "target").mkdir()
        assert list(scratch.iterdir())
        if isinstance(ending, str):
            signal.raise_signal(signal.SIGTERM)
        else:
            raise ending

    monkeypatch.setattr(inspect_measure, "_build", end)
    before = signal.getsignal(signal.SIGTERM)
    if ending is SystemError:
        with pytest.raises(SystemError):
            cli.main(["inspect", str(tiny_target), "--measure", "--draft", "16x1"])
    else:
        assert cli.main(["inspect", str(tiny_target), "--measure", "--draft", "16x1"]) == 130
    assert list(scratch.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
