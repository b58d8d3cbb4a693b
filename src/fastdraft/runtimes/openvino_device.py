"""What a benchmark ran on: OpenVINO's release and the device's own name.

Decides only how both are written down; results of two machines are never mixed on the strength of it.
"""

from __future__ import annotations

from importlib import metadata

from fastdraft.runtimes.openvino import Precision, core, device_properties
from fastdraft.runtimes.openvino_signals import keeping_signal_stack


def describe_device(device: str, precision: Precision = "fast") -> dict[str, str]:
    """`version` of OpenVINO and `device_name`, as "AMD EPYC" or "Intel(R) Arc(TM) Graphics".

    Raises:
        MissingExtra, RecipeError: as for `device_properties`.
    """
    device_properties(device, precision)
    with keeping_signal_stack():
        name = str(core().get_property(device, "FULL_DEVICE_NAME")).strip()
    return {"version": metadata.version("openvino"), "device_name": name}
