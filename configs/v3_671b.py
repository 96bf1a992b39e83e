"""DeepSeek-V3, 671B parameters, as pre-trained: shape, optimizer and schedules of the report.

Source: DeepSeek-V3 Technical Report §4.2. Hardware there: 2,048 H800, 14.8T tokens in 2.664M GPU
hours. This release has no pipeline: the file serves accounting, `dsv3 compile` and as a base.
"""

from dsv3_jax.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(),
        data=DataConfig(source="text", paths=("data/*.txt",), seq_len=4096, fim_rate=0.1),
        train=TrainConfig(
            name="v3_671b",
            steps=235_000,
            batch_size=15360,
            accumulation=120,
            eval_every=1000,
            checkpoint_every=500,
            remat="selective",
        ),
        optimizer=OptimizerConfig(moment_dtype="bfloat16", batch_ramp=True),
        precision=PrecisionConfig(recipe="bf16"),
    )
