"""Training from a configuration: loop, evaluation, checkpoints, pictures."""
