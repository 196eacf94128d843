"""What runs by `stage=NAME` and trains nothing: one file a task, each a callable of a `Context`."""
