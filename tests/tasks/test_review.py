"""The review server: which requests it answers, and what it saves."""

from __future__ import annotations

import http.client
import io
import json
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.conftest import Finished
from tests.stages.small import image_set

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.runs.clusters import ReliableRule
from spice_pl.runs.edits import FORMAT, Edits
from spice_pl.runs.folder import RunFolder
from spice_pl.system.interrupts import Interrupts
from spice_pl.tasks.base import Context
from spice_pl.tasks.review import Answers, Review, is_loopback, make_server

RULE = ReliableRule(num_neighbors=10, agreement=0.5, confidence=0.5, balance="none")


@dataclass
class Served:
    """The server of a run, in its own thread."""

    server: ThreadingHTTPServer
    token: str
    folder: RunFolder
    images: ImageSet

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server.server_address[1]}"

    def ask(
        self, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """Send a request with the secret as a cookie, unless the headers replace it."""
        connection = http.client.HTTPConnection(self.host, timeout=20)
        own = f"review{self.server.server_address[1]}"
        kinds = {"Content-Type": "application/json"} if body is not None else {}
        given = {"Cookie": f"{own}={self.token}", **kinds}
        given |= {key.replace("_", "-"): value for key, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, body, given)
        answer = connection.getresponse()
        read = answer.status, answer.read(), dict(answer.headers)
        connection.close()
        return read


@pytest.fixture(scope="module")
def served(straight: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    runs = straight.copy(tmp_path_factory.mktemp("served"))
    folder = runs.folder("fixmatch")
    small = image_set()
    keys = [f"{i:03}.png" for i in range(len(small))]
    images = ImageSet(small.name, small.images, keys, folder.metrics["fingerprint"])
    upstream = [runs.folder("proto"), runs.folder("moco")]
    server, token = make_server(folder, upstream, images)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Served(server, token, folder, images)
    server.shutdown()
    server.server_close()
    thread.join()


def body(served: Served, **changes: Any) -> bytes:
    metrics = served.folder.metrics
    edits = {
        "format": FORMAT,
        "reviewed": "fixmatch/seed0",
        "fingerprint": metrics["fingerprint"],
        "digest": metrics["digest"],
        "num_clusters": metrics["num_clusters"],
        "names": {"1": "<b>cats</b>"},
        "merge": [],
        "split": {},
        "move": {"003.png": 1},
    }
    return json.dumps(edits | changes).encode()


def test_page_comes_with_the_token_once_and_the_cookie_then(served: Served) -> None:
    code, page, headers = served.ask(f"/?token={served.token}", Cookie="")
    assert code == 200
    assert "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
    assert headers["Cache-Control"] == "no-store"
    assert b'"save":"/edits"' in page
    assert served.ask("/")[0] == 200


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"Cookie": ""}, b"wrong token"),
        ({"Cookie": "review=0"}, b"wrong token"),
        ({"Host": "evil.example"}, b"is not this machine"),
        ({"Host": "127.0.0.1.evil.example:80"}, b"is not this machine"),
        ({"Host": "127.0.0.1:80@evil.example"}, b"is not this machine"),
        ({"Host": "localhost:80:80"}, b"is not this machine"),
        ({"Host": ""}, b"is not this machine"),
        ({"Origin": "http://evil.example"}, b"comes from another page"),
    ],
)
def test_strangers_are_refused(served: Served, headers: dict[str, str], reason: bytes) -> None:
    for path, sent in (("/", None), ("/image/0", None), ("/edits", body(served))):
        code, said, _ = served.ask(path, sent, **headers)
        assert code == 403
        assert reason in said
    assert served.ask("/?token=wrong", Cookie="")[0] == 403
    assert not (served.folder.path / "edits.json").is_file()


def test_only_loopback_is_bound(served: Served) -> None:
    assert served.server.socket.getsockname()[0] == "127.0.0.1"
    for host in ("0.0.0.0", "192.168.0.7", "example.org", "localhost.evil.example", "::"):  # noqa: S104
        assert not is_loopback(host)
    assert is_loopback("127.0.0.5")
    assert is_loopback("::1")


def test_a_port_in_use_or_out_of_range_is_named(served: Served) -> None:
    for port in (served.server.server_port, 99_999):
        said = rf"review\.task\.port={port} cannot be used .* 0 takes"
        with pytest.raises(UsageError, match=said):
            make_server(served.folder, [], served.images, port)


