"""The serve section: how many requests at a time, what is kept of them, and who may ask."""

from dataclasses import dataclass, field, replace

from dsv3_jax.config.checks import require, require_at_least, require_one_of, require_types
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.config.training import PrecisionConfig

CACHE_DTYPES = ("fp32", "bf16", "fp8")
UNITS = ("prefill", "decode")
MODEL_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """A server of one checkpoint, on one device or the mesh of `parallel`.

    On each device `slots` requests are decoded together, each of at most `max_seq_len` tokens,
    prompt and answer (None: the model's `max_position_embeddings`). A device's latent cache is
    `pages` of `page_size` tokens (None: enough for all slots at their longest); with `prefix_cache`
    pages of finished requests wait for a prompt that begins alike, and up to `host_pages` more in
    host memory. `cache_dtype` is fp32, bf16, or fp8, 656 bytes a token and layer for DeepSeek-V3
    (None: the model's own). A prompt is read `prefill_chunk` tokens at a time, less while others
    decode. Up to `decode_steps` steps are decoded between two looks at what has arrived; where they
    take long, fewer (serve/pace.py). `speculative` drafts with the MTP module, where there is one
    and it pays.

    A mesh holds `redundant_experts` more than the model has: the busiest ones several times. Every
    `rebalance_seconds` experts are placed anew by the load that was measured (None: never).

    `disaggregated` gives prefill and decode a process each, or more (`prefill_units`,
    `decode_units`), each on a mesh like `parallel`'s; `prefill_mesh` is the (data, node, gpu) of
    prefill where it is another one. With `unit_processes` False the server's own process has both,
    one of each: prefill on the first devices, decode on those after them.

    `api_keys_file` has the hashes of the keys that may ask, and their budgets; None lets anyone.
    Beyond `max_queue` waiting requests the next gets 429; so does one that would push the p95 of
    the time to first token over `slo_ttft_seconds` or of the time per token over
    `slo_tpot_seconds` (None: no such target). A request that takes longer than
    `deadline_seconds` is ended. `drain_seconds` is how long SIGTERM waits for those that run.

    `unit` is not of a server: with prefill or decode `dsv3 compile` compiles a step of such a unit
    instead of a training step.
    """

    slots: int = 16
    pages: int | None = None
    page_size: int = 64
    max_seq_len: int | None = None
    prefill_chunk: int = 256
    decode_steps: int = 16
    cache_dtype: str | None = None
    dtype: str = "float32"
    prefix_cache: bool = True
    host_pages: int = 0
    speculative: bool = True
    disaggregated: bool = False
    prefill_units: int = 1
    decode_units: int = 1
    unit_processes: bool = True
    prefill_mesh: tuple[int, ...] | None = None
    redundant_experts: int = 0
    rebalance_seconds: float | None = None
    unit: str | None = None
    api_keys_file: str | None = None
    max_queue: int = 256
    max_body_bytes: int = 2**20
    slo_ttft_seconds: float | None = None
    slo_tpot_seconds: float | None = None
    deadline_seconds: float = 600.0
    drain_seconds: float = 30.0

    def __post_init__(self):
        require_types("serve", self)
        sizes = ("slots", "page_size", "prefill_chunk", "decode_steps", "max_body_bytes")
        require_at_least("serve", self, 1, *sizes, "prefill_units", "decode_units")
        require_at_least("serve", self, 0, "host_pages", "max_queue", "drain_seconds")
        require_at_least("serve", self, 0, "redundant_experts")
        require(self.page_size % 8 == 0, "serve.page_size", self.page_size, "a multiple of 8")
        for name in ("pages", "max_seq_len"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"serve.{name}", value, "None or at least 1")
        for name in ("slo_ttft_seconds", "slo_tpot_seconds", "rebalance_seconds"):
            value = getattr(self, name)
            require(value is None or value > 0, f"serve.{name}", value, "None or a positive number")
        require(
            self.deadline_seconds > 0, "serve.deadline_seconds", self.deadline_seconds, "over 0"
        )
        if self.cache_dtype is not None:
            require_one_of("serve.cache_dtype", self.cache_dtype, *CACHE_DTYPES)
        require_one_of("serve.dtype", self.dtype, *MODEL_DTYPES)
        if self.unit is not None:
            require_one_of("serve.unit", self.unit, *UNITS)
        sizes = self.prefill_mesh
        is_mesh = sizes is None or (len(sizes) == 3 and min(sizes) >= 1)
        require(is_mesh, "serve.prefill_mesh", sizes, "None or the sizes of data, node and gpu")
        if not self.unit_processes:
            rule = "True where serve.disaggregated is False"
            require(self.disaggregated, "serve.unit_processes", False, rule)
            for name in ("prefill_units", "decode_units"):
                value, rule = getattr(self, name), "1 where serve.unit_processes is False"
                require(value == 1, f"serve.{name}", value, rule)

    @property
    def places_experts(self) -> bool:
        """Whether experts are in slots that their load decides."""
        return self.redundant_experts > 0 or self.rebalance_seconds is not None

    def longest(self, max_position_embeddings: int) -> int:
        """Tokens of the longest request: `max_seq_len`, or what the model takes."""
        return self.max_seq_len or max_position_embeddings

    def pages_per_request(self, max_position_embeddings: int) -> int:
        """Pages of the longest request."""
        return -(-self.longest(max_position_embeddings) // self.page_size)

    def num_pages(self, max_position_embeddings: int) -> int:
        """`pages`, or enough for all slots."""
        return self.pages or self.slots * self.pages_per_request(max_position_embeddings)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What `dsv3 serve` is told: how to serve, over which mesh, and what rows travel in between
    its devices (`precision.dispatch`, `precision.combine`)."""

    serve: ServeConfig = field(default_factory=ServeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)

    def __post_init__(self):
        rule = "1: a server has no pipeline"
        require(self.parallel.pipe == 1, "parallel.pipe", self.parallel.pipe, rule)
        recipe = self.precision.recipe
        rule = "fp32: a server computes in serve.dtype"
        require(recipe == "fp32", "precision.recipe", recipe, rule)
        rule = "None: a server has both kinds of step"
        require(self.serve.unit is None, "serve.unit", self.serve.unit, rule)
        rule = "None where serve.disaggregated is False"
        mesh = self.serve.prefill_mesh
        require(mesh is None or self.serve.disaggregated, "serve.prefill_mesh", mesh, rule)

    def check_model(self, model: ModelConfig) -> None:
        """ValueError where the model's experts do not divide over a mesh."""
        experts = model.n_routed_experts + self.serve.redundant_experts
        name = "n_routed_experts + serve.redundant_experts"
        for mesh in (self.parallel, self.prefill_parallel):
            count = mesh.node * mesh.gpu
            rule = f"a multiple of node x gpu = {count}"
            require(not model.has_experts or experts % count == 0, name, experts, rule)

    @property
    def prefill_parallel(self) -> ParallelConfig:
        """The mesh of a prefill unit."""
        if self.serve.prefill_mesh is None:
            return self.parallel
        data, node, gpu = self.serve.prefill_mesh
        simulated = data * node * gpu if self.parallel.simulated_devices else 0
        sizes = {"data": data, "node": node, "gpu": gpu, "simulated_devices": simulated}
        return replace(self.parallel, **sizes)
