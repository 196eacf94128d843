"""From composed settings to finished runs; the only package that knows Hydra, beside the doors."""
