"""Where a model's files lie: a directory or the hub; which of them are read, checked and copied.

Decides what counts as a local directory, which files make up a tokenizer, and that weights are safetensors or refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdraft.errors import TargetError
from fastdraft.machine import disk_errors
from fastdraft.modeling.families import TARGET_FAMILIES
from fastdraft.run_folder import file_sha256

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "additional_chat_templates/*",
)
_IDENTITY_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_HASHED_BYTES = 1 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|[A-Za-z0-9][\w.-]*")


def model_identity(
    model: str, location: str, revision: str | None, dtype: str, *, weights: bool = True
) -> dict[str, Any]:
    """Stands for what a model writes in fingerprints: its name, revision and precision; for a directory also what lies there.

    Small files count whole, weights by their size and both ends: a fine-tune saved over another one is noticed without
    reading gigabytes. `weights` false leaves them out, for work that does not touch them: they need not be here at all.
    """
    identity: dict[str, Any] = {"model": model, "revision": revision, "dtype": dtype if weights else None}
    folder = Path(location)
    if not folder.is_dir():
        return identity
    identity["files"] = {
        name: file_sha256(folder / name)[:20] for name in _IDENTITY_FILES if (folder / name).is_file()
    }
    for path in sorted(folder.glob("*.safetensors")) if weights else ():
        size, state = path.stat().st_size, hashlib.sha256()
        with open(path, "rb") as file:
            state.update(file.read(_HASHED_BYTES))
            file.seek(max(0, size - _HASHED_BYTES))
            state.update(file.read(_HASHED_BYTES))
        identity["files"][path.name] = f"{size} bytes, {state.hexdigest()[:20]}"
    return identity


def is_hub_id(location: str) -> bool:
    """Whether a location without a directory of that name may be a model on the hub.

    Raises:
        TargetError: when it is neither a directory nor shaped like a hub id.
    """
    path = Path(location)
    if path.is_dir():
        return False
    if path.exists():
        found = "a GGUF file, which is llama.cpp's" if path.suffix == ".gguf" else "a file"
        raise TargetError(
            location,
            found,
            "must be a model's directory or a hub id",
            "name the directory that holds config.json",
        )
    if not _HUB_ID.fullmatch(location):
        raise TargetError(
            location, "no such directory", "must be a model's directory or a hub id", "correct the path"
        )
    return True


def local_file(location: str, name: str, revision: str | None = None) -> Path | None:
    """One file of a model, fetched from the hub when the location is a hub id; None when the model has no such file.

    Raises:
        TargetError: when the hub cannot be reached or refuses.
    """
    if not is_hub_id(location):
        path = Path(location) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # its retries are not news: the outcome is told below
    try:
        return Path(hf_hub_download(location, name, revision=revision))
    except GatedRepoError as error:
        remedy = "accept its licence there and log in with `hf auth login`"
        raise TargetError(location, "closed to you", "the hub must let you read it", remedy) from error
    except RepositoryNotFoundError as error:
        raise TargetError(
            location,
            "neither a directory here nor a model on the hub",
            "must be one of them",
            "correct the name",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        found = "no such directory, and the hub cannot be reached"
        raise TargetError(
            location, found, "the model must be at hand", "go online or name a directory"
        ) from error


def _refuse_other_formats(location: str) -> None:
    """Says what a directory without a config.json is, where that is plain to see."""
    if local_file(location, "adapter_config.json") is not None:
        rule, remedy = (
            "must be a whole model",
            "merge it into its base model and save that (`merge_and_unload` of peft)",
        )
        raise TargetError(location, "an adapter (LoRA), not a model", rule, remedy)
    if not is_hub_id(location) and any(Path(location).glob("*.gguf")):
        remedy = "use the Hugging Face model that it was converted from"
        raise TargetError(
            location, "a GGUF file, which is llama.cpp's", "must be a Hugging Face model directory", remedy
        )


def raw_config(location: str, revision: str | None = None) -> dict[str, Any]:
    """The model's config.json, checked for what FastDraft supports.

    Raises:
        TargetError: missing, not JSON, or of another family (which includes every model that needs code of its own).
    """
    path = local_file(location, "config.json", revision)
    if path is None:
        _refuse_other_formats(location)
        raise TargetError(
            location,
            "no config.json",
            "a model's directory must hold one",
            "name the directory that the model was saved to",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TargetError(
            path, f"not JSON ({error})", "must be a model's config", "fetch the model again"
        ) from None
    if not isinstance(config, dict):
        raise TargetError(
            path,
            f"a JSON {type(config).__name__}",
            "must be a model's config, an object",
            "fetch the model again",
        )
    family = config.get("model_type")
    if isinstance(family, str) and family in TARGET_FAMILIES:
        _check_sizes(config, path)
        return dict(config)
    own_code = " needs Python code of its own" if "auto_map" in config else ""
    rule = f"must be one of {', '.join(TARGET_FAMILIES)}"
    raise TargetError(
        location, f"model family '{family}'{own_code}", rule, "choose a target of one of these families"
    )


_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "head_dim",
    "max_position_embeddings",
    "n_embd",
    "n_layer",
    "n_head",
    "n_positions",
)
_LARGEST, _LONGEST = 1 << 24, 1 << 31
"""Far above every size in use (a context's above the rest), and below what no machine could hold a list of."""


def _check_sizes(config: dict[str, Any], path: Path) -> None:
    """Refuses sizes that no model has, before anything is built by them; transformers would fill a missing vocabulary by a guess."""
    text = config.get("text_config")
    if text is None and "vocab_size" not in config:
        raise TargetError(
            path, "no vocab_size", "must say how many tokens the model scores", "fetch the model again"
        )
    for part in (config, text if isinstance(text, dict) else {}):
        for name in _SIZES:
            value = part.get(name, 1)
            most = _LONGEST if name in ("max_position_embeddings", "n_positions") else _LARGEST
            optional = value is None and name in ("num_key_value_heads", "head_dim", "intermediate_size")
            if not optional and (type(value) is not int or not 0 < value <= most):
                raise TargetError(
                    path,
                    f"{name} {value!r:.40}",
                    f"must be a whole number from 1 to {most}",
                    "fetch the model again",
                )


def weight_files(location: str, revision: str | None = None, names: Sequence[str] = ()) -> dict[str, Path]:
    """Tensor name -> safetensors file that holds it, for all tensors or the asked ones; a hub's files are fetched as needed.

    Raises:
        TargetError: when there are no safetensors or one is missing.
    """
    index = local_file(location, "model.safetensors.index.json", revision)
    if index is None:
        whole = local_file(location, "model.safetensors", revision)
        if whole is None:
            raise _no_weights(location)
        return dict.fromkeys(names, whole) if names else {"": whole}
    places = _weight_map(index)
    found: dict[str, Path] = {}
    for name in names or places:
        if name in places:
            path = local_file(location, places[name], revision)
            if path is None:
                rule = "every file of model.safetensors.index.json must be there"
                raise TargetError(location, f"no {places[name]}", rule, "fetch the model again")
            found[name] = path
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index tells; a name that would leave the model's directory is refused."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not places or not all(
            isinstance(name, str) and Path(name).name == name and "\\" not in name for name in places.values()
        ):
            raise ValueError("names no files beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        found = f"damaged ({type(error).__name__}: {str(error)[:80]})"
        raise TargetError(
            index, found, "must hold a `weight_map` of tensor names and files", "fetch the model again"
        ) from None
    return dict(places)


def _no_weights(location: str) -> TargetError:
    suffixes = set() if is_hub_id(location) else {path.suffix for path in Path(location).iterdir()}
    if ".gguf" in suffixes:
        rule, remedy = "weights must be safetensors", "use the Hugging Face model that it was converted from"
        return TargetError(location, "weights in GGUF, which is llama.cpp's", rule, remedy)
    if not suffixes & {".bin", ".pt", ".pth"}:
        rule = "the target's weights are needed here"
        return TargetError(
            location, "no model.safetensors", rule, "put them there, or name the directory that holds them"
        )
    rule = "weights must be safetensors, because pickles can run code"
    return TargetError(
        location, "only pickled weights", rule, "save the model as safetensors, or choose another copy"
    )


def check_weights(location: str) -> None:
    """Refuses a directory whose weights are not all there as safetensors; a hub is asked when loading.

    Raises:
        TargetError: naming what is missing.
    """
    if not is_hub_id(location):
        weight_files(location)


def has_weights(location: str) -> bool:
    """Whether a model's weights can be had: a hub's always, a directory's where they lie in it."""
    try:
        check_weights(location)
    except TargetError:
        return False
    return True


def tokenizer_files(source: str | Path, revision: str | None = None) -> list[Path]:
    """The tokenizer, chat template and special-token files of a model, in a fixed order.

    Raises:
        TargetError: when there are none.
    """
    root = Path(source)
    if is_hub_id(str(source)):
        from huggingface_hub import snapshot_download

        try:
            root = Path(
                snapshot_download(str(source), revision=revision, allow_patterns=list(TOKENIZER_FILES))
            )
        except Exception as error:  # the hub client raises its own and its HTTP library's errors
            found = "tokenizer files cannot be fetched"
            raise TargetError(
                source, found, "the hub must be reachable", "go online or name a directory"
            ) from error
    files = [path for pattern in TOKENIZER_FILES for path in sorted(root.glob(pattern)) if path.is_file()]
    if not files:
        raise TargetError(
            source,
            "no tokenizer files",
            "a model's directory must hold its tokenizer",
            "copy the tokenizer files here",
        )
    return files


def copy_tokenizer_files(source: str | Path, folder: Path, revision: str | None = None) -> list[str]:
    """Copies tokenizer files byte for byte from a directory or the hub; returns their names.

    Raises:
        TargetError: when there are none. FastDraftError: when the disk is full.
    """
    names = []
    with disk_errors(folder):
        for path in tokenizer_files(source, revision):
            name = (
                f"{path.parent.name}/{path.name}"
                if path.parent.name == "additional_chat_templates"
                else path.name
            )
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
            names.append(name)
    return names


def tokenizer_digest(source: str | Path, revision: str | None = None) -> str:
    """One digest of the bytes of all tokenizer files."""
    lines = [f"{path.name} {file_sha256(path)}" for path in tokenizer_files(source, revision)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:20]
