"""Checkpoints in and out: Hugging Face directories, run directories."""
