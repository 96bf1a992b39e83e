"""An engine of a checkpoint on the mesh that it is to be served from."""

from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax.config import ServerConfig
from dsv3_jax.config.checks import require
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.inference import expert_devices
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.wire import wire_of
from dsv3_jax.serve.engine import Engine


def load_engine(
    load: Callable[..., Transformer], server: ServerConfig, experts: int, **options: Any
) -> Engine:
    """An engine, not warmed up, of the model with that many routed experts that `load(mesh=...)`
    makes, on the first devices of this process. `options` are the engine's.

    Raises ValueError where there are too few devices, or they belong to other processes too.
    """
    model, placing = load_on_devices(load, server, experts)
    return Engine(model, server.serve, **placing, **options)


def load_on_devices(
    load: Callable[..., Transformer], server: ServerConfig, experts: int, *, first_device: int = 0
) -> tuple[Transformer, dict[str, Any]]:
    """The model, and an engine's options that say where and how it runs, on devices from number
    `first_device` on; all else as `load_engine`."""
    count, found = server.parallel.num_devices, jax.devices()
    require(jax.process_count() == 1, "processes", jax.process_count(), "1 of each engine")
    rule = f"at least data x node x gpu = {count} (parallel.simulated_devices fakes some on CPU)"
    require(len(found) - first_device >= count, "devices of this process", len(found), rule)
    placing = {"how": server.parallel, "wire": wire_of(server.precision)}
    if count == 1 and first_device == 0:
        return load(), placing
    mesh = make_mesh(server.parallel, found[first_device : first_device + count])
    # Else the model is loaded whole, and each device gets its slots of it.
    are_divided = experts % expert_devices(mesh) == 0
    return load(mesh=mesh) if are_divided else load(), placing | {"mesh": mesh}
