"""Words that `stage=name` suggests for the clusters of a run. They name nothing; a user may."""

from __future__ import annotations

from collections.abc import Mapping

from spice_pl.errors import UsageError
from spice_pl.runs.folder import RunFolder
from spice_pl.system.schema import (
    NUMBER,
    TEXT,
    Kind,
    check_fields,
    is_cluster,
    is_name,
    map_of,
    object_of,
    parse_object,
    read_text,
)

FILE_NAME = "suggested.json"
_WORD = {"word": Kind("a name", is_name), "score": NUMBER}
_FIELDS = {
    "digest": TEXT,
    "network": TEXT,
    "clusters": map_of(object_of(_WORD, needed=set(_WORD))),
}


def write_suggestions(
    folder: RunFolder, run: RunFolder, words: Mapping[int, tuple[str, float]], network: str
) -> None:
    """Write the best word and its score of each cluster of a run.

    Args:
        folder: folder of `stage=name`, where the file is written.
        run: the run whose clusters these are; its digest is noted.
        words: word and score, by cluster.
        network: what compared images and words.
    """
    clusters = {str(k): {"word": word, "score": score} for k, (word, score) in words.items()}
    about = {"digest": run.metrics["digest"], "network": network, "clusters": clusters}
    folder.write_json(FILE_NAME, about)


def read_suggestions(run: RunFolder) -> dict[int, tuple[str, float]]:
    """Return the word and its score of each cluster; empty where none were made for these clusters.

    They are in the folder `name` of the run, where the verb writes them, or in that of `stage=name`
    beside its stage.

    Raises:
        UsageError: the file does not have its form.
    """
    for folder in (run.path / "name", run.path.parents[1] / "name" / run.path.name):
        file = folder / FILE_NAME
        if not file.is_file():
            continue
        try:
            found = parse_object(read_text(file))
            check_fields(found, _FIELDS)
            if missing := _FIELDS.keys() - found.keys():
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            if wrong := [key for key in found["clusters"] if not is_cluster(key)]:
                raise ValueError(f"{wrong[0]!r} is not the number of a cluster")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{file} cannot be read ({error}); delete it, or run the verb name again"
            ) from error
        if found["digest"] == run.metrics["digest"]:
            words = found["clusters"].items()
            return {int(key): (each["word"], float(each["score"])) for key, each in words}
    return {}
