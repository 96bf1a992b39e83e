"""DeepSeek-V3, 671B parameters, on 1,024 H100: the published run on half as many GPUs.

Source: as configs/v3_671b.py, of which this is the same model, batch and schedule; 16 pipeline
ranks, experts over 8 nodes of 8 GPUs, one data-parallel copy, so that the optimizer's state takes
twice the room on each GPU.
Hardware: 128 nodes of 8 H100 with 80 GB. Predicted by `dsv3 compile`: 80.3 GB a GPU, 86 s a step.
"""

from dsv3_jax.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(),
        parallel=ParallelConfig(
            pipe=16,
            node=8,
            gpu=8,
            schedule="dualpipe",
            micro_batches=240,
            late_weight_gradients=False,  # they would keep 6 GB for each of 8 micro-batches
        ),
        data=DataConfig(source="text", paths=("data/*.txt",), seq_len=4096, fim_rate=0.1),
        train=TrainConfig(
            name="v3_671b_h100_1024",
            steps=235_000,
            batch_size=15360,
            eval_every=1000,
            checkpoint_every=500,
            remat="full",  # but for what fits into 80 GB
            keep=("q_latent", "kv_latent", "attention_residual", "expert_up", "mlp_gate"),
        ),
        optimizer=OptimizerConfig(moment_dtype="bfloat16", batch_ramp=True),
        precision=PrecisionConfig(recipe="bf16"),
    )
