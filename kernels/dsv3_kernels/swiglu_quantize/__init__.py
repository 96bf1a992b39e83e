"""SwiGLU of an expert's or MLP's product, quantised in the same pass, and its backward."""
