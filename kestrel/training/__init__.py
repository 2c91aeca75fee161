"""The optimization: the Trainer and what it calls, checkpoints, sharding, samples, trackers."""
