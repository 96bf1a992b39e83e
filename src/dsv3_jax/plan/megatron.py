"""NVIDIA's published run of the same model, predicted: a test of the planner, no layout of ours.

Megatron splits heads over two GPUs, gives each pipeline rank four groups of layers in turn
(interleaved 1F1B), and waits for the experts' rows: nothing of them is overlapped.

Source: Megatron-Bridge, performance summary 25.09 (1,297 tokens/s a GPU) and its recipe for 1,024
H100 (tensor 2, pipe 8, virtual 4, experts over 64, batch 8,192, MLA's up-projections and dense MLPs
computed again, layers `Et|(tt|)*30mL`, all-to-all not overlapped, rows sent as BF16).
"""

from dataclasses import dataclass

from dsv3_jax.config import ModelConfig, PrecisionConfig
from dsv3_jax.parallel.pipeline.stages import Unit, UnitKind
from dsv3_jax.plan.cluster import Cluster, find_cluster
from dsv3_jax.plan.layer_times import ChunkTimes, Job, chunk_times
from dsv3_jax.plan.links import Number

PUBLISHED_TOKENS_PER_SECOND = 1297.0
"""A GPU, experts' loads forced to be even."""
TENSOR, PIPE, VIRTUAL, EXPERT_GPUS, BATCH, SEQ = 2, 8, 4, 64, 8192, 4096


@dataclass(frozen=True, kw_only=True)
class MegatronPlan:
    """One step of that run."""

    step_seconds: Number
    bubble_seconds: Number
    exchange_seconds: Number
    """Of the busiest rank's layers, waiting for experts' rows."""
    tokens_per_second_per_gpu: Number

    @property
    def error(self) -> Number:
        """Predicted over published, less 1."""
        return self.tokens_per_second_per_gpu / PUBLISHED_TOKENS_PER_SECOND - 1


def predict_megatron(cluster: Cluster | None = None) -> MegatronPlan:
    """The step on `cluster`, by default the 1,024 H100 that it was measured on."""
    cluster = cluster or find_cluster("h100_1024")
    model = ModelConfig()
    precision = PrecisionConfig(recipe="fp8", dispatch="bf16")
    job = Job(model=model, seq=SEQ, tokens=float(SEQ), expert_gpus=EXPERT_GPUS, tensor=TENSOR)
    times = chunk_times(cluster, precision, job)
    shared = _shared_seconds(cluster, model)
    ranks = [_rank_seconds(times, shared, rank) for rank in range(PIPE)]
    slowest = max(ranks)
    micro_batches = BATCH * PIPE * TENSOR // cluster.num_gpus
    bubble = (PIPE - 1) / VIRTUAL * slowest
    step = micro_batches * slowest + bubble
    sends = times.alone[UnitKind.MOE].sends
    waiting = sends.dispatch + sends.combine + sends.gradient_dispatch + sends.gradient_combine
    return MegatronPlan(
        step_seconds=step,
        bubble_seconds=bubble,
        exchange_seconds=micro_batches * 2 * VIRTUAL * waiting,
        tokens_per_second_per_gpu=BATCH * SEQ / step / cluster.num_gpus,
    )


def _shared_seconds(cluster: Cluster, model: ModelConfig) -> Number:
    """Of one layer's gathers and scatters between the GPUs that share its heads: around attention
    and around the shared expert, forward, backward, and once more for the weights' gradients."""
    size = 2.0 * SEQ * model.hidden_size * (TENSOR - 1) / TENSOR
    link = cluster.nvlink
    return 10 * (link.latency_seconds + size / link.achieved_bytes_per_second)


def _rank_seconds(times: ChunkTimes, shared: Number, rank: int) -> Number:
    """Forward and backward of one micro-batch in all groups of layers of a rank."""
    last = PIPE * VIRTUAL - 1
    seconds = 0.0
    for group in range(rank, last + 1, PIPE):
        if group == 0:
            layers = [Unit(UnitKind.DENSE, 0)]
        elif group == last:
            layers = [Unit(UnitKind.MTP, 0), Unit(UnitKind.NORM, 0)]
        else:  # layers 1 and 2 are dense too
            kind = UnitKind.DENSE if group == 1 else UnitKind.MOE
            layers = [Unit(kind, 0), Unit(kind, 1)]
        seconds += times.forward(layers) + sum(times.backward(layers))
        seconds += shared * sum(unit.kind != UnitKind.NORM for unit in layers)
    return seconds
