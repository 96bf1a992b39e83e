"""Values as signs and evenly spaced logarithms, for the combine."""
