"""Products of 8-bit values with a scale for each tile."""
