"""What the script of the report page reads: search, map and edits, as JSON.

Shapes: N images.
"""

import base64
import json
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_pl.reports.report_data import ReportData
from spice_pl.reports.wall import PIXEL_ART, atlas

ATLAS_PIXELS = 40  # side of a picture of the map; 5,000 photographs are 3 to 4 MB
ATLAS_SIDE = 2_800  # of the sheet of all pictures; fewer of them are larger, up to 96 pixels
LISTED_BYTES = 2_500_000  # most bytes of file names; beyond it only the shown images are listed


def script_data(data: ReportData, shown: NDArray[np.intp]) -> str:
    """Return JSON that cannot end the HTML element it is in.

    Args:
        data: what the page shows.
        shown: images whose pictures are on the page.
    """
    everything = sum(len(str(key)) + 3 for key in data.keys) <= LISTED_BYTES
    listed = np.arange(data.num_images) if everything else _pictured(data, shown)
    not_sure = data.not_sure[listed]
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
        "originals": data.originals,
        "csv": data.csv,
        **_neighbors(data, shown, listed),
    }
    if data.labels is not None and data.known is not None:
        highest = int(data.labels.max())
        content["label"] = _packed(data.labels[listed], "<i2")
        content["classes"] = [data.class_name(label) for label in range(highest + 1)]
    if data.map is not None and len(data.map.index):
        tile = _tile(data)
        uri, per_row = atlas(data.images, data.map.index, tile)
        content["map"] = {
            "row": _packed(np.searchsorted(listed, data.map.index), "<u4"),
            "x": _packed(65535 * data.map.points[:, 0], "<u2"),
            "y": _packed(65535 * data.map.points[:, 1], "<u2"),
            "tile": tile,
            "perRow": per_row,
            "atlas": uri,
        }
        if data.k_choice is not None:
            content["previews"] = [asdict(each) for each in data.k_choice.previews]
    text = json.dumps(content, separators=(",", ":"))  # pure ASCII: surrogates are escaped
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _tile(data: ReportData) -> int:
    """Return the side of a picture on the map."""
    if data.map is None:
        return ATLAS_PIXELS
    side = int(data.images(data.map.index[:1]).shape[-1])
    fitting = int(ATLAS_SIDE / np.ceil(np.sqrt(len(data.map.index))))
    return side if side < PIXEL_ART else min(max(fitting, ATLAS_PIXELS), 96, side)


def _pictured(data: ReportData, shown: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the images that have a picture on the page, in order."""
    drawn = data.map.index if data.map is not None else np.empty(0, np.intp)
    return np.unique(np.concatenate([drawn, shown]))


def _neighbors(
    data: ReportData, shown: NDArray[np.intp], listed: NDArray[np.intp]
) -> dict[str, Any]:
    """Return the nearest others of each image with a picture, among these."""
    pictured = _pictured(data, shown)
    if data.neighbors is None or not 2 <= len(pictured) < 2**16:
        return {}
    found = data.neighbors(pictured)  # (m, k)
    return {
        "pictured": _packed(np.searchsorted(listed, pictured), "<u4"),
        "near": _packed(found.ravel(), "<u2"),
        "numNear": found.shape[1],
    }


def _packed(values: NDArray[Any], kind: str) -> str:
    """Return numbers as base64 of little-endian bytes, a quarter of their size as JSON."""
    kept = np.rint(np.asarray(values, dtype=np.float64)).astype(kind)
    return base64.b64encode(kept.tobytes()).decode("ascii")
