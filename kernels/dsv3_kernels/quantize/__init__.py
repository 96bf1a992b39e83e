"""Values in 8 bits with a scale for each tile."""
