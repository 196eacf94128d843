"""Serve the report page of a run on this machine and save the edits made on it.

The server binds to loopback and answers it only. Every request carries a secret. Nothing outside
the run's folder is read; pictures are requested by number. Connections, their time and the size of
a request are bounded.
"""

from __future__ import annotations

import hashlib
import io
import ipaddress
import logging
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from spice_pl.system.desktop import open_page
from spice_pl.system.interrupts import until_signal
from spice_pl.system.schema import parse_object
from spice_pl.tasks.base import Context
from spice_pl.tasks.edit import write_applied

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"  # loopback: no other machine can connect
MAX_BODY = 16_000_000  # bytes of edits; 100,000 moved images with long names
MAX_CONNECTIONS = 32  # at a time; a browser opens 6
MAX_SECONDS = 60  # of a connection
KINDS = {  # files of the run that may be read: content type by suffix
    ".csv": "text/csv",
    ".json": "application/json",
    ".md": "text/plain",
}


class Review:
    """Serve the report of the upstream run until Ctrl-C or another signal, its normal end.

    Args:
        port: port to listen on; 0 takes a free one.
        reliable: which images count as reliable after edits, see `ReliableRule`.
        allow_targets: names of your own packages that define the model's network.
        opened: whether the page opens in the browser; see `system.desktop.open_page`.

    Attributes:
        locks: False, since a page may stay open for days; `Answers.save` locks the run.
    """

    locks = False

    def __init__(
        self,
        port: int,
        reliable: Mapping[str, Any],
        allow_targets: Sequence[str] = (),
        opened: bool | str = False,
    ) -> None:
        self.opened = opened
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

        answers = Answers(context.upstream[0], context.upstream[1:], images, apply)
        server, token = serve(answers, self.port)
        address = f"http://{HOST}:{server.server_port}/?token={token}"
        logger.info("open %s in a browser; Ctrl-C ends the review", address)
        with server, until_signal():
            open_page(address, self.opened)
            server.serve_forever()
        saved = "edits were saved" if answers.end() else "no edits were saved"
        logger.info("review ended; %s", saved)


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
    """Return what `serve` does for the answers about a run."""
    return serve(Answers(folder, upstream, images, apply), port)


