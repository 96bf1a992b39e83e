"""The DeepSeek-V3 model as Flax NNX modules."""
