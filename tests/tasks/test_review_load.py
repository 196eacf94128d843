"""The review server under load: bounded memory and time, and the user is answered throughout."""

from __future__ import annotations

import http.client
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.conftest import Finished
from tests.stages.small import image_set
from tests.tasks.test_review import Served, body

from spice_pl.data.images import ImageSet
from spice_pl.tasks import review
from spice_pl.tasks.review import make_server

SLOW = 200  # connections that never end their request
BODY = 2**30
SECONDS, MEGABYTES = 5, 64


def megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.fixture(scope="module")
def busy(straight: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = straight.copy(tmp_path_factory.mktemp("busy")).folder("fixmatch")
    small = image_set()
    keys = [f"{i:03}.png" for i in range(len(small))]
    images = ImageSet(small.name, small.images, keys, folder.metrics["fingerprint"])
    server, token = make_server(folder, [], images)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    made = Served(server, token, folder, images)
    made.ask("/")  # what a first page loads
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def connect(served: Served, sent: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.server.server_port), timeout=20)
    connection.sendall(sent)
    return connection


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 60_000],
    ids=["silent", "no end", "a long header"],
)
def test_slow_connections_do_not_lock_the_user_out(busy: Served, sent: bytes) -> None:
    before, threads = megabytes(), threading.active_count()
    with ExitStack() as held:
        for _ in range(SLOW):
            held.enter_context(connect(busy, sent))
        started = time.monotonic()
        assert busy.ask("/image/1")[0] == 200
        assert busy.ask("/")[0] == 200
        assert busy.ask("/edits", body(busy))[0] == 200
        assert time.monotonic() - started < SECONDS
        assert threading.active_count() - threads <= review.MAX_CONNECTIONS + 1
        assert megabytes() - before < MEGABYTES
    wait_for(lambda: threading.active_count() <= threads)


def wait_for(holds: object, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_slow_connection_ends(busy: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review, "MAX_SECONDS", 1)
    with connect(busy, b"GET / HTTP/1.1\r\n") as slow:
        for _ in range(60):  # a byte now and then: it is never silent for long
            try:
                slow.sendall(b"X")
            except OSError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("the connection is still open after 6 seconds")


@pytest.mark.parametrize(
    ("length", "token", "code"),
    [(BODY, True, 413), (BODY, False, 403), (1000, True, 200), (None, True, 413)],
)
def test_a_body_of_a_gigabyte_is_not_read(
    busy: Served, length: int | None, token: bool, code: int
) -> None:
    """It is told by its length or its form, or ends where its length says."""
    port, before = busy.server.server_address[1], megabytes()
    kind = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    content = body(busy).ljust(1000) if length == 1000 else b""
    head = (
        f"POST /edits HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Cookie: review{port}={busy.token if token else ''}\r\n{kind}\r\n\r\n"
    )
    block, sent = b"9" * 2**20, 0
    with connect(busy, head.encode() + content) as connection:
        try:
            while sent < BODY:
                sent += connection.send(block)
        except OSError:
            pass
        answer = b""
        try:
            answer = connection.recv(100)
        except OSError:  # reset, since what it sent was not read
            assert sent < BODY
    assert not answer or int(answer.split()[1]) == code
    assert sent < 2**26  # no more than buffers of the system hold
    assert megabytes() - before < MEGABYTES


def test_many_wrong_hosts_and_origins(busy: Served) -> None:
    before, started = megabytes(), time.monotonic()
    for i in range(200):
        headers = {"Host": f"evil{i}.example"} if i % 2 else {"Origin": f"http://evil{i}.example"}
        assert busy.ask("/edits", body(busy), **headers)[0] == 403
    assert time.monotonic() - started < 20
    assert megabytes() - before < MEGABYTES


def test_two_writers_leave_the_edits_of_one(busy: Served) -> None:
    """edits.json and names.json are of the same save, whoever was last."""
    codes: list[int] = []

    def write(name: str) -> None:
        for _ in range(20):
            codes.append(busy.ask("/edits", body(busy, names={"0": name}))[0])

    writers = [threading.Thread(target=write, args=(name,)) for name in ("foxes", "owls")]
    for each in writers:
        each.start()
    while any(each.is_alive() for each in writers):
        file = busy.folder.path / "edits.json"
        assert json.loads(file.read_text())["names"]  # complete at any time
    assert set(codes) == {200}
    assert json.loads(file.read_text())["names"] == json.loads(
        (busy.folder.path / "names.json").read_text()
    )


def test_clients_that_leave_are_no_error(busy: Served, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        connection = http.client.HTTPConnection(busy.host, timeout=20)
        own = f"review{busy.server.server_address[1]}"
        connection.request("GET", "/", headers={"Cookie": f"{own}={busy.token}"})
        connection.close()
    wait_for(lambda: busy.ask("/image/0")[0] == 200)
    assert "failed" not in caplog.text
