"""The benchmark of the kernels: every registered one and those of others, each checked before it is timed."""
