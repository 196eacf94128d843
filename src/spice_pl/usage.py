"""What `python train.py --help` prints; Hydra's own composes the config and takes a second."""

from pathlib import Path

from spice_pl.system.command import command

TEXT = """\
Cluster images without a single label (SPICE).

  python train.py                                     all stages on the digits inside scikit-learn
  python train.py dataset=folder dataset.root=DIR dataset.num_clusters=K
  python train.py stage=proto dataset=cifar10         one stage; finds the one before it by path
  python train.py -m seed=0,1,2                       a sweep
  python train.py resume=true | overwrite=true        go on | start anew
  python train.py logger=wandb                        dashboards (WANDB_MODE=offline, no account)
  python train.py trainer=ddp_cpu trainer.devices=2   two processes on the processor

Groups, group=option:
{groups}

Settings, key=value: moco.epochs=200, proto.module.num_heads=5, reliable.agreement=0.9, ...
  python train.py --cfg job            prints all of them with their values
  python train.py --hydra-help         options of the command line itself
  eval "$(python train.py -sc install=bash)"   completes groups and settings with the tab key
"""


def conf_folder() -> Path:
    """Return where the settings are: inside the installed package, or beside src in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def usage(conf: Path) -> str:
    """Return the help text, with the options that the folder of settings holds."""
    lines = []
    for group in sorted(folder for folder in conf.iterdir() if folder.is_dir()):
        options = sorted(option.stem for option in group.glob("*.yaml"))
        lines.append(f"  {group.name + '=':<12}{' | '.join(options)}")
    text = TEXT.format(groups="\n".join(lines))
    return text.replace("python train.py", " ".join(command()))
