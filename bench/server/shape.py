"""Sizes and names that the parts of this bench share; imports nothing, so that the client needs the SDK alone."""

# One training step: rows, tokens in each, rank of the adapter.
ROWS, LENGTH, RANK = 8, 64, 8
VOCAB = 1024

# What is measured, by the names in tables and files.
PIPELINED, SEQUENTIAL = "pipelined step, ms", "sequential step, ms"
ROUND_TRIP, OPTIM_STEP, SAMPLING = "tiny round trip, ms", "optim_step, ms", "1,000 samples, s"

# How often each is measured in one round, in turns with the others; once unless it says so.
BLOCKS = {PIPELINED: 6, SEQUENTIAL: 3}
