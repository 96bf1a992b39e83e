"""What DeepSeek-V3 671B quantises, of 4,096 tokens on one GPU."""

TOKENS = 4096
ACTIVATIONS = [(TOKENS, features) for features in (7168, 1536, 576, 512, 16384, 18432, 2048)]
"""Inputs of linears and gradients of their outputs: in rows, for weight gradients in columns."""
WEIGHTS = [
    (1536, 7168),
    (24576, 1536),
    (576, 7168),
    (32768, 512),
    (7168, 16384),
    (18432, 7168),
    (2048, 7168),
]
"""In blocks, and their transposes."""
