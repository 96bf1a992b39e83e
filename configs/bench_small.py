"""The larger speed bench: hidden 512, 8 layers, 32 experts, 99M parameters.

Source: none, the shape is ours: `bench_tiny` doubled. Hardware: two CPU cores.
"""

from dsv3_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1024,
            moe_intermediate_size=256,
            num_hidden_layers=8,
            first_k_dense_replace=1,
            num_attention_heads=8,
            q_lora_rank=192,
            kv_lora_rank=128,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            n_routed_experts=32,
            n_shared_experts=1,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=0,
            max_position_embeddings=1024,
        ),
        data=DataConfig(seq_len=256),
        train=TrainConfig(name="bench_small", steps=100, batch_size=8, scan_layers=False),
        optimizer=OptimizerConfig(schedule="constant", peak_learning_rate=1e-3, warmup_steps=20),
    )