def test_pictures_come_by_number(served: Served) -> None:
    code, picture, headers = served.ask("/image/7")
    assert (code, headers["Content-Type"]) == (200, "image/png")
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    np.testing.assert_array_equal(pixels.transpose(2, 0, 1), served.images.images[7])
    for name in ("90", "-1", "1e1", "%C2%B2", "../../x", "99999999999999999999"):
        assert served.ask(f"/image/{name}")[0] == 404


def test_nothing_outside_the_run_is_read(served: Served, tmp_path: Path) -> None:
    assert served.ask("/run/clusters.csv")[1] == (served.folder.path / "clusters.csv").read_bytes()
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    (served.folder.path / "link.json").symlink_to(outside)
    for name in (
        "../../proto/seed0/clusters.csv",
        "%2e%2e/%2e%2e/proto/seed0/clusters.csv",
        "/etc/passwd",
        str(outside),
        "link.json",
        "last.ckpt",
        ".hydra/config.yaml",
        "",
    ):
        assert served.ask(f"/run/{name}")[0] == 404, name
    (served.folder.path / "link.json").unlink()
    assert served.ask("/etc/passwd")[0] == 404


def test_edits_are_checked_then_kept(served: Served) -> None:
    for sent, message in (
        (b"no json", b"not JSON"),
        (b"\xff", b"not JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"nested more than 20 levels"),
        (b'{"num_clusters": ' + b"9" * 5000 + b"}", b"not JSON"),
        (body(served, reviewed="../../etc"), b"this page is of fixmatch/seed0"),
        (body(served, names={"1": "a", "01": "b"}), b"not the number of a cluster"),
        (body(served, digest="0"), b"another clustering"),
        (body(served, num_clusters=4), b"of 4 clusters"),
        (body(served, move={"other.png": 1}), b"not among the images"),
        (body(served, merge=[[0, 7]]), b"cluster 7"),
    ):
        code, said, _ = served.ask("/edits", sent)
        assert code == 400
        assert message in said
    assert served.ask("/edits", body(served), Content_Type="text/plain")[0] == 415
    assert served.ask("/edits", b"")[0] == 413
    assert served.ask("/elsewhere", body(served))[0] == 404
    assert not (served.folder.path / "edits.json").exists()
    code, where, _ = served.ask("/edits", body(served))
    assert (code, where.decode().split("\n")[0]) == (200, str(served.folder.path / "edits.json"))
    assert served.folder.names == {1: "<b>cats</b>"}
    page = Answers(served.folder, [], served.images).page()[1]
    assert b"&lt;b&gt;cats&lt;/b&gt;" in page
    assert b"<b>cats</b>" not in page
    assert b'"003.png":1' in page  # the saved edits are on the page


@pytest.mark.parametrize(
    "before",
    [
        'prefs={"a":1}',
        "a[]=1",
        "x=hello world",
        "a{b}=1",
        "user@x=1",
        "=",
        "review=1",
        ";;",
    ],
)
def test_cookies_of_other_applications_change_nothing(served: Served, before: str) -> None:
    own = f"review{served.server.server_address[1]}={served.token}"
    for cookie in (f"{before}; {own}", f"{own}; {before}", f"{own}x; {before};{own}"):
        assert served.ask("/image/0", Cookie=cookie)[0] == 200, cookie
    assert served.ask("/image/0", Cookie=before)[0] == 403


@pytest.mark.parametrize(
    "path",
    [
        "/run/%00",
        "/run/" + "a" * 5000,
        "/run/%ff",
        "/run/..",
        "/run/.",
        "/image/%00",
        "/%00",
        "/[::",
    ],
)
def test_odd_addresses_are_answered(served: Served, path: str) -> None:
    assert served.ask(path)[0] in (400, 404)


def test_a_length_of_5000_digits_is_answered(served: Served) -> None:
    assert served.ask("/edits", b"{}", Content_Length="9" * 5000)[0] == 413


@pytest.fixture
def remade(straight: Finished, tmp_path: Path) -> Iterator[tuple[Answers, Served]]:
    """Answers about a run that was made again after its page was opened."""
    folder = straight.copy(tmp_path).folder("fixmatch")
    small = image_set()
    keys = [f"{i:03}.png" for i in range(len(small))]
    images = ImageSet(small.name, small.images, keys, folder.metrics["fingerprint"])
    server, token = make_server(folder, [], images)
    yield Answers(folder, [], images), Served(server, token, folder, images)
    server.server_close()


def test_a_run_that_was_made_again_gets_no_old_names(remade: tuple[Answers, Served]) -> None:
    answers, seen = remade
    old = body(seen)
    answers.save(old)
    folder = seen.folder
    (folder.path / "names.json").unlink()
    folder.write_json("metrics.json", {**folder.metrics, "digest": "0123456789abcdef"})
    with pytest.raises(UsageError, match=r"another clustering: .* review it again"):
        answers.save(old)
    assert not (folder.path / "names.json").exists()
    assert b'"003.png":1' not in answers.page()[1]  # edits of the earlier run
    answers.save(body(seen))
    assert folder.names == {1: "<b>cats</b>"}


def test_a_run_that_is_being_made_again_gets_no_old_names(remade: tuple[Answers, Served]) -> None:
    answers, seen = remade
    old = body(seen)
    with seen.folder.lock(), pytest.raises(UsageError, match="used by another run; try again"):
        answers.save(old)
    (seen.folder.path / "metrics.json").unlink()
    with pytest.raises(UsageError, match=r"metrics\.json is missing"):
        answers.save(old)
    assert not (seen.folder.path / "names.json").exists()


def test_a_damaged_run_is_a_message_on_the_page(served: Served) -> None:
    file = served.folder.path / "clusters.csv"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    code, said, _ = served.ask("/")
    file.write_bytes(whole)
    assert code == 500
    assert b"clusters.csv has changed since it was written" in said


def test_second_window_does_not_overwrite_what_the_first_saved(served: Served) -> None:
    versions = [Answers(served.folder, [], served.images).version() for _ in range(2)]
    first = body(served, names={"0": "dogs"})
    code, said, _ = served.ask("/edits", first, X_Edits_Version=versions[0])
    assert code == 200
    code, refused, _ = served.ask("/edits", body(served), X_Edits_Version=versions[1])
    assert code == 400
    assert b"saved edits of this run since" in refused
    assert served.folder.names == {0: "dogs"}
    # The first window goes on with the version that it got.
    after = said.decode().split("\n")[2]
    assert served.ask("/edits", body(served), X_Edits_Version=after)[0] == 200


def test_saved_edits_are_applied_before_they_count_as_saved(served: Served) -> None:
    asked = []

    def apply(edits: Edits) -> RunFolder:
        asked.append(edits)
        if edits.split:
            raise UsageError("edits split cluster 0 into 9, and it has 3 images")
        return RunFolder(served.folder.path.parent / "edited")

    answers = Answers(served.folder, [], served.images, apply)
    before = answers.version()
    with pytest.raises(UsageError, match="into 9"):
        answers.save(body(served, split={"0": 9}))
    assert answers.version() == before
    _, report, version = answers.save(body(served, names={"0": "x"})).split("\n")
    assert report == str(served.folder.path.parent / "edited" / "report.html")
    assert version == answers.version() != before
    assert len(asked) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_is_the_normal_end_of_a_review(
    served: Served,
    number: signal.Signals,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ctrl_c = threading.Timer(0.2, signal.raise_signal, [number])
    monkeypatch.setattr("spice_pl.tasks.review.open_page", lambda *_: ctrl_c.start())
    context = Context(
        folder=RunFolder(served.folder.path / "review"),
        upstream=(served.folder,),
        images=lambda **_: served.images,
        plain=None,  # type: ignore[arg-type]  # no image is decoded
        num_clusters=0,
        seed=0,
    )
    before = signal.getsignal(number)
    with Interrupts() as interrupts, caplog.at_level("INFO"):
        Review(0, asdict(RULE))(context)
        assert interrupts.asked is None  # the job goes on to its own end: exit code 0
    assert signal.getsignal(number) == before
    assert caplog.messages[-1] == "review ended; no edits were saved"


def test_the_end_of_a_review_counts_saves(served: Served) -> None:
    answers = Answers(served.folder, [], served.images)
    assert answers.end() == 0
    answers.save(body(served))
    assert answers.end() == 1
