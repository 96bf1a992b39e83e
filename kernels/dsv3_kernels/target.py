"""Whether a program is traced for a GPU that the kernels are for; lowering knows only CUDA."""

import jax

HOPPER = ("H100", "H200", "H800", "H20", "GH200")
"""In the names of the GPUs of compute capability 9.0."""


def is_hopper() -> bool:
    """Of the devices of the mesh in scope, be they there or not, else of JAX's first device."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.platform == "gpu" and any(name in device.device_kind for name in HOPPER)
