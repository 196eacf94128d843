"""Lightning callbacks and loggers: checkpoints, progress, true scores, guards, files."""
