"""An exported model of any shape with random weights: what a model costs can be measured before there is one.

Decides how to make it without ever holding it: three layers of the very shape, random in bfloat16, are converted and
compressed as every export is, and the third is then repeated inside the exported files to the full depth. The graph is
the one that a conversion at full depth gives; the repeated layers' weights are copies rotated in memory, so that each
layer has bytes of its own and a pass reads as many as the real model's. A 3.8 B target takes 2 GB of memory and disk
this way, instead of 15 and more.

Norms are drawn around 1 and biases around 0: a conversion drops a multiplication by exactly 1.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from xml.etree import ElementTree

import numpy as np

from fastdraft.errors import FastDraftError
from fastdraft.modeling.architecture import WEIGHT_BITS
from fastdraft.modeling.initialize import STD
from fastdraft.run_folder import write_json
from fastdraft.runtimes.openvino import MODEL_FILE
from fastdraft.runtimes.openvino_export import Weights, convert
from fastdraft.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fastdraft.modeling.architecture import Architecture

CONVERTED_LAYERS = 3
"""The first holds what all share; the edge from the second to the third tells how one layer follows another."""
_BLOCK = CONVERTED_LAYERS - 1
_DEPTH_KEYS = (
    "layer_types",
    "max_window_layers",
    "quantization_config",
    "auto_map",
    "torch_dtype",
    "dtype",
    "transformers_version",
)
_FLOATS_AND_WEIGHTS = ("u4", "i4", "u8", "i8", "f16", "bf16", "f32")
_ROTATED_FROM = 1024
"""Bytes; smaller constants (axes, shapes, epsilons) stay shared."""


def export_random(
    config: PreTrainedConfig, tokenizer: str, folder: Path, weights: Weights, revision: str | None = None
) -> None:
    """Writes an export of random weights into an existing folder; it runs as a real one does and says nothing sensible.

    Args:
        config: The whole shape.
        tokenizer: Directory or hub id whose tokenizer files stand beside the model.
        folder: Existing and empty.
        weights: As for `export_openvino`.
        revision: Of the tokenizer.

    Raises:
        MissingExtra: without openvino, nncf or optimum-intel. TargetError: when the shape cannot be converted.
        FastDraftError: when the converted layers cannot be repeated. FastDraftError: when there is no room.
    """
    layers = int(config.num_hidden_layers)
    shallow = with_layers(config, min(layers, CONVERTED_LAYERS))
    source = folder / "source"
    source.mkdir()
    try:
        write_random(shallow, source)
        Target.at(tokenizer, revision).copy_tokenizer(source)
        convert(source, folder, weights)
    finally:
        shutil.rmtree(source, ignore_errors=True)
    if layers > CONVERTED_LAYERS:
        repeat_last_layer(folder / MODEL_FILE, layers)
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", {**written, "num_hidden_layers": layers})


def needed_bytes(models: Sequence[tuple[Architecture, Weights]]) -> int:
    """Disk that `export_random` takes for all these at its height: the exports, and three layers in 32 and 16 bits of one."""
    finished, converting = 0, 0
    for shape, weights in models:
        vocabulary = (1 if shape.tied else 2) * shape.embedding_parameters
        finished += (
            shape.body_parameters * WEIGHT_BITS[weights] // 8 + vocabulary * max(WEIGHT_BITS[weights], 8) // 8
        )  # no int4 there
        converting = max(
            converting, 6 * (vocabulary + min(shape.num_layers, CONVERTED_LAYERS) * shape.layer_parameters)
        )
    return finished + converting


def check_disk(folder: Path, wanted: int) -> None:
    """Raises:
    FastDraftError: when less than `wanted` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted:
        found = f"{free / 1e9:.1f} GB free"
        raise FastDraftError(
            folder,
            found,
            f"the random models take {wanted / 1e9:.1f} GB",
            "free some space, or set TMPDIR to another disk",
        )


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same config at another depth."""
    values = copy.deepcopy(config.to_dict())
    for key in _DEPTH_KEYS:
        values.pop(key, None)
    return type(config)(**{**values, "num_hidden_layers": layers, "dtype": "bfloat16"})


def write_random(config: PreTrainedConfig, folder: Path, seed: int = 0) -> None:
    """A Hugging Face directory with random bfloat16 weights, written without building the model."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():  # a tied head is not named twice
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0.0, STD, generator=generator)
        tensors[name] = tensor + 1 if "norm" in name and parameter.ndim == 1 else tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


@dataclass(frozen=True)
class _Edge:
    source: str
    source_port: str
    end: str
    end_port: str


