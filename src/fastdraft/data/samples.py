"""A few rows of text on which a model is measured: prepared ones, else the shipped prose."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from fastdraft.data.corpora import documents
from fastdraft.data.shards import open_corpus
from fastdraft.data.tokenize import DocumentEncoder, separator_id
from fastdraft.errors import DataError
from fastdraft.recipe.base import load_config
from fastdraft.recipe.prepare import PrepareConfig
from fastdraft.run_folder import StageFolder
from fastdraft.target import Target

_SHIPPED = {"name": "prose", "kind": "jsonl", "path": "shipped:data/prose.jsonl.xz"}


def prepared_sample(prepare: StageFolder, count: int, length: int) -> npt.NDArray[np.int64]:
    """About `count` rows from even places of all corpora in turn, cut to `length` ids: [rows, ids]."""
    names = list(prepare.manifest()["corpora"])
    each, found = -(-count // len(names)), []
    for name in names:
        corpus = open_corpus(prepare, name, "train")
        places = np.unique(np.linspace(0, max(0, corpus.rows - 1), each, dtype=np.int64))
        found.append(corpus.take(places[: corpus.rows])[:, :length])
    turns = itertools.chain.from_iterable(itertools.zip_longest(*found))
    rows = [row for row in turns if row is not None][:count]
    if len(rows) < 2:
        raise DataError(f"{prepare.path}: {len(rows)} rows; must be 2 or more", "add text to prepare.corpora")
    return np.stack(rows)


def shipped_sample(target: Target, count: int, length: int) -> npt.NDArray[np.int64]:
    """The same of the prose that comes with this package, in the target's ids."""
    vocabulary = target.vocabulary
    source = load_config(PrepareConfig, {"corpora": [_SHIPPED]}, "prepare").corpora[0]
    encoder = DocumentEncoder(target.tokenizer, vocabulary.size)
    separator, found = separator_id(vocabulary.bos_token_id, vocabulary.eos_token_ids), list[int]()
    for _, _, text in documents(source, 0):
        found += [separator, *encoder.encode([text or ""])[0].tolist()]
        if len(found) >= count * length:
            break
    return np.array(found[: count * length], dtype=np.int64).reshape(-1, length)
