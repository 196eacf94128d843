"""Cluster images without labels: `python train.py [stage=...] [dataset=...]`, see README.md."""

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run the job; what is heavy is imported here, so that --help answers at once."""
    from spice_pl import run

    return run.main(cfg)


if __name__ == "__main__":
    main()
