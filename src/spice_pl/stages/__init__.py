"""Stages: each a LightningModule that only arranges functions and networks."""
