"""The parallel section: how many devices, and how the program is spread over them."""

from collections.abc import Mapping
from dataclasses import dataclass

from dsv3_jax.config.checks import require, require_at_least, require_one_of, require_types

SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev")
TWO_CHUNKS = ("dualpipe", "dualpipev")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh axes `pipe data node gpu`, and how their devices work together.

    Tokens are split over data x node x gpu, experts over node x gpu. `dispatcher` brings a token to
    its experts: `two_hop` first to each node it needs, then inside the node, or `flat` to every GPU
    at once; their buffers hold `capacity_factor` times the rows of an even load, and what does not
    fit goes in further rounds. `zero=1` shards master weights and moments and gathers the weights
    once a step; `zero=3` gathers each layer when it is computed. With `pipe` above 1 the layers are
    split into stages, which `schedule` runs: 1f1b, zb1p, dualpipe or dualpipev, a batch in
    `micro_batches` parts. Where a schedule splits backward, `late_weight_gradients` fill its
    bubbles, for which the gradient of every product's output is kept; False computes them at once.
    `simulated_devices` fakes that many devices on the CPU.
    """

    pipe: int = 1
    data: int = 1
    node: int = 1
    gpu: int = 1
    schedule: str = "none"
    micro_batches: int = 1
    late_weight_gradients: bool = True
    zero: int = 1
    dispatcher: str = "two_hop"
    capacity_factor: float = 1.25
    simulated_devices: int = 0

    def __post_init__(self):
        require_types("parallel", self)
        require_at_least("parallel", self, 1, "pipe", "data", "node", "gpu", "micro_batches")
        require_at_least("parallel", self, 0, "simulated_devices")
        self._check_pipeline()
        require(self.zero in (1, 3), "parallel.zero", self.zero, "1 or 3")
        require_one_of("parallel.dispatcher", self.dispatcher, "two_hop", "flat")
        factor = self.capacity_factor
        require(
            0 < factor <= 64, "parallel.capacity_factor", factor, "a number above 0, at most 64"
        )
        require(
            self.simulated_devices in (0, self.num_devices),
            "parallel.simulated_devices",
            self.simulated_devices,
            f"0 (real devices) or pipe x data x node x gpu = {self.num_devices}",
        )

    def _check_pipeline(self) -> None:
        require_one_of("parallel.schedule", self.schedule, "none", *SCHEDULES)
        if self.pipe == 1:
            rule = "none, or parallel.pipe above 1"
            require(self.schedule == "none", "parallel.schedule", self.schedule, rule)
            rule = "1, or parallel.pipe above 1 (train.accumulation splits a batch without it)"
            require(self.micro_batches == 1, "parallel.micro_batches", self.micro_batches, rule)
            return
        rule = f"one of {', '.join(SCHEDULES)} where parallel.pipe is {self.pipe}"
        require(self.schedule != "none", "parallel.schedule", self.schedule, rule)
        require(
            self.zero == 1,
            "parallel.zero",
            self.zero,
            "1 where parallel.pipe is above 1 (every micro-batch would gather every layer)",
        )
        if self.schedule not in TWO_CHUNKS:
            return
        rule = f"at least {2 * self.pipe}, twice parallel.pipe ({self.schedule})"
        name, count = "parallel.micro_batches", self.micro_batches
        require(count >= 2 * self.pipe, name, count, rule)
        if self.schedule == "dualpipe":
            require(count % 2 == 0, name, count, "an even number (dualpipe)")
            require(self.pipe % 2 == 0, "parallel.pipe", self.pipe, "an even number (dualpipe)")

    @property
    def stages(self) -> int:
        """Parts of the model in the pipeline."""
        return self.pipe * (2 if self.schedule == "dualpipev" else 1)

    @property
    def mesh_shape(self) -> tuple[int, int, int, int]:
        """Sizes of (pipe, data, node, gpu)."""
        return (self.pipe, self.data, self.node, self.gpu)

    @property
    def num_devices(self) -> int:
        return self.pipe * self.token_shards

    @property
    def token_shards(self) -> int:
        """Parts into which a batch is split."""
        return self.data * self.node * self.gpu


def simulated_devices(count: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables with which JAX sees `count` CPU devices and no others."""
    flag = "--xla_force_host_platform_device_count="
    flags = [f for f in environment.get("XLA_FLAGS", "").split() if not f.startswith(flag)]
    return {"XLA_FLAGS": " ".join([*flags, f"{flag}{count}"]), "JAX_PLATFORMS": "cpu"}
