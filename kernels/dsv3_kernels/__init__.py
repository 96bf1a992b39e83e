"""The hot operations of DeepSeek-V3, each with one contract and several implementations.

One folder an operation: `op.py` is the contract and the choice, `reference.py` the definition in
plain jnp, `mosaic_sm90.py`, where there is one, the same for Hopper GPUs. Knows nothing of models.
"""
