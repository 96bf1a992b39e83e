"""What the combine of DeepSeek-V3 671B sends: outputs of experts for the tokens of one GPU."""

SHAPE = (4096, 7168)
BITS = (8, 10)
