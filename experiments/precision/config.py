"""The model of the precision experiment: 5.2 M active parameters of 8.7 M, on Python's own sources.

    python experiments/precision/run.py        every run, one after the other on this machine

Widths are multiples of 128, so that every tile and block of the FP8 recipe is whole. A step is
1,024 tokens, a run 1,000 steps; the learning rate decays as published.
"""

from dsv3_jax.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=768,
            moe_intermediate_size=128,
            num_hidden_layers=4,
            first_k_dense_replace=1,
            num_attention_heads=4,
            q_lora_rank=128,
            kv_lora_rank=128,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            n_routed_experts=16,
            n_shared_experts=1,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            num_nextn_predict_layers=0,
            max_position_embeddings=1024,
            initializer_range=0.02,
        ),
        data=DataConfig(source="python_stdlib", seq_len=128, eval_fraction=0.05),
        train=TrainConfig(
            name="precision",
            steps=1000,
            batch_size=8,
            eval_every=1000,
            eval_batches=64,
            scan_layers=False,
        ),
        optimizer=OptimizerConfig(
            schedule="published", peak_learning_rate=1e-3, warmup_steps=100, moment_dtype="bfloat16"
        ),
        loss=LossConfig(bias_update_rate=0.002),
        precision=PrecisionConfig(recipe="bf16"),
    )
