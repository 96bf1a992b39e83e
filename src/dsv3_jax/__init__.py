"""DeepSeek-V3 in JAX.

    model  = dsv3_jax.load(path)          run directory or Hugging Face directory -> NNX module
    logits = model(tokens)                int32 [batch, seq] -> float32 [batch, seq, vocab]
    ids    = dsv3_jax.generate(model, prompts, max_new_tokens=64)
    dsv3_jax.save_hf(model, path, weights="bfloat16")

The names are looked up on first use, so that `import dsv3_jax` alone costs nothing.
"""

import importlib
from typing import Any

_PUBLIC = {
    "load": "dsv3_jax.export.load",
    "save_hf": "dsv3_jax.export.huggingface",
    "generate": "dsv3_jax.serve.generate",
}

__all__ = ["generate", "load", "save_hf"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dsv3_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
