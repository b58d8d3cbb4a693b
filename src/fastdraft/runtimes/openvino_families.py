"""Which families of targets the converter to OpenVINO takes.

Decides that a target which it does not take is refused before anything is trained, and that `auto` lets transformers write for it.
"""

from __future__ import annotations

from fastdraft.errors import TargetError
from fastdraft.modeling.families import MULTIMODAL
from fastdraft.modeling.source import raw_config

NOT_CONVERTED = ("gemma", "gemma2", "gemma3_text", *MULTIMODAL)
"""Families that optimum-intel 2.2 does not convert as text models beside transformers 5: transformers writes for these."""


def require_convertible(location: str, revision: str | None = None) -> None:
    """Looks whether OpenVINO's converter takes a target's family, before anything is trained for it.

    Raises:
        TargetError: when it does not.
    """
    family = unconverted_family(location, revision)
    if family:
        rule = "the converter to OpenVINO takes text models of other families"
        raise TargetError(location, f"family {family}", rule, "leave out `benchmark`, and write export.openvino.target=none")


def unconverted_family(location: str, revision: str | None) -> str:
    """The family of a target that is not converted; empty for one that is.

    Raises:
        TargetError: when its config cannot be read.
    """
    family = str(raw_config(location, revision)["model_type"])
    return family if family in NOT_CONVERTED else ""
