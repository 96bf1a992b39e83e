"""A decode unit of DeepSeek-V3, 671B parameters: 18 nodes of 8 H800.

Source: DeepSeek's "Day 6: inference system overview": EP144, two routed experts and the shared one
on each GPU, 32 experts twice; attention and caches of each request whole on one GPU; their profile
has 128 requests a GPU of prompts of 4,096 tokens; 512 more are for the answers.
Hardware there: 278 nodes at most, 14,800 tokens/s a node, 20 to 22 tokens/s a user. To be compiled
by `dsv3 compile configs/v3_671b_decode.py --gpu h800 --hosts 18`; it starts no server.
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
        parallel=ParallelConfig(node=18, gpu=8, capacity_factor=1.5),
        train=TrainConfig(name="v3_671b_decode"),
        precision=PrecisionConfig(recipe="fp8"),
        serve=ServeConfig(
            unit="decode",
            slots=128,
            max_seq_len=4608,
            dtype="float8_e4m3fn",
            cache_dtype="bf16",
            redundant_experts=32,
            speculative=False,
        ),
    )
