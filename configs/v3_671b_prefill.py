"""A prefill unit of DeepSeek-V3, 671B parameters: 4 nodes of 8 H800.

Source: DeepSeek-V3 Technical Report §3.4.1 and DeepSeek's "Day 6: inference system overview": EP32,
nine routed experts and the shared one on each GPU, 32 experts twice; their profile reads 16K tokens
a GPU in prompts of 4K.
Hardware there: 73,700 tokens/s of prompts a node, cached ones included. To be compiled by
`dsv3 compile configs/v3_671b_prefill.py --gpu h800 --hosts 4`; it starts no server.
"""

from dsv3_jax.config import (
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    ServeConfig,
    TrainConfig,
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(),
        parallel=ParallelConfig(node=4, gpu=8),
        train=TrainConfig(name="v3_671b_prefill"),
        precision=PrecisionConfig(recipe="fp8"),
        serve=ServeConfig(
            unit="prefill",
            slots=16,
            max_seq_len=8192,
            prefill_chunk=16384,
            dtype="float8_e4m3fn",
            cache_dtype="bf16",
            redundant_experts=32,
            speculative=False,
        ),
    )
