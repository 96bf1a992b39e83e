"""Low precision: formats, what of the model is in which, and products that follow it."""
