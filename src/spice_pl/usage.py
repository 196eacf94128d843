"""The text of --help. Hydra's own help would compose the settings first, which takes a second."""

from pathlib import Path
from textwrap import fill

from spice_pl.system.command import command

TEXT = """\
Cluster images without labels: SPICE (Niu et al. 2022) in three stages.

First steps
  python train.py DIR
      cluster the images below the folder DIR, on the features of a pretrained network;
      the number of clusters is estimated, dataset.num_clusters=K sets it
  python train.py DIR stage=inspect
      look at your images before training: sizes, copies, what a network will see
  python train.py
      the paper's three stages on the 1,797 handwritten digits inside scikit-learn: minutes,
      no download

  Results are in runs/<dataset>/<stage>/<run>, for example runs/digits/fixmatch/seed0.
  Open report.html there in a browser; clusters.csv has one line per image.

Stages
  A job runs moco (learns features), proto (finds clusters) and fixmatch (trains features and
  clusters together); on your own images embed (features of a pretrained network) and proto,
  or the first three with recipe=scratch. stage=NAME runs one of them, or a task on finished
  runs. Give it the same dataset= and other settings as the runs that it reads.
  python train.py stage=proto              one stage; it reads the finished stage before it
  python train.py stage=estimate_k         estimate K from the features of stage moco
  python train.py stage=trust              check a result without labels
  python train.py stage=review             name, merge and split clusters in a browser
  python train.py DIR stage=predict predict.model=RUN
      cluster new images with the trained model in the folder RUN

Runs
  python train.py resume=true              continue an interrupted run
  python train.py overwrite=true           train from scratch and replace a finished run
  python train.py -m seed=0,1,2            a sweep: one run per value, and a table of all
  python train.py trainer=ddp              all GPUs of this machine, one process each
  python train.py logger=wandb             log to W&B; WANDB_MODE=offline needs no account

Groups: choose one file of settings with group=option
{groups}

Settings: change any number with key=value, such as moco.epochs=200 or reliable.agreement=0.9
  python train.py --cfg job                print all settings with their values
  python train.py --hydra-help             print the options of the command line itself
  eval "$(python train.py -sc install=bash)"   complete groups and settings with the tab key
"""
MEANING = {  # of the groups
    "augment": "random views, by kind of image",
    "backbone": "the network",
    "dataset": "the images",
    "experiment": "ready-made jobs",
    "logger": "where curves are logged",
    "preset": "numbers that go with dataset=",
    "proto/ablation": "rows of SPICE's Tables VII and VIII",
    "recipe": "where features come from",
    "stage": "what runs",
    "trainer": "devices and processes",
}


def conf_folder() -> Path:
    """Return the folder of the settings: in the installed package, or beside src in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def usage(conf: Path) -> str:
    """Return the help text, with the groups and options found in the folder of settings."""
    lines = []
    groups = {file.parent for file in conf.glob("*/**/*.yaml")} - {conf / "recipe_of"}
    for group in sorted(groups):
        name = group.relative_to(conf).as_posix()
        options = " | ".join(sorted(option.stem for option in group.glob("*.yaml")))
        line = f"  {name + '=':<12}{options}  ({MEANING.get(name, 'settings')})"
        lines.append(fill(line, width=98, subsequent_indent=14 * " "))
    text = TEXT.format(groups="\n".join(lines))
    return text.replace("python train.py", " ".join(command()))
