"""Training what passes inserted: the loop, its objectives, data, schedules and checkpoints, and the optimisers in `optim`."""
