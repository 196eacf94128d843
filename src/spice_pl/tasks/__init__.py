"""Tasks that `stage=NAME` runs and that train no stage: one file each, called with a `Context`."""
