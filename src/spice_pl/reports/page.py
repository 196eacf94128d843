"""Render the report page of a clustering run: one HTML file that opens offline."""

from pathlib import Path

import numpy as np
from markupsafe import Markup

from spice_pl.reports import sections
from spice_pl.reports.charts import charts, head_choice
from spice_pl.reports.html import content_hash, template_environment, write_page
from spice_pl.reports.pictures import pictures_of, sheets_of, shown_wall
from spice_pl.reports.published import published_results
from spice_pl.reports.report_data import ReportData
from spice_pl.reports.script_data import script_data
from spice_pl.reports.tables import NO_LABELS, footnotes
from spice_pl.reports.wall import PIXEL_ART

__all__ = ["ReportData", "render_report", "shown_wall", "write_report"]

SCRIPTS = ("report.js", "map.js", "edits.js")  # one scope: later ones use names of earlier ones
MANY = 30  # clusters from which on the page shows an index and folds its sections
ODD_SHOWN = 12  # pictures of each kind of odd images
MAX_SKIPPED = 200  # skipped files listed on the page; the rest is counted


def render_report(data: ReportData) -> str:
    """Return the page as HTML; nothing is loaded from outside and no other script can run."""
    wall = shown_wall(
        *(data.confidence, data.agreement, data.clusters, data.num_clusters, data.num_neighbors)
    )
    odd = [each.index[:ODD_SHOWN].astype(np.intp) for each in data.oddities]
    groups = [*(chosen.shown for chosen in wall.clusters), *odd]
    sheets, side = sheets_of(data.images, groups, data.attention, data.shapes, len(wall.clusters))
    pictures = [
        pictures_of(data, index, sheet) for index, sheet in zip(groups, sheets, strict=True)
    ]
    clusters = sections.cluster_sections(data, wall, pictures[: len(wall.clusters)])
    headline = next((row for row in data.rows if not row.oracle), None)
    has_scores = any(row.has_scores for row in data.rows)
    environment = template_environment()
    parts = [environment.loader.get_source(environment, name)[0] for name in SCRIPTS]  # type: ignore[union-attr]
    script = f'"use strict";\n(() => {{\n{"".join(parts)}}})();\n'
    shown = np.concatenate([np.empty(0, np.intp), *groups])
    return environment.get_template("report.html.j2").render(
        data=data,
        oracle=bool(data.rows) and data.rows[0].oracle,
        facts=sections.facts(data, headline, wall.num_not_sure),
        terms=sections.TERMS | (sections.SCORE_TERMS if has_scores else {}),
        notes=[*data.notes, *sections.warnings(data)],
        sheets=sheets,
        tile_pixels=84 // side * side if side < PIXEL_ART else 80,
        pixel_art=side < PIXEL_ART,
        explained=sections.WALLS,
        clusters=clusters,
        many=len(clusters) >= MANY,
        odd=list(zip(data.oddities, pictures[len(wall.clusters) :], strict=True)),
        equal=sections.equal_share(data),
        num_not_sure=wall.num_not_sure,
        has_scores=has_scores,
        published=published_results(data.dataset),
        footnotes=footnotes(data.rows) if data.rows else [NO_LABELS] * (data.labels is None),
        confusion=sections.confusion(data),
        charts=charts(data.logs),
        heads=head_choice(data.logs),
        subsets=sections.subsets(data),
        skipped=data.skipped[:MAX_SKIPPED],
        num_skipped=max(data.num_skipped, len(data.skipped)),
        served="save" in data.review,
        script=Markup(script),  # noqa: S704 - our own file
        script_hash=content_hash(script),
        payload=Markup(script_data(data, shown)),  # noqa: S704 - JSON without <, > and &
    )


def write_report(data: ReportData, path: Path) -> Path:
    """Write the page to path; the old page stays until the new one is complete on disk."""
    return write_page(render_report(data), path)
