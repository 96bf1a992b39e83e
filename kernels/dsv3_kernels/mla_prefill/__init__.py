"""Causal attention of whole sequences, with keys as multi-head latent attention has them."""
