"""Whether a program is traced for a GPU that the kernels are for; lowering knows only CUDA."""

from typing import Any

import jax

HOPPER = ("H100", "H200", "H800", "H20", "GH200")
"""In the names of the GPUs of compute capability 9.0."""


def is_hopper() -> bool:
    """Of the devices of the mesh in scope, be they there or not, else of JAX's first device."""
    device = _device()
    return device.platform == "gpu" and any(name in device.device_kind for name in HOPPER)


def device_kind() -> str:
    """Of the same device, as JAX names it."""
    return _device().device_kind


def _device() -> Any:
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
