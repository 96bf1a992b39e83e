"""The demo: a complete small DeepSeek-V3 (MLA, MoE, MTP) on Python's own source code.

Source: none, the shape is ours; published schedules and losses. Hardware: two CPU cores.
"""

from dsv3_jax.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            vocab_size=4096,
            hidden_size=192,
            intermediate_size=512,
            moe_intermediate_size=128,
            num_hidden_layers=4,
            first_k_dense_replace=1,
            num_attention_heads=4,
            q_lora_rank=96,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            n_routed_experts=16,
            n_shared_experts=1,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            num_nextn_predict_layers=1,
            max_position_embeddings=2048,
            initializer_range=0.02,
        ),
        data=DataConfig(source="python_stdlib", seq_len=256, eval_fraction=0.05),
        train=TrainConfig(
            name="demo",
            steps=400,
            batch_size=8,
            eval_every=100,
            eval_batches=16,
            checkpoint_every=100,
            scan_layers=False,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=40),
        loss=LossConfig(bias_update_rate=0.005),
    )
