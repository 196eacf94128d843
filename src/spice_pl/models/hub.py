"""Send a `model.spice` to the Hugging Face Hub and fetch one, each only where the user asks for it.

Loading a file never opens a connection: `pull` fetches the file first and returns its path.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from spice_pl.errors import UsageError
from spice_pl.models.header import FILE_NAME
from spice_pl.models.known import Known
from spice_pl.models.portable import PortableModel
from spice_pl.reports.tables import ResultRow, results_markdown

SCHEME = "hf://"


def is_on_hub(name: str) -> bool:
    """Whether this names a repository of the Hub, as hf://owner/name.

    >>> is_on_hub("hf://ann/birds"), is_on_hub("runs/birds")
    (True, False)
    """
    return name.startswith(SCHEME)


def pull(name: str) -> Path:
    """Fetch the `model.spice` of a repository into the Hub's cache; return its path.

    Args:
        name: hf://owner/name, or hf://owner/name@revision; hf:// may be left out.

    Raises:
        UsageError: the name is not of this form, huggingface_hub is missing, or nothing was found.
    """
    repo, _, revision = name.removeprefix(SCHEME).partition("@")
    check_repo(repo, name)
    with _hub(f"{FILE_NAME} of {repo} cannot be fetched") as hub:
        return Path(hub.hf_hub_download(repo, FILE_NAME, revision=revision or None))


def push(model: PortableModel, metrics: Mapping[str, Any], repo: str, *, private: bool) -> str:
    """Write a model and its card to a repository of the Hub, which is made if it is missing.

    File names of known images are replaced by numbers. The login is the Hub's own (`hf auth login`
    or HF_TOKEN); no setting holds a token.

    Args:
        model: the model.
        metrics: content of the run's metrics.json; {} if the model's run is not known.
        repo: owner/name.
        private: whether a new repository is private.

    Returns:
        Address of the repository.

    Raises:
        UsageError: the name is not of this form, huggingface_hub is missing, or the Hub refuses.
    """
    check_repo(repo, f"export.repo={repo}")
    model = without_names_of_files(model)
    with _hub(f"{repo} cannot be written") as hub, tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, FILE_NAME))
        Path(folder, "README.md").write_text(card(model, metrics, repo), encoding="utf-8")
        api = hub.HfApi()
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add model.spice")
    return str(url)


def without_names_of_files(model: PortableModel) -> PortableModel:
    """Return the model with numbers in place of the file names of its known images."""
    if model.known is None:
        return model
    keys = [f"image {i}" for i in range(len(model.known.keys))]
    return replace(model, known=Known(keys, model.known.embeddings, model.known.clusters))


def card(model: PortableModel, metrics: Mapping[str, Any], repo: str) -> str:
    """Return the model card: what it is, clusters, where it comes from, scores, how to use it."""
    about, known = model.about, 0 if model.known is None else len(model.known.keys)
    dataset = _plain(str(about.get("dataset", "images")))
    sizes = metrics.get("cluster_sizes") or [None] * model.num_clusters
    clusters = [
        f"| {k} | {_plain(name)} | {'–' if size is None else f'{size:,}'} |"
        for k, (name, size) in enumerate(zip(model.names, sizes, strict=True))
    ]
    rows = [ResultRow(**row) for row in metrics.get("rows", [])]
    scored = [row for row in rows if row.has_scores]
    scores = "No labels were given, so there are no scores against classes."
    if scored:
        scores = (
            "Against true labels, which were read after the clustering was finished. Protocol "
            "`whole` trains on all images without labels and scores the same ones; `split` scores "
            f"test images that were not trained on.\n\n{results_markdown(scored)}"
        )
    versions = ", ".join(f"{key} {value}" for key, value in about.get("versions", {}).items())
    facts = {
        "made by": metrics.get("title") or f"stage {about.get('stage', 'unknown')}",
        "data set": f"{dataset}, {int(about.get('num_images', 0)):,} images",
        "fingerprint of the data": about.get("fingerprint", "unknown"),
        "protocol": about.get("protocol", "unknown"),
        "seed": about.get("seed", "unknown"),
        "image size": f"{model.image_size} pixels",
        "known images": f"{known:,}, as embeddings without file names",
        "versions": versions or "unknown",
    }
    lines = [f"| {key} | {_plain(str(value))} |" for key, value in facts.items()]
    return f"""---
library_name: spice-pl
tags: [image-clustering, unsupervised, spice]
---

# {dataset}: {model.num_clusters} clusters

`{FILE_NAME}` puts an image into one of {model.num_clusters} clusters of similar images. It was
made with [spice-pl](https://github.com/spice-pl/spice-pl). Clusters are groups that look alike to
the network, not classes. Their names were given by hand.

| cluster | name | images |
|--:|:--|--:|
{chr(10).join(clusters)}

## Where it comes from

| | |
|:--|:--|
{chr(10).join(lines)}

## Scores

{scores.rstrip()}

## Use

```bash
pip install "spice-pl[hub] @ git+https://github.com/spice-pl/spice-pl"
spice predict {SCHEME}{repo} new_photos
```

```python
import spice_pl

model = spice_pl.load(spice_pl.pull("{repo}"))
found = model.predict("new_photos")
```
"""


def check_repo(repo: str, given: str) -> None:
    """Refuse what is not owner/name.

    Raises:
        UsageError: names what was given.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo, re.ASCII):
        raise UsageError(
            f"{given} does not name a repository of the Hugging Face Hub; give owner/name, of "
            "letters, digits, - _ and ."
        )


@contextmanager
def _hub(what: str) -> Iterator[Any]:
    """Yield huggingface_hub; turn its errors into one message."""
    try:
        import httpx
        import huggingface_hub
    except ImportError as error:
        raise UsageError(
            "the Hugging Face Hub needs the package huggingface_hub; pip install 'spice-pl[hub]'"
        ) from error
    try:
        yield huggingface_hub
    # Offline, no login, no such repository, and what httpx raises without a connection.
    except (OSError, ValueError, httpx.HTTPError) as error:
        if isinstance(error, UsageError):
            raise
        reason = " ".join(str(error).split())[:300].rstrip(". ")
        raise UsageError(
            f"{what}: {type(error).__name__}: {reason}; check the name and the connection, and log "
            "in with hf auth login (or HF_TOKEN)"
        ) from error


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, on one line.

    >>> _plain("a|b <i>")
    'a&#124;b &lt;i&gt;'
    """
    escaped = " ".join(text.split()).replace("&", "&amp;")
    for sign in "|[]`*_":
        escaped = escaped.replace(sign, f"&#{ord(sign)};")
    return escaped.replace("<", "&lt;").replace(">", "&gt;")
