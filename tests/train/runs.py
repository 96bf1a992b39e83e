"""Tiny runs of `train.py` in processes of their own, on simulated devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
CONFIG = """
from dsv3_jax.config import *

def config():
    return RunConfig(
        model=ModelConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
            num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=8,
            kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
            n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
            max_position_embeddings=32,
        ),
        data=DataConfig(source="tokens", paths=("rows.npy",), eval_paths=("held.npy",), seq_len=16),
        train=TrainConfig(name="run", steps=20, batch_size=8, eval_every=10, checkpoint_every=5),
        optimizer=OptimizerConfig(schedule="constant", peak_learning_rate=1e-2, warmup_steps=2),
    )
"""


def write_run(folder: Path) -> None:
    """config.py, for one device, and its data: 200 random rows and 16 held out."""
    (folder / "config.py").write_text(CONFIG)
    random = np.random.default_rng(0)
    for name, count in (("rows", 200), ("held", 16)):
        np.save(folder / f"{name}.npy", random.integers(0, 64, (count, 17)).astype(np.int32))


def settings_of(**sections: dict[str, Any]) -> tuple[str, ...]:
    """settings_of(parallel={"gpu": 2}) is ("--set", "parallel.gpu=2")."""
    return tuple(
        part
        for section, fields in sections.items()
        for name, value in fields.items()
        for part in ("--set", f"{section}.{name}={value}")
    )


def start(folder: Path, devices: int, *flags: str) -> subprocess.Popen:
    """`python train.py config.py` in a process that sees `devices` CPU devices."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    command = [sys.executable, str(ROOT / "train.py"), "config.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def finish(process: subprocess.Popen, seconds: float = 300) -> str:
    """What it said, once it has ended well."""
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors
    return output


def read_metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(folder: Path, name: str) -> list[float]:
    return [metrics["loss"] for metrics in read_metrics(folder, name)]
