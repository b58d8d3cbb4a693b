"""An exported model as decoding reads it: passes of OpenVINO on a CPU whose end can be taken back.

    model = OpenVINOModel(folder, "exact"); reader = model.reader(capacity=512)
    logits = reader.read(ids_T, keep=4); reader.take_back(reader.length - 2)

It is the graph that GenAI's continuous batching runs: paged attention, and the output matrix over the chosen
rows alone. Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import time
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdraft.errors import FastDraftError, TargetError
from fastdraft.runtimes.openvino import (
    MODEL_FILE,
    Precision,
    check_exported,
    core,
    device_properties,
    openvino_errors,
    output_matrix,
    short,
)
from fastdraft.target import Target

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
_PIECE = 256  # most tokens of a pass over a prompt, as GenAI reads it by its own choice
_ROWS = "logits_rows"  # our input: the tokens of a pass behind which logits are computed
# What a pass is told beside the caches: one value for all texts or several, always of the same shape; and
# what is as long as the pass, or as the text.
_SHAPES = {"max_context_len": (), "past_lens": (1,), "subsequence_begins": (2,), "block_indices_begins": (2,)}
_INPUTS = {"input_ids", "position_ids", "block_indices", _ROWS, *_SHAPES}
_NAMES = (("int4", ("u4", "i4")), ("int8", ("u8", "i8")), ("fp16", ("f16", "bf16")))


class OpenVINOModel:
    """The `Readable` over an export, compiled once.

    fast: as deployed, with arithmetic, dynamic quantisation and cache of OpenVINO's own choice; exact:
    float32 throughout. Texts read one after another share the same memory. `narrow`: of a trimmed head the
    logits are those of its rows alone, and `columns` are their ids.
    """

    device = torch.device("cpu")

    def __init__(
        self, folder: Path, precision: Precision = "fast", threads: int = 0, *, narrow: bool = False
    ) -> None:
        from openvino._offline_transformations import paged_attention_transformation

        properties = device_properties("CPU", precision, threads)
        check_exported(folder)
        self.folder = folder
        with openvino_errors(folder, "OpenVINO could not run it on CPU", "export the model again"):
            model = core().read_model(folder / MODEL_FILE)
            self.weights = weights_of(model)
            paged_attention_transformation(model)
            self.vocab_size = int(model.output("logits").partial_shape[-1].get_length())
            self.columns = _leave_narrow(model) if narrow else None
            _choose_rows(model)
            _refuse_unknown(model, folder)
            self._compiled = core().compile_model(model, "CPU", properties)
        self._num_columns = self.vocab_size if self.columns is None else len(self.columns)
        self._idle: list[_Request] = []  # of texts that are done
        self.seconds = 0.0  # inside OpenVINO, of all passes

    @cached_property
    def context_length(self) -> int:
        """Tokens that the model can read."""
        return Target.at(self.folder).context_length

    def reader(self, capacity: int) -> OpenVINOReader:
        """The model before a text of at most `capacity` tokens."""
        request = self._idle.pop() if self._idle else _Request(self._compiled, self._num_columns)
        request.make_room(capacity)
        reader = OpenVINOReader(self, request, capacity)
        weakref.finalize(reader, self._idle.append, request).atexit = False
        return reader


class OpenVINOReader:
    """One text: the `Reader` of an `OpenVINOModel`.

    The cache is a table of blocks, in order: a longer text takes more of them, what is taken back is written
    over, and nothing is ever copied.
    """

    def __init__(self, model: OpenVINOModel, request: _Request, capacity: int) -> None:
        self.model, self.request, self.capacity, self.length = model, request, capacity, 0

    def read(self, ids_T: Tensor, keep: int = 1) -> Tensor:
        """Reads T more tokens; the logits after each of the last `keep`, [keep, V], V the `columns` if any.

        The next `read` writes over them.
        """
        ids: Ids = ids_T.numpy()
        while len(ids) > max(_PIECE, keep):
            piece = min(_PIECE, len(ids) - max(keep, 1))
            self.prepare(ids[:piece], 0)
            self.run()
            ids = ids[piece:]
        self.prepare(ids, keep)
        self.run()
        return self.request.logits(keep)

    def take_back(self, length: int) -> None:
        """Keeps the first `length` tokens only; nothing happens when fewer were read."""
        self.length = min(self.length, length)

    def prepare(self, ids_T: Ids, keep: int) -> Logits:
        """Sets up a pass over these tokens; where its logits will stand, [keep, V]."""
        request, count = self.request, len(ids_T)
        begin, end = self.length, self.length + count
        if not count or end > self.capacity or keep > count:
            raise ValueError(f"{count} tokens behind {begin}, {keep} kept: there is room for {self.capacity}")
        blocks = -(-end // request.block_size)
        request.tell(end, begin, count, blocks)
        request.show("block_indices", blocks)
        request.show("input_ids", count)[:] = ids_T
        request.show("position_ids", count)[:] = request.places[begin:end]
        request.show(_ROWS, keep)[:] = request.places[count - keep : count]
        return request.show("logits", keep)

    def run(self) -> None:
        """The pass that `prepare` set up."""
        start = time.perf_counter()
        try:
            self.length = self.request.infer()
        except RuntimeError as error:
            found = f"{self.model.folder}: OpenVINO failed: {short(error)}"
            raise FastDraftError(found, "export the model again, or use transformers") from error
        self.model.seconds += time.perf_counter() - start


class _Request:
    """What runs a compiled model, with the cache of one text.

    Inputs and logits stand in memory of ours, of which OpenVINO is told only when a pass has another shape
    than the one before: behind a pass over a large model each such call takes tens of microseconds.
    """

    def __init__(self, compiled: Any, num_columns: int) -> None:
        import openvino

        self._request = compiled.create_infer_request()
        self._ports = {port.get_any_name(): port for port in compiled.inputs}
        self.block_size = int(self._ports["value_cache.0"].partial_shape[2].get_length())
        self._capacity = 0
        self._arrays: dict[str, NDArray[Any]] = {}
        self._tensors: dict[str, dict[int, Any]] = {}  # by name, and by how much of the array they are
        self._shown: dict[str, NDArray[Any]] = {}  # what OpenVINO looks at now
        self._logits: dict[int, Tensor] = {}  # by the tokens they are of
        self._place("logits", np.empty((0, num_columns), np.float32))
        self._last: list[NDArray[np.int32]] = []  # the places that `tell` writes
        for name, shape in _SHAPES.items():
            array = np.zeros(shape, np.int32)
            self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
            self._last.append(array.reshape(-1)[-1:])

    def infer(self) -> int:
        """One pass; how long the text is behind it."""
        self._request.infer(share_inputs=True, share_outputs=True)
        return int(self._last[0][0])

    def make_room(self, capacity: int) -> None:
        """Memory for a text of so many tokens, if it is not there."""
        import openvino

        if capacity <= self._capacity:
            return
        self._capacity, blocks = capacity, -(-capacity // self.block_size)
        for name, port in self._ports.items():
            if name not in _INPUTS:
                sizes = [size.get_length() for size in list(port.partial_shape)[1:]]
                tensor = openvino.Tensor(port.element_type, openvino.Shape([blocks, *sizes]))
                tensor.data[...] = 0
                self._request.set_tensor(name, tensor)
        for name in ("input_ids", "position_ids", _ROWS):
            self._place(name, np.zeros(capacity, np.int64))
        self._place("block_indices", np.arange(blocks, dtype=np.int32))
        self.places: Ids = np.arange(capacity)

    def tell(self, *values: int) -> None:
        """Writes the inputs of one value, or of a 0 and the value, in the order of `_SHAPES`."""
        for last, value in zip(self._last, values, strict=True):
            last[0] = value

    def logits(self, length: int) -> Tensor:
        """Those of so many tokens, [length, V]."""
        if length not in self._logits:
            with torch.inference_mode(False):  # which the next to read may not be in
                self._logits[length] = torch.from_numpy(self._arrays["logits"][:length])
        return self._logits[length]

    def show(self, name: str, length: int) -> NDArray[Any]:
        """The first entries of an input, or the logits of so many tokens, as OpenVINO sees them."""
        shown = self._shown.get(name)
        if shown is not None and len(shown) == length:
            return shown
        import openvino

        if name == "logits" and length > len(self._arrays[name]):
            self._place(name, np.empty((length, self._arrays[name].shape[1]), np.float32))
        view, tensors = self._arrays[name][:length], self._tensors[name]
        if name in self._ports or name == "logits":
            if length not in tensors:
                whole = view[:, None] if name == "logits" else view
                tensors[length] = openvino.Tensor(whole, shared_memory=True)
            self._request.set_tensor(name, tensors[length])
        self._shown[name] = view
        return view

    def _place(self, name: str, array: NDArray[Any]) -> None:
        self._arrays[name], self._tensors[name] = array, {}
        self._shown.pop(name, None)
        if name == "logits":
            self._logits.clear()


def weights_of(model: Any) -> str:
    """int4, int8, fp16 or fp32: the narrowest type among the matrices of an IR."""
    matrices = [op for op in model.get_ops() if op.get_type_name() == "Constant" and len(op.shape) > 1]
    kinds = {op.get_element_type().get_type_name() for op in matrices}
    return next((name for name, types in _NAMES if not kinds.isdisjoint(types)), "fp32")


def _choose_rows(model: Any) -> None:
    """Puts a choice of rows in front of the output matrix, as GenAI does.

    Otherwise a prompt of 1,024 tokens over a vocabulary of 152 k would give 620 MB of logits.
    """
    from openvino import opset13 as ops

    node = output_matrix(model)
    rows = ops.parameter([-1], np.int64, name=_ROWS)
    rows.output(0).get_tensor().set_names({_ROWS})
    hidden = node.input(0)
    chosen = ops.gather(hidden.get_source_output(), rows, ops.constant(0, np.int64))
    hidden.replace_source_output(chosen.output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()


def _leave_narrow(model: Any) -> Tensor | None:
    """Takes away what widens the logits of a trimmed head (openvino_export.py); the ids of its rows.

    None where nothing does. Left there, every pass writes a number for each id, and all are looked at.
    """
    result = model.output("logits").get_node()
    wide = result.input_value(0).get_node()
    padded = wide.input_value(0).get_node() if wide.get_type_name() == "Gather" else wide
    if wide is padded or padded.get_type_name() != "Pad":
        return None
    narrow = padded.input_value(0)
    rows_V = torch.from_numpy(wide.input_value(1).get_node().data.copy())
    result.input(0).replace_source_output(narrow)
    result.output(0).get_tensor().set_names({"logits"})
    model.validate_nodes_and_infer_types()
    # The rows stand in the order of their ids; every other id points behind the last.
    has_row_V: Tensor = rows_V < narrow.partial_shape[-1].get_length()
    return has_row_V.nonzero().squeeze(-1)


def _refuse_unknown(model: Any, folder: Path) -> None:
    """TargetError where a model asks for more than a text and its cache."""
    ports = {port.get_any_name(): port for port in model.inputs}
    caches = {name for name in ports if name.startswith(("key_cache.", "value_cache."))}
    unknown = sorted(set(ports) - _INPUTS - caches) or ["none for a cache of keys"] * (not caches)
    # Positions of several axes are those of pictures; every text family is exported with one.
    axes = ports["position_ids"].partial_shape.rank.get_length() if "position_ids" in ports else 1
    if unknown or axes != 1:
        found = f"input {unknown[0]}" if unknown else f"positions of {axes} axes"
        rule = "must be a text model whose layers are all attention"
        raise TargetError(f"{folder}: {found}; {rule}", "run it with transformers")
