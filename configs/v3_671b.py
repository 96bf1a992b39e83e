"""DeepSeek-V3, 671B parameters, pre-trained as published on 2,048 H800.

Source: DeepSeek-V3 Technical Report §3.2, §4.2: 16 pipeline ranks (DualPipe), experts over 8 nodes
of 8 GPUs, ZeRO-1 data parallelism, no tensor parallelism.
Hardware there: 2,048 H800, 14.8T tokens in 2.664M GPU hours, 19.9 s a step in FP8. Predicted by
`dsv3 compile` for this file: 73.3 GB a GPU, 32 s a step.
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
            data=2,
            node=8,
            gpu=8,
            schedule="dualpipe",
            micro_batches=120,
            late_weight_gradients=False,  # they would keep 6 GB for each of 8 micro-batches
        ),
        data=DataConfig(source="text", paths=("data/*.txt",), seq_len=4096, fim_rate=0.1),
        train=TrainConfig(
            name="v3_671b",
            steps=235_000,
            batch_size=15360,
            eval_every=1000,
            checkpoint_every=500,
            remat="full",  # but for what fits into 80 GB
            keep=(
                *("q_latent", "kv_latent", "attention_output", "attention_residual"),
                *("node_rows", "expert_up", "mlp_gate", "mlp_up"),
            ),
        ),
        optimizer=OptimizerConfig(moment_dtype="bfloat16", batch_ramp=True),
        precision=PrecisionConfig(recipe="fp8"),
    )
