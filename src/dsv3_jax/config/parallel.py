"""The parallel section: how many devices, and how the program is spread over them."""

from dataclasses import dataclass

from dsv3_jax.config.checks import require, require_at_least, require_types


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh axes `pipe data node gpu` and the pipeline's schedule.

    This release runs one device; a larger mesh is refused here, before anything is allocated.
    """

    pipe: int = 1
    data: int = 1
    node: int = 1
    gpu: int = 1
    schedule: str = "none"
    micro_batches: int = 1
    zero: int = 1
    simulated_devices: int = 0

    def __post_init__(self):
        require_types("parallel", self)
        require_at_least("parallel", self, 1, "pipe", "data", "node", "gpu", "micro_batches")
        for name in ("pipe", "data", "node", "gpu"):
            size = getattr(self, name)
            require(size == 1, f"parallel.{name}", size, "1 (this release trains on one device)")
        require(
            self.schedule == "none",
            "parallel.schedule",
            self.schedule,
            "none (this release has no pipeline)",
        )
        require(
            self.simulated_devices in (0, 1),
            "parallel.simulated_devices",
            self.simulated_devices,
            "0 or 1 (this release trains on one device)",
        )
        require(self.zero in (1, 3), "parallel.zero", self.zero, "1 or 3")