def repeat_last_layer(model_file: Path, layers: int) -> None:
    """Repeats the third of three decoder layers of an exported model, in place, until there are `layers`.

    Args:
        model_file: The XML of an IR with `CONVERTED_LAYERS` layers; its weights lie in the `.bin` beside it.
        layers: Wanted depth.

    Raises:
        FastDraftError: when the layers are not named, or not joined, as optimum-intel does it.
    """
    tree = ElementTree.parse(model_file)
    nodes_at, edges_at = tree.getroot().find("layers"), tree.getroot().find("edges")
    if nodes_at is None or edges_at is None:
        raise FastDraftError(
            model_file, "no layers", "must be an OpenVINO model", "see that openvino is current"
        )
    nodes = {node.attrib["id"]: node for node in nodes_at}
    edges = [
        _Edge(*(edge.attrib[key] for key in ("from-layer", "from-port", "to-layer", "to-port")))
        for edge in edges_at
    ]
    before, block = _block(nodes, edges, _BLOCK - 1), _block(nodes, edges, _BLOCK)
    follows = {nodes[i].attrib["name"]: i for i in block}
    chain = {
        edge.source: follows.get(_renumbered(nodes[edge.source].attrib["name"], _BLOCK - 1, _BLOCK))
        for edge in edges
        if edge.source in before and edge.end in block
    }
    kinds = [sorted(nodes[i].attrib["type"] for i in members) for members in (before, block)]
    if not chain or None in chain.values() or kinds[0] != kinds[1]:
        raise FastDraftError(
            model_file,
            "its layers cannot be told apart",
            "each must be built as the one before",
            "report this shape",
        )
    inner = [edge for edge in edges if edge.end in block]
    leaving = [edge for edge in edges if edge.source in block and edge.end not in block]
    new_id = itertools.count(1 + max(map(int, nodes)))
    last = {i: i for i in block}
    with open(model_file.with_suffix(".bin"), "r+b") as weights:
        for layer in range(_BLOCK + 1, layers):
            ids = {i: str(next(new_id)) for i in block}
            nodes_at.extend(_copied(nodes[i], ids[i], layer, weights) for i in block)
            for edge in inner:
                source = ids.get(edge.source) or (
                    last[str(chain[edge.source])] if edge.source in chain else edge.source
                )
                edges_at.append(_element(_Edge(source, edge.source_port, ids[edge.end], edge.end_port)))
            last = ids
    for element, edge in zip(list(edges_at), edges, strict=False):
        if edge in leaving:
            element.set("from-layer", last[edge.source])
    tree.write(model_file, encoding="utf-8", xml_declaration=True)


def _block(nodes: dict[str, Any], edges: list[_Edge], layer: int) -> list[str]:
    """Ids of the operations that belong to one layer alone: those named for it, and what only they read and no other layer names."""
    consumers: dict[str, set[str]] = {i: set() for i in nodes}
    for edge in edges:
        consumers[edge.source].add(edge.end)
    owners = {i: _layer_of(node) for i, node in nodes.items()}
    inside = {i for i in nodes if owners[i] == layer}
    free = {
        i
        for i, node in nodes.items()
        if owners[i] is None and consumers[i] and node.attrib["type"] != "Parameter"
    }
    while more := {i for i in free - inside if consumers[i] <= inside}:
        inside |= more
    return [i for i in nodes if i in inside]


def _layer_of(node: Any) -> int | None:
    """The decoder layer that an operation's name, or its state variable's, tells."""
    data = node.find("data")
    variable = "" if data is None else data.attrib.get("variable_id", "")
    found = re.search(r"\blayers\.(\d+)\b", node.attrib["name"]) or re.search(r"\.(\d+)\.", variable)
    return int(found[1]) if found else None


def _renumbered(name: str, old: int, new: int) -> str:
    return re.sub(rf"\blayers\.{old}\b", f"layers.{new}", name)


def _copied(node: Any, new_id: str, layer: int, weights: BinaryIO) -> Any:
    """The same operation for another layer, with a state variable and weights of its own."""
    twin = copy.deepcopy(node)
    twin.set("id", new_id)
    name = _renumbered(node.attrib["name"], _BLOCK, layer)
    twin.set("name", name if name != node.attrib["name"] else f"{name}.layer{layer}")
    for port in twin.iter("port"):
        port.attrib.pop("names", None)  # names of tensors must be unique; nobody asks for these
    data = twin.find("data")
    if data is not None and "variable_id" in data.attrib:
        data.set("variable_id", data.attrib["variable_id"].replace(f".{_BLOCK}.", f".{layer}."))
    if node.attrib["type"] == "Const" and data is not None:
        offset, size = int(data.attrib["offset"]), int(data.attrib["size"])
        if size >= _ROTATED_FROM and data.attrib["element_type"] in _FLOATS_AND_WEIGHTS:
            data.set("offset", str(_append_rotated(weights, offset, size, layer)))
    return twin


def _append_rotated(weights: BinaryIO, offset: int, size: int, layer: int) -> int:
    """Appends a constant's bytes rotated by an amount of this layer's; returns where they begin."""
    weights.seek(offset)
    values = np.frombuffer(weights.read(size), dtype=np.uint8)
    end = weights.seek(0, 2)
    weights.write(np.roll(values, 8 * 1021 * layer).tobytes())
    return end


def _element(edge: _Edge) -> Any:
    keys = ("from-layer", "from-port", "to-layer", "to-port")
    return ElementTree.Element(
        "edge", dict(zip(keys, (edge.source, edge.source_port, edge.end, edge.end_port), strict=True))
    )
