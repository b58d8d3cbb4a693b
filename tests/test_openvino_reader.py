"""A model in OpenVINO, read piece by piece, is the model of transformers. Skipped without OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino_genai")
pytest.importorskip("nncf")
pytest.importorskip("optimum.exporters.openvino", exc_type=ImportError)

import torch
from torch import Tensor

from family_fixture import write_family
from fastdraft.decoding.cache import ModelReader
from fastdraft.errors import TargetError
from fastdraft.runtimes import openvino_reader
from fastdraft.runtimes.openvino import core
from fastdraft.runtimes.openvino_export import convert
from fastdraft.runtimes.openvino_reader import OpenVINOModel, OpenVINOReader
from fastdraft.target import Target


@pytest.fixture(scope="module")
def target(exported_target: Path) -> OpenVINOModel:
    return OpenVINOModel(exported_target, "exact", threads=1)


def text(count: int, seed: int = 0) -> Tensor:
    return torch.randint(4, 300, (count,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_logits_are_those_of_transformers_however_the_text_is_cut(
    tiny_target: Path, target: OpenVINOModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_reader, "_PIECE", 16)
    assert target.context_length == 256
    ids, begin = text(125), 0
    theirs, ours = ModelReader(Target.at(tiny_target).model("cpu"), 125), target.reader(125)
    for width, keep in ((61, 1), (1, 1), (4, 4), (17, 3), (2, 1), (40, 40)):
        piece, begin = ids[begin : begin + width], begin + width
        found = ours.read(piece, keep)
        assert found.shape == (keep, 320)
        torch.testing.assert_close(found, theirs.read(piece, keep), atol=1e-4, rtol=0)
        assert ours.length == theirs.length == begin


@pytest.mark.parametrize(("precision", "tolerance"), [("exact", 1e-4), ("fast", 0.05)])
def test_what_is_taken_back_leaves_no_trace(exported_target: Path, precision: str, tolerance: float) -> None:
    model, ids, others = OpenVINOModel(exported_target, precision, 1), text(40), text(5, seed=1)  # type: ignore[arg-type]
    reader = model.reader(64)
    reader.read(ids)
    reader.read(text(8, seed=2))
    reader.take_back(43)
    reader.take_back(99)
    assert reader.length == 43
    taken = reader.read(others, keep=5).clone()
    fresh = model.reader(64)
    fresh.read(torch.cat([ids, text(8, seed=2)[:3]]))
    torch.testing.assert_close(taken, fresh.read(others, keep=5), atol=tolerance, rtol=0)


def test_texts_come_one_after_another_in_the_same_memory(target: OpenVINOModel) -> None:
    def memory(reader: OpenVINOReader) -> list[int]:
        request = reader.request
        names = [*(name for name in request._ports if "_cache." in name), "logits"]
        return [request._request.get_tensor(name).data.ctypes.data for name in names]

    reader = target.reader(200)
    first, before = reader.read(text(30), keep=4).clone(), memory(reader)
    for seed in range(50):
        del reader
        reader = target.reader(100 + seed)
        reader.read(text(20 + seed, seed), keep=1 + seed % 4)
    del reader
    again = target.reader(150)
    assert torch.equal(again.read(text(30), keep=4), first)
    assert memory(again) == before
    assert target._idle == []


def test_texts_read_at_the_same_time_do_not_disturb_each_other(target: OpenVINOModel) -> None:
    one, other = target.reader(60), target.reader(60)
    for reader, seed in ((one, 0), (other, 1), (one, 2), (other, 3)):
        reader.read(text(20, seed))
    alone = target.reader(60)
    alone.read(torch.cat([text(20), text(20, 2)]))
    assert torch.equal(one.read(text(3, 4), keep=3), alone.read(text(3, 4), keep=3))


def test_what_a_reader_cannot_read_is_refused_before_anything_is_written(target: OpenVINOModel) -> None:
    reader = target.reader(20)
    for count, keep in ((21, 1), (0, 0), (3, 4)):
        with pytest.raises(ValueError, match="room for 20"):
            reader.read(text(count), keep)
    assert reader.length == 0


def test_a_model_that_asks_for_more_than_a_text_is_refused(exported_target: Path, tmp_path: Path) -> None:
    import openvino
    from openvino import opset13 as ops

    model = core().read_model(exported_target / "openvino_model.xml")
    kinds = ops.parameter([-1, -1], np.int64, name="token_type_ids")
    kinds.output(0).get_tensor().set_names({"token_type_ids"})
    model.add_parameters([kinds])
    model.add_results([ops.result(kinds)])
    openvino.save_model(model, tmp_path / "openvino_model.xml")
    with pytest.raises(TargetError, match=r"input token_type_ids; must be a text model.*attention") as raised:
        OpenVINOModel(tmp_path, "exact")
    assert "\n" not in str(raised.value)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["granite", "qwen2.5-vl"])
def test_families_with_a_scaled_head_and_of_pictures_are_read_too(family: str, tmp_path: Path) -> None:
    source = write_family(tmp_path / "source", family)
    (tmp_path / "out").mkdir()
    convert(Target.at(source), tmp_path / "out", "fp32")
    ours = OpenVINOModel(tmp_path / "out", "exact", 1).reader(40)
    theirs = ModelReader(Target.at(source).model("cpu"), 40)
    for piece, keep in ((text(9), 2), (text(5, 1), 3)):
        torch.testing.assert_close(ours.read(piece, keep), theirs.read(piece, keep), atol=1e-4, rtol=0)
