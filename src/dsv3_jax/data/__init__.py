"""Text and token arrays to batches: sources, tokenizer, packing, loader."""
