"""Training: the run's configuration, the loop, optimizer and schedule, checkpoints, and the watch over them."""