def serve(answers: Answers, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """Bind a server to its port; return it with the secret that every request must carry.

    Raises:
        UsageError: the port cannot be used.
    """
    token = secrets.token_urlsafe(24)

    class Handler(_Handler):
        secret = token
        site = answers

    try:
        server = _Server((HOST, port), Handler)
    except (OSError, OverflowError) as error:  # the latter: no such port
        raise UsageError(
            f"review.task.port={port} cannot be used ({error}); 0 takes a free one"
        ) from error
    return server, token


class Answers:
    """Answers to requests about one run: its page, its pictures, its files, and saving edits.

    The run may be made again while its page is open, so its metrics are read for each answer. One
    page or one save is made at a time.

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
        self.path, self.similarity, self.images = folder.path, folder.similarity, images
        self.upstream, self.apply = upstream, apply
        self._one_at_a_time, self._num_saved = threading.Lock(), 0

    @property
    def folder(self) -> RunFolder:
        """The run as it is now: a new object, which compares digests again."""
        return RunFolder(self.path, self.similarity)

    def page(self) -> tuple[str, bytes]:
        """Return the report page, with the edits that were saved last.

        Raises:
            UsageError: a file of the run is missing or damaged, or it is of other images by now.
        """
        with self._one_at_a_time:
            folder = self.folder
            metrics, table = folder.metrics, folder.read_clusters()
            folder.check_dataset(self.images.fingerprint, len(self.images))
            data = report_data(folder, self.upstream, self.images, metrics, table)
            more: dict[str, Any] = {"save": "/edits", "image": "/image/"}
            saved = folder.path / "edits.json"
            if saved.is_file():
                edits = read_edits(saved)
                if edits.digest == metrics["digest"]:
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
        found = next((path for path in self.path.iterdir() if path.name == name), None)
        if found is None or found.is_symlink() or not found.is_file() or found.suffix not in KINDS:
            return None
        return KINDS[found.suffix], found.read_bytes()

    def version(self) -> str:
        """Return a digest of the saved edits; empty if there are none."""
        saved = self.path / "edits.json"
        return hashlib.blake2b(saved.read_bytes()).hexdigest()[:16] if saved.is_file() else ""

    def end(self) -> int:
        """Wait until a save in progress is finished; return the number of saves."""
        with self._one_at_a_time:
            return self._num_saved

    def save(self, body: bytes, version: str | None = None) -> str:
        """Check edits, write edits.json and names.json, and apply them.

        Args:
            body: JSON of the edits.
            version: of the saved edits that the page began with; None does not compare it.

        Returns:
            Three lines: the path of edits.json, the report of the edited run (empty if edits are
            only saved), and the new version.

        Raises:
            UsageError: the edits do not fit the run as it is now, it is being made again, or
                another page saved since.
        """
        with self._one_at_a_time, self.folder.lock(wait=False):
            if version is not None and version != self.version():
                raise UsageError(
                    "another window or person saved edits of this run since this page was opened; "
                    "open the page again to see them, then make your changes there"
                )
            return self._save(body)

    def _save(self, body: bytes) -> str:
        try:
            content = parse_object(body.decode())
        except ValueError as error:
            raise UsageError(f"the edits are not JSON: {error}") from error
        edits, folder = parse_edits(content, "the edits"), self.folder
        metrics, made = folder.metrics, ""
        check_reviewed(
            edits,
            metrics["fingerprint"],
            metrics["digest"],
            metrics["num_clusters"],
            self.images.keys,
        )
        own = f"{folder.path.parent.name}/{folder.path.name}"
        if edits.reviewed != own:
            raise UsageError(f"the edits are of {edits.reviewed!r}, and this page is of {own}")
        if self.apply is not None:
            made = str(self.apply(edits).path / "report.html")
        folder.write_json("edits.json", edits.as_json())
        folder.write_json("names.json", {str(c): name for c, name in edits.names.items()})
        self._num_saved += 1
        logger.info("edits saved in %s", folder.path / "edits.json")
        return "\n".join([str(folder.path / "edits.json"), made, self.version()])


class _Server(ThreadingHTTPServer):
    """A thread per connection, with a bound on their number and their time.

    A connection beyond `MAX_CONNECTIONS` ends the oldest one, so that slow clients cannot lock the
    user out.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self._since: dict[socket.socket, float] = {}  # the oldest first
        self._changing = threading.Lock()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own."""
        with self._changing:
            if len(self._since) >= MAX_CONNECTIONS:
                self._end(next(iter(self._since)))
            self._since[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """End connections that are too old; called every half second."""
        with self._changing:
            late = time.monotonic() - MAX_SECONDS
            for request in [each for each, since in self._since.items() if since < late]:
                self._end(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._changing:
            self._since.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error of a request without its traceback; clients that leave are no error."""
        error = sys.exception()
        if not isinstance(error, OSError):
            logger.error("a request of the page failed: %r", error)

    def _end(self, request: socket.socket) -> None:
        """Have the thread of a connection read its end."""
        del self._since[request]
        try:
            request.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is closed already
            return


class _Handler(BaseHTTPRequestHandler):
    """Checks each request and routes it to `Answers`."""

    secret: str
    site: Answers
    server: ThreadingHTTPServer
    server_version, sys_version = "spice-pl", ""
    timeout = 30  # seconds after which a silent client is dropped

    def do_GET(self) -> None:
        """Answer /, /image/<number> and /run/<file>."""
        try:
            url = urlsplit(self.path)
            token = parse_qs(url.query, max_num_fields=10).get("token", [""])[0]
        except ValueError as error:
            return self._say(400, f"not an address: {error}")
        if not self._admitted(token):
            return None
        path = unquote(url.path)
        answer: tuple[str, bytes] | None = None
        try:
            if path == "/":
                answer = self.site.page()
            elif path.startswith("/image/"):
                answer = self.site.image(path.removeprefix("/image/"))
            elif path.startswith("/run/"):
                answer = self.site.file(path.removeprefix("/run/"))
        except (UsageError, OSError) as error:
            return self._say(500, str(error))
        return self._say(404, "not found") if answer is None else self._send(200, *answer)

    def do_POST(self) -> None:
        """Answer /edits."""
        if not self._admitted(""):
            return None
        if self.path != "/edits":
            return self._say(404, "not found")
        if self.headers.get("Content-Type") != "application/json":
            return self._say(415, "edits are application/json")
        length = self.headers.get("Content-Length", "")
        if not (re.fullmatch("[0-9]{1,9}", length) and 0 < int(length) <= MAX_BODY):
            return self._say(413, f"edits have 1 to {MAX_BODY} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):  # the client left, or was too slow
            return None
        try:
            where = self.site.save(body, self.headers.get("X-Edits-Version"))
        except UsageError as error:
            return self._say(400, str(error))
        except OSError as error:
            return self._say(500, f"the edits are not saved: {error}")
        return self._say(200, where)

    def _admitted(self, token: str) -> bool:
        """Whether a request may be answered; if not, answer it with 403.

        It must come from loopback, name this machine as host (against DNS rebinding), come from our
        own page and carry the secret.
        """
        own = f"review{self.server.server_port}"  # cookies do not tell ports apart
        given = [token] if token else _cookies(self.headers.get_all("Cookie", []), own)
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        reasons: list[tuple[Callable[[], bool], str]] = [
            (lambda: is_loopback(str(self.client_address[0])), "this machine only"),
            (lambda: _is_own_name(host), f"host {host!r} is not this machine"),
            (lambda: origin in (None, f"http://{host}"), "the request comes from another page"),
            (lambda: any(map(self._is_secret, given)), "wrong token"),
        ]
        refused = next((reason for holds, reason in reasons if not holds()), None)
        if refused is not None:
            self.close_connection = True
            self._say(403, f"refused: {refused}")
        return refused is None

    def _is_secret(self, text: str) -> bool:
        return secrets.compare_digest(text.encode("utf-8", "replace"), self.secret.encode())

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


def _cookies(headers: Sequence[str], name: str) -> list[str]:
    """Return the values of the cookies of one name; other applications' may have any form.

    >>> _cookies(['a={"b": "c; d"}; a[]=1; own=x', "own=y"], "own")
    ['x', 'y']
    """
    pairs = (each.strip().partition("=") for header in headers for each in header.split(";"))
    return [value for key, _, value in pairs if key == name]


def _is_own_name(host: str) -> bool:
    """Whether a Host header, a name or an address with or without port, is this machine.

    >>> [_is_own_name(host) for host in ("localhost:80", "[::1]:80", "127.0.0.1:80@other")]
    [True, True, False]
    """
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:@/\[\]]+)(:[0-9]{1,5})?", host)
    return match is not None and (match[1] == "localhost" or is_loopback(match[1].strip("[]")))
