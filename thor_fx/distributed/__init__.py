"""Training on many devices: what is averaged over ranks, in which buckets, and what must be the same."""
