"""Products of many experts' matrices in one program."""
