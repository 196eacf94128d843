"""Networks that travel: model.spice and published checkpoints."""
