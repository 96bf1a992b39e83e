"""DeepSeek-V2-Lite, 16B parameters of which 2.4B are active, on one node of 8 GPUs.

Source: config_16B.json of DeepSeek-V3's repository; batch, peak learning rate and balance factor of
the DeepSeek-V2 paper, appendix B. The phases of the learning rate are DeepSeek-V3's.
Hardware: 8 GPUs of 80 GB, experts over all of them: 8 on each. Predicted by `dsv3 compile` for
H800: 50 GB a GPU, 193 s a step.
"""

from dsv3_jax.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            vocab_size=102400,
            hidden_size=2048,
            intermediate_size=10944,
            moe_intermediate_size=1408,
            num_hidden_layers=27,
            first_k_dense_replace=1,
            num_nextn_predict_layers=0,
            num_attention_heads=16,
            q_lora_rank=None,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            n_group=1,
            topk_group=1,
            topk_method="greedy",
            scoring_func="softmax",
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
        ),
        parallel=ParallelConfig(gpu=8),
        data=DataConfig(source="text", paths=("data/*.txt",), seq_len=4096),
        train=TrainConfig(
            name="v2_lite_16b",
            steps=302_000,  # 5.7T tokens
            batch_size=4608,
            accumulation=576,  # a sequence a GPU
            eval_every=1000,
            checkpoint_every=500,
            remat="full",  # but for what fits into 80 GB
            keep=("kv_latent", "attention_residual", "expert_up", "mlp_gate", "mlp_up"),
        ),
        optimizer=OptimizerConfig(peak_learning_rate=4.2e-4, moment_dtype="bfloat16"),
        loss=LossConfig(balance_weight=0.001),
        precision=PrecisionConfig(recipe="bf16"),
    )
