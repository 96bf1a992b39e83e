"""Generation from a trained or imported model."""
