"""Serve the report page of a run on this machine and save the edits made on it.

The server binds to loopback and answers it only. Every request carries a secret. Nothing outside
the run's folder is read; pictures are requested by number.
"""

from __future__ import annotations

import hashlib
import io
import ipaddress
import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.reports.page import render_report
from spice_pl.runs.clusters import ReliableRule
from spice_pl.runs.edits import Edits, check_reviewed, parse_edits, read_edits
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.page_data import report_data
from spice_pl.tasks.base import Context
from spice_pl.tasks.edit import write_applied

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"  # loopback: no other machine can connect
MAX_BODY = 16_000_000  # bytes of edits; 100,000 moved images with long names
KINDS = {  # files of the run that may be read: content type by suffix
    ".csv": "text/csv",
    ".json": "application/json",
    ".md": "text/plain",
}


class Review:
    """Serve the report of the upstream run until Ctrl-C.

    Args:
        port: port to listen on; 0 takes a free one.
        reliable: which images count as reliable after edits, see `ReliableRule`.
        allow_targets: names of your own packages that define the model's network.
    """

    def __init__(
        self, port: int, reliable: Mapping[str, Any], allow_targets: Sequence[str] = ()
    ) -> None:
        self.port, self.rule, self.allow_targets = port, ReliableRule(**reliable), allow_targets

    def __call__(self, context: Context) -> None:
        """Serve the page; saved edits go to edits.json and names.json of the reviewed run.

        They are also applied, see `tasks.edit`.
        """
        images = context.images()

        def apply(edits: Edits) -> RunFolder:
            return write_applied(
                edits,
                context.upstream[0],
                context.upstream[1:],
                images,
                self.rule,
                self.allow_targets,
            )

        server, token = make_server(
            context.upstream[0], context.upstream[1:], images, self.port, apply
        )
        address = f"http://{HOST}:{server.server_port}/?token={token}"
        logger.info("open %s in a browser; Ctrl-C ends the review", address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            logger.info("the review has ended")
        finally:
            server.server_close()


def is_loopback(host: str) -> bool:
    """Whether an IP address is loopback; False for a host name, which may resolve to any."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_server(
    folder: RunFolder,
    upstream: Sequence[RunFolder],
    images: ImageSet,
    port: int = 0,
    apply: Callable[[Edits], RunFolder] | None = None,
) -> tuple[ThreadingHTTPServer, str]:
    """Bind the server of a run; return it with the secret that every request must carry.

    Raises:
        UsageError: the port cannot be used.
    """
    token = secrets.token_urlsafe(24)
    answers = Answers(folder, upstream, images, apply)

    class Handler(_Handler):
        secret = token
        site = answers

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise UsageError(
            f"review.task.port={port} cannot be used ({error}); 0 takes a free one"
        ) from error
    server.daemon_threads = True
    return server, token


class Answers:
    """Answers to requests about one run: its page, its pictures, its files, and saving edits.

    Args:
        folder: artifacts of the run.
        upstream: artifacts of the stages before it, the nearest first.
        images: the data set.
        apply: function that writes the run after the edits; None only saves them.
    """

    def __init__(
        self,
        folder: RunFolder,
        upstream: Sequence[RunFolder],
        images: ImageSet,
        apply: Callable[[Edits], RunFolder] | None = None,
    ) -> None:
        self.folder, self.images, self.apply = folder, images, apply
        self.saving = threading.Lock()  # one save at a time: requests come in threads
        self.upstream, self.metrics = upstream, folder.metrics

    def page(self) -> tuple[str, bytes]:
        """Return the report page, with the edits that were saved last."""
        data = report_data(
            self.folder, self.upstream, self.images, self.metrics, self.folder.read_clusters()
        )
        more: dict[str, Any] = {"save": "/edits", "image": "/image/"}
        saved = self.folder.path / "edits.json"
        if saved.is_file():
            edits = read_edits(saved)
            if edits.digest == self.metrics["digest"]:
                more["edits"] = edits.as_json()
        more["version"] = self.version()
        data = replace(data, review={**data.review, **more})
        return "text/html; charset=utf-8", render_report(data).encode("utf-8")

    def image(self, name: str) -> tuple[str, bytes] | None:
        """Return the picture of image number `name` as PNG; None for anything else."""
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            return None
        if int(name) >= len(self.images):
            return None
        pixels = np.ascontiguousarray(self.images.images[int(name)].transpose(1, 2, 0))
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return "image/png", buffer.getvalue()

    def file(self, name: str) -> tuple[str, bytes] | None:
        """Return a file directly in the run's folder; None for others, by `..` or a link too."""
        root = self.folder.path.resolve()
        path = (root / name).resolve()
        if path.parent != root or path.suffix not in KINDS or not path.is_file():
            return None
        return KINDS[path.suffix], path.read_bytes()

    def version(self) -> str:
        """Return a digest of the saved edits; empty if there are none."""
        saved = self.folder.path / "edits.json"
        return hashlib.blake2b(saved.read_bytes()).hexdigest()[:16] if saved.is_file() else ""

    def save(self, body: bytes, version: str | None = None) -> str:
        """Check edits, write edits.json and names.json, and apply them.

        Args:
            body: JSON of the edits.
            version: of the saved edits that the page began with; None does not compare it.

        Returns:
            Three lines: the path of edits.json, the report of the edited run (empty if edits are
            only saved), and the new version.

        Raises:
            UsageError: the edits do not fit this run, or another page saved since.
        """
        with self.saving:
            if version is not None and version != self.version():
                raise UsageError(
                    "another window or person saved edits of this run since this page was opened; "
                    "open the page again to see them, then make your changes there"
                )
            return self._save(body)

    def _save(self, body: bytes) -> str:
        try:
            content = json.loads(body)
        except ValueError as error:
            raise UsageError(f"the edits are not JSON: {error}") from error
        edits = parse_edits(content, "the edits")
        check_reviewed(
            edits,
            self.metrics["fingerprint"],
            self.metrics["digest"],
            self.metrics["num_clusters"],
            self.images.keys,
        )
        made = ""
        if self.apply is not None:
            made = str(self.apply(edits).path / "report.html")
        self.folder.write_json("edits.json", edits.as_json())
        self.folder.write_json("names.json", {str(c): name for c, name in edits.names.items()})
        logger.info("edits saved in %s", self.folder.path / "edits.json")
        return "\n".join([str(self.folder.path / "edits.json"), made, self.version()])


class _Handler(BaseHTTPRequestHandler):
    """Checks each request and routes it to `Answers`."""

    secret: str
    site: Answers
    server: ThreadingHTTPServer
    server_version, sys_version = "spice-pl", ""
    timeout = 30  # seconds after which a silent client is dropped

    def do_GET(self) -> None:
        """Answer /, /image/<number> and /run/<file>."""
        url = urlsplit(self.path)
        if not self._admitted(parse_qs(url.query).get("token", [""])[0]):
            return
        path = unquote(url.path)
        answer: tuple[str, bytes] | None = None
        if path == "/":
            answer = self.site.page()
        elif path.startswith("/image/"):
            answer = self.site.image(path.removeprefix("/image/"))
        elif path.startswith("/run/"):
            answer = self.site.file(path.removeprefix("/run/"))
        if answer is None:
            self._say(404, "not found")
        else:
            self._send(200, *answer)

    def do_POST(self) -> None:
        """Answer /edits."""
        if not self._admitted(""):
            return None
        if urlsplit(self.path).path != "/edits":
            return self._say(404, "not found")
        if self.headers.get("Content-Type") != "application/json":
            return self._say(415, "edits are application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and 0 < int(length) <= MAX_BODY):
            return self._say(413, f"edits have 1 to {MAX_BODY} bytes")
        try:
            version = self.headers.get("X-Edits-Version")
            where = self.site.save(self.rfile.read(int(length)), version)
        except UsageError as error:
            return self._say(400, str(error))
        return self._say(200, where)

    def _admitted(self, token: str) -> bool:
        """Whether a request may be answered; if not, answer it with 403.

        It must come from loopback, name this machine as host (against DNS rebinding), come from our
        own page and carry the secret.
        """
        cookies = SimpleCookie(self.headers.get("Cookie", ""))
        own = f"review{self.server.server_port}"  # cookies do not tell ports apart
        given = token or (cookies[own].value if own in cookies else "")
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        reasons: list[tuple[Callable[[], bool], str]] = [
            (lambda: is_loopback(str(self.client_address[0])), "this machine only"),
            (lambda: _is_own_name(host), f"host {host!r} is not this machine"),
            (lambda: origin in (None, f"http://{host}"), "the request comes from another page"),
            (lambda: secrets.compare_digest(given.encode(), self.secret.encode()), "wrong token"),
        ]
        refused = next((reason for holds, reason in reasons if not holds()), None)
        if refused is not None:
            self.close_connection = True
            self._say(403, f"refused: {refused}")
        return refused is None

    def _say(self, code: int, text: str) -> None:
        self._send(code, "text/plain; charset=utf-8", text.encode("utf-8", "backslashreplace"))

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")  # the address holds the token
        self.send_header("Cache-Control", "no-store")
        if code == 200:
            port = self.server.server_port
            cookie = f"review{port}={self.secret}; HttpOnly; SameSite=Strict; Path=/"
            self.send_header("Set-Cookie", cookie)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log nothing: request lines hold the token."""


def _is_own_name(host: str) -> bool:
    name = host.rpartition(":")[0] or host
    return name == "localhost" or is_loopback(name.strip("[]"))
