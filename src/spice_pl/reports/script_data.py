"""What the script of the report page reads: search, map and edits, as JSON.

Shapes: N images.
"""

import base64
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_pl.reports.report_data import ReportData
from spice_pl.reports.wall import PIXEL_ART, Wall, atlas

ATLAS_PIXELS = 40  # side of a picture of the map; 5,000 photographs are 3 to 4 MB
LISTED_BYTES = 2_500_000  # most bytes of file names; beyond it only the shown images are listed


def script_data(data: ReportData, wall: Wall) -> str:
    """Return JSON that cannot end the HTML element it is in."""
    everything = sum(len(str(key)) + 3 for key in data.keys) <= LISTED_BYTES
    if everything:
        listed = np.arange(data.num_images)
    else:
        drawn = data.map.index if data.map is not None else np.empty(0, np.intp)
        listed = np.unique(np.concatenate([drawn, *(chosen.shown for chosen in wall.clusters)]))
    not_sure = data.agreement[listed] < wall.agreement_threshold
    content: dict[str, Any] = {
        "numImages": data.num_images,
        "numClusters": data.num_clusters,
        "listed": None if everything else _packed(listed, "<u4"),
        "keys": [str(data.keys[i]) for i in listed.tolist()],
        "cluster": _packed(data.clusters[listed], "<u2"),
        "confidence": _packed(255 * data.confidence[listed], "<u1"),
        "agreement": _packed(255 * data.agreement[listed], "<u1"),
        "flags": _packed(data.reliable[listed] + 2 * not_sure, "<u1"),
        "names": {str(cluster): name for cluster, name in data.names.items()},
        "review": dict(data.review),
    }
    if data.labels is not None and data.known is not None:
        highest = int(data.labels.max())
        content["label"] = _packed(data.labels[listed], "<i2")
        content["classes"] = [data.class_name(label) for label in range(highest + 1)]
    if data.map is not None and len(data.map.index):
        shown = data.images(data.map.index)
        tile = shown.shape[-1] if shown.shape[-1] < PIXEL_ART else ATLAS_PIXELS
        uri, per_row = atlas(shown, tile)
        content["map"] = {
            "row": _packed(np.searchsorted(listed, data.map.index), "<u4"),
            "x": _packed(65535 * data.map.points[:, 0], "<u2"),
            "y": _packed(65535 * data.map.points[:, 1], "<u2"),
            "tile": tile,
            "perRow": per_row,
            "atlas": uri,
        }
    text = json.dumps(content, separators=(",", ":"))  # pure ASCII: surrogates are escaped
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _packed(values: NDArray[Any], kind: str) -> str:
    """Return numbers as base64 of little-endian bytes, a quarter of their size as JSON."""
    kept = np.rint(np.asarray(values, dtype=np.float64)).astype(kind)
    return base64.b64encode(kept.tobytes()).decode("ascii")
