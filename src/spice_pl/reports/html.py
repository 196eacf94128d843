"""Shared by all pages: templates that escape all values, and atomic writes."""

import base64
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

from spice_pl.reports.tables import duration_text, score_text
from spice_pl.system.files import atomic


def write_page(page: str, path: Path) -> Path:
    """Write HTML to path; the old file stays until the new one is complete on disk."""
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def template_environment() -> jinja2.Environment:
    """Return templates that escape all values and spell out unprintable characters."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spice_pl.reports"),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration_text, "score": score_text}
    return environment


def content_hash(script: str) -> str:
    """Return the hash by which a content security policy allows this script only."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def visible(text: str) -> str:
    """Spell out unprintable characters; file names may hold lone surrogates or bidi overrides."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _visible(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
