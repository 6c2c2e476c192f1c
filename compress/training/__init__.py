"""The training loop and what it trains on: configuration, objective, forward passes, checkpoints, progress."""
