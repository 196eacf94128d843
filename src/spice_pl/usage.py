"""The text of --help. Hydra's own help would compose the settings first, which takes a second."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from spice_pl.system.command import command


@dataclass(frozen=True)
class Verb:
    """A short form of the command.

    Attributes:
        stage: the stage or task that runs.
        words: what follows the verb.
        settings: for each word, the settings that it stands for.
        what: what it does, in one line.
        results: where its results are.
    """

    stage: str
    words: tuple[str, ...]
    settings: Mapping[str, tuple[str, ...]]
    what: str
    results: str = ""


_RUN = {"RUN": ("of={}",)}
_EDITS = "runs/<dataset>/edits"
_IMAGES = ("dataset=folder", "dataset.root={}")
VERBS = {
    "inspect": Verb(
        "inspect",
        ("DIR",),
        {"DIR": _IMAGES},
        "look at images before training",
        "runs/<dataset>/inspect",
    ),
    "trust": Verb(
        "trust", ("RUN",), _RUN, "how far to believe its clusters, without labels", "RUN/trust"
    ),
    "review": Verb(
        "review", ("RUN",), _RUN, "name, merge and split its clusters in a browser", _EDITS
    ),
    "edit": Verb(
        "edit",
        ("RUN", "FILE"),
        {**_RUN, "FILE": ("edit.file={}",)},
        "apply saved edits to it",
        _EDITS,
    ),
    "report": Verb("report", ("RUN",), _RUN, "write its report page again", "RUN/report.html"),
    "predict": Verb(
        "predict",
        ("RUN", "NEW"),
        {**_RUN, "NEW": _IMAGES},
        "cluster the images in the folder NEW",
        "RUN/predict/<folder>",
    ),
    "name": Verb(
        "name",
        ("RUN", "WORDS"),
        {**_RUN, "WORDS": ("name.words={}",)},
        "suggest names for its clusters from words",
        "RUN/name",
    ),
    "sort": Verb(
        "sort", ("RUN",), _RUN, "copy its images into one folder per cluster", "RUN/sort/sorted"
    ),
    "export": Verb(
        "export", ("RUN",), _RUN, "write its model and clusters for other programs", "RUN/export"
    ),
    "estimate-k": Verb(
        "estimate_k", ("RUN",), _RUN, "how many clusters its features show", "RUN/estimate_k"
    ),
    "compare": Verb("", ("RUN...",), {}, "runs in one table, with mean and spread over seeds"),
}

TEXT = """\
Cluster images without labels: SPICE (Niu et al. 2022) in three stages.

First steps
  python train.py DIR
      cluster the images below the folder DIR, on the features of a pretrained network;
      the number of clusters is estimated, dataset.num_clusters=K sets it
  python train.py hf://OWNER/NAME dataset.split=train
      the same with a data set of the Hugging Face Hub
  python train.py dataset=digits
      the paper's three stages on the 1,797 handwritten digits inside scikit-learn: minutes,
      no download

  Results are in runs/<dataset>/<stage>/<run>, for example runs/digits/fixmatch/seed0.
  Open report.html there in a browser; clusters.csv has one line per image.

With a finished run
{verbs}

  RUN is the folder of a run, such as runs/photos/proto/seed0, or a data set below runs, such as
  photos: then it is the newest run with clusters. Its own settings are used; results are put into
  its folder. VERB --help shows the settings of one. A folder of photos that has the name of a
  verb is written ./NAME.

Stages
  A job runs moco (learns features), proto (finds clusters) and fixmatch (trains features and
  clusters together); on your own images embed (features of a pretrained network) and proto,
  or the first three with recipe=scratch. stage=NAME runs one of them, or a task on finished
  runs. Give it the same dataset= and other settings as the runs that it reads.
  python train.py stage=proto              one stage; it reads the finished stage before it
  python train.py stage=trust              a task, as the verbs above, by the job's own settings

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
    verbs = [_verb_line(name) for name in VERBS]
    text = TEXT.format(groups="\n".join(lines), verbs="\n".join(verbs))
    return _as_typed(text)


def verb_usage(name: str, conf: Path) -> str:
    """Return the help text of a verb, with the settings that it has."""
    verb = VERBS[name]
    lines = [_verb_line(name), ""]
    if "RUN" in verb.words:
        lines += [
            "  RUN is the folder of a finished run, or a data set below runs: then it is the",
            "  newest run of it. Settings of the run are used.",
        ]
    if "NEW" not in verb.words and "RUN" in verb.words:
        lines += ["  If its images were moved, give dataset.root=PATH."]
    file = conf / "stage" / f"{verb.stage}.yaml"
    if file.is_file():
        shown = file.read_text(encoding="utf-8").splitlines()
        shown = [line for line in shown if not line.startswith(("# @package", "stages:"))]
        lines += [f"  Results are put into {verb.results}.", ""]
        lines += ["Settings with their defaults. Keys are joined by dots, as in"]
        lines += [f"  python train.py {name} {' '.join(verb.words)} {verb.stage}.task.KEY=VALUE"]
        lines += ["", *(f"  {line}" for line in shown)]
    else:
        lines += ["  --to DIR    folder for compare.md, compare.csv and compare.html"]
    return _as_typed("\n".join(lines))


def _verb_line(name: str) -> str:
    words = " ".join([name, *VERBS[name].words])
    return f"  python train.py {words:<20} {VERBS[name].what}"


def _as_typed(text: str) -> str:
    """Return a text in which commands begin as the user began theirs."""
    return text.replace("python train.py", " ".join(command()))
