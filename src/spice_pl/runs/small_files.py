"""Schemas of the JSON files of a run: metrics.json and dataset.json."""

from __future__ import annotations

from collections.abc import Mapping

from spice_pl.system.schema import (
    AMOUNT,
    COUNT,
    FLAG,
    NUMBER,
    TEXT,
    WHOLE,
    Kind,
    check_fields,
    is_cluster,
    is_name,
    is_text,
    is_whole,
    list_of,
    map_of,
    object_of,
    optional,
    parse_object,
    read_text,
)

__all__ = [
    "METRICS",
    "STAMP",
    "Kind",
    "check_fields",
    "is_cluster",
    "is_name",
    "is_text",
    "is_whole",
    "parse_object",
    "read_text",
]

_ROW: Mapping[str, Kind] = {  # fields of `ResultRow`
    "name": TEXT,
    **dict.fromkeys(("acc", "nmi", "ari", "purity", "recall"), optional(NUMBER)),
    "protocol": TEXT,
    "seed": WHOLE,
    "seconds": AMOUNT,
    "oracle": FLAG,
}
_COMPARED: Mapping[str, Kind] = {  # fields of `Compared`
    "name": TEXT,
    "kept": FLAG,
    **dict.fromkeys(("agreement", "evenness", "alike", "sure", "score"), NUMBER),
    **dict.fromkeys(("smallest", "largest"), COUNT),
}
# Fields of metrics.json that are read later. Stages and tasks write some of them.
METRICS: Mapping[str, Kind] = {
    **dict.fromkeys(("stage", "title", "preset", "dataset", "fingerprint", "protocol"), TEXT),
    **dict.fromkeys(("precision", "digest", "checksum"), TEXT),
    **dict.fromkeys(("num_clusters", "num_images", "num_neighbors", "devices"), COUNT),
    **dict.fromkeys(("seconds", "seconds_in_all", "peak_memory_mb"), AMOUNT),
    "seed": WHOLE,
    "overrides": list_of(TEXT),
    **dict.fromkeys(("settings", "versions", "digests"), map_of(TEXT)),
    "objective": optional(NUMBER),
    "cluster_sizes": list_of(COUNT),
    "odd": map_of(COUNT),
    "compared": list_of(object_of(_COMPARED, needed=set(_COMPARED))),
    "rows": list_of(object_of(_ROW, needed=_ROW.keys() - {"purity", "recall", "oracle"})),
}
# Fields of dataset.json.
STAMP: Mapping[str, Kind] = {
    "fingerprint": TEXT,
    "num_images": COUNT,
    "upstream": optional(TEXT),
}
