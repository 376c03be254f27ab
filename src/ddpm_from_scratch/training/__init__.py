"""Training: Algorithm 1, its configuration and objectives, and checkpoints that resume exactly."""
