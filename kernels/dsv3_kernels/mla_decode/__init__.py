"""Attention of decoding over the paged latent cache, with multi-head latent attention absorbed."""
