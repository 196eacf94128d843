"""6,800 seeded files, settings and requests that keep their form and lie in their content.

Each is refused with a documented error or read, in bounded time and memory. A connection, a new
process or a write outside the run's folder fails the test.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import random
import resource
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.conftest import Finished
from tests.fuzz.readers import DOCUMENTED, Readers
from tests.fuzz.trap import trapped

from spice_pl.runs.edits import FORMAT

# Values that fit nowhere, or where they should not; none is a large valid number.
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 89, 91, 2**31, 2**63, 10**30, -(2**63), 0.0, -0.5, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "x" * 5000, "0", "01", "-1", "1e9"),
    *("../../x", "/etc/passwd", "\0", "\n", "\x1b[2J", "ü日", "\ud800", "\udcff", "=cmd()", "2"),
    *("${oc.env:HOME}", "${oc.create:{a:1}}", "${a}", "\\${a}", "???", "%s", "{}", "hf-hub:a/b"),
    *([], [[]], [1, [2, [3]]], {}, {"a": {}}, {"_target_": "os.system", "_args_": ["true"]}),
]
TARGETS = [  # near to what settings may call, or able to reach out
    *("os.system", "os.mkdir", "subprocess.Popen", "socket.create_connection", "builtins.exec"),
    *("torch.load", "torch.hub.load", "torch.nn.os.system", "torch.nn.Module.to", "joblib.load"),
    *("torch.nn.Linear", "torch.nn.Identity", "torch.nn.Sequential", "torch.nn.functional.relu"),
    *("torch.optim.SGD", "torchvision.models.resnet18", "torchvision.models.get_model"),
    *("torchvision.datasets.MNIST", "timm.create_model", "timm.models.load_checkpoint"),
    *("spice_pl.nn.resnet.ResNet", "spice_pl.nn.heads.ClusterHead", "spice_pl.nn.os.getcwd"),
    *("spice_pl.data.augment.PlainView", "spice_pl.data.augment.RandomView", "spice_pl.cli.main"),
    *("spice_pl.tasks.predict.Predict", "spice_pl.tasks.review.Review", "spice_pl.system.ranks.x"),
    *("spice_pl.data.sources.arrays.array", "spice_pl.tasks.review.make_server", "pickle.loads"),
    *("pytorch_lightning.Trainer", "pytorch_lightning.loggers.CSVLogger", "numpy.load", "", "."),
]
SECONDS = 20  # of processor time for one case
MEGABYTES = 500  # that all cases of a kind may add to the largest memory in use


@pytest.fixture(scope="module")
def readers(straight: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Readers]:
    made = Readers(straight, tmp_path_factory.mktemp("structure"))
    yield made
    made.server.server_close()


@contextmanager
def bounded() -> Iterator[None]:
    """Fail if a case takes too long."""

    def hang(*_: Any) -> None:
        raise AssertionError(f"a case takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGVTALRM, hang)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def fuzz(
    readers: Readers, kind: str, make: Callable[[random.Random], bytes], cases: int, suffix: str
) -> tuple[int, int]:
    """Read made files; return how many were refused, and how many were read."""
    draw = random.Random(kind)  # noqa: S311 - which case to make
    file = readers.root / f"case{suffix}"
    read, refused = readers.of(kind), 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(cases):
        file.write_bytes(make(draw))
        try:
            with bounded(), trapped(readers.root):
                read(file)
        except DOCUMENTED as error:
            refused += 1
            message = str(error)
        except Exception as error:
            raise AssertionError(f"case {case} of {kind}: {error!r}") from error
        else:
            message = ""
        assert len(message) < 20_000, (case, len(message))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    assert grown < MEGABYTES
    return refused, cases - refused


def junk(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(JUNK))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every dictionary or list in nested data, with each of its keys or positions."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


def changed(value: Any, draw: random.Random) -> Any:
    """Change one to three places of nested data: other values, names, numbers of levels."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        found = list(places(value))
        if not found:
            return junk(draw)
        holder, key = draw.choice(found)
        how = draw.choice(["junk", "junk", "junk", "out", "double", "deep", "swap", "name", "many"])
        if how == "junk":
            holder[key] = junk(draw)
        elif how == "out":
            del holder[key]
        elif how == "double":
            holder[key] = [holder[key]] * 2
        elif how == "deep":
            for _ in range(draw.choice([1, 19, 21, 60])):
                holder[key] = [holder[key]] if draw.random() < 0.5 else {"0": holder[key]}
        elif how == "swap":
            other, place = draw.choice(found)
            if place in other if isinstance(other, dict) else place < len(other):
                one, two = copy.deepcopy(holder[key]), copy.deepcopy(other[place])
                holder[key], other[place] = two, one
        elif how == "name" and isinstance(holder, dict):
            holder[draw.choice([each for each in JUNK if isinstance(each, str)])] = holder[key]
        else:
            holder[key] = [holder[key]] * draw.choice([0, 2, 100])
    return value


def as_json(value: Any, draw: random.Random) -> bytes:
    """Write JSON; some of it with a key twice, in another encoding, or without end."""
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    how = draw.random()
    if how < 0.05 and text.startswith("{"):
        text = text[:-1] + ', "names": {}, "num_clusters": 2}'
    if how > 0.97:
        return text.encode("utf-16", "surrogatepass")
    content = text.encode("utf-8", "surrogatepass")
    return content[: draw.randrange(len(content) + 1)] if 0.9 < how < 0.95 else content


def test_json_files(readers: Readers) -> None:
    metrics = json.loads((readers.folder.path / "metrics.json").read_text())
    metrics.pop("checksum")  # who writes a hostile file writes none, or one that fits
    for kind, whole in {
        "names.json": {"0": "cats", "1": "dogs", "12": "ships"},
        "edits.json": {
            **{"format": FORMAT, "reviewed": "proto/seed0", "fingerprint": "f", "digest": "d"},
            **{"num_clusters": 5, "names": {"1": "a"}, "merge": [[0, 1], [2, 4]]},
            **{"split": {"3": 2}, "move": {"000.png": 1, "001.png": 0}},
        },
        "metrics.json": metrics,
        "dataset.json": {
            **{"fingerprint": readers.metrics["fingerprint"], "num_images": 90, "upstream": None},
        },
    }.items():
        readers.of(kind)(write(readers, json.dumps(whole).encode()))
        refused, read = fuzz(
            readers,
            kind,
            lambda draw, whole=whole: as_json(changed(whole, draw), draw),  # type: ignore[misc]
            *(350, ".json"),
        )
        assert refused > 50, kind
        assert read > 0, kind


def write(readers: Readers, content: bytes) -> Path:
    file = readers.root / "whole"
    file.write_bytes(content)
    return file


def test_headers_and_tensors_of_model_spice(readers: Readers) -> None:
    whole = readers.folder.path / "model.spice"
    with safe_open(whole, "pt") as opened:
        header = json.loads(opened.metadata()["spice_pl"])
    del header["digest"]
    header["known"] = header["known"][:2]
    tensors = load_file(whole)
    tensors["known.embeddings"] = tensors["known.embeddings"][:2].clone()
    tensors["known.clusters"] = tensors["known.clusters"][:2].clone()
    file = readers.root / "made.spice"

    def make(draw: random.Random) -> bytes:
        content, made = copy.deepcopy(header), dict(tensors)
        if draw.random() < 0.3:
            part = draw.choice(["encoder", "head", "plain"])
            content["settings"][part] = {"_target_": draw.choice(TARGETS)} | draw.choice(
                [{}, {"_args_": [draw.choice(JUNK)]}, content["settings"][part]]
            )
        if draw.random() < 0.7:
            content = changed(content, draw)
        if draw.random() < 0.5:
            name = draw.choice([*made])
            kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
            changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
                lambda x: x.to(draw.choice(kinds)),
                lambda x: x * float("nan"),
                lambda x: x.flatten(),
                lambda x: x[:0] if x.ndim else x,
                lambda x: torch.cat([x, x]) if x.ndim else x,
                lambda x: -x - 1 if x.dtype != torch.bool else x,
            ]
            made[name] = draw.choice(changes)(made[name]).contiguous()
        if draw.random() < 0.1:
            made[draw.choice(["head.x", "x", "known.x", "encoder"])] = torch.zeros(1)
        save_file(made, file, {"spice_pl": json.dumps(content)})
        return file.read_bytes()

    refused, read = fuzz(readers, "model.spice", make, 900, ".spice")
    assert refused > 600
    assert read > 10


def rows_of(file: Path) -> list[list[str]]:
    with file.open(newline="") as opened:
        return list(csv.reader(opened))


def as_csv(rows: list[list[str]], draw: random.Random) -> bytes:
    """Change cells, rows and columns of a table, its header and its form."""
    rows = copy.deepcopy(rows)
    for _ in range(draw.randint(1, 3)):
        row = draw.choice(rows) if draw.random() < 0.7 else rows[0]
        how = draw.choice(["cell", "cell", "out", "double", "swap", "row", "rows", "order"])
        place = draw.randrange(len(row)) if row else 0
        if how == "cell" and row:
            row[place] = str(
                draw.choice([*JUNK, "nan", "1.5", "-3", "60000", 10**9, "9" * 200_000])
            )
        elif how == "out" and row:
            del row[place]
        elif how == "double" and row:
            row.append(row[place])
        elif how == "swap" and row:
            row.reverse()
        elif how == "row" and len(rows) > 1:
            del rows[draw.randrange(len(rows))]
        elif how == "rows":
            rows += rows[1:] * draw.randint(1, 3)
        elif how == "order":
            draw.shuffle(rows)
        if not rows:
            break
    buffer = io.StringIO(newline="")
    separator = draw.choice([",", ",", ",", ",", ";", "\t"])
    csv.writer(buffer, delimiter=separator).writerows(rows)
    content = buffer.getvalue().encode("utf-8", "surrogatepass")
    marks = [b"\xef\xbb\xbf", b"\0", b"\xff", b'"']
    return draw.choice(marks) + content if draw.random() < 0.2 else content


def test_tables(readers: Readers) -> None:
    clusters = rows_of(readers.folder.path / "clusters.csv")
    curves = rows_of(readers.folder.path / "metrics.csv")
    for kind, rows, cases in (
        ("clusters.csv", clusters, 400),
        ("metrics.csv", curves, 300),
        ("probs", clusters, 400),
    ):
        refused, read = fuzz(
            readers,
            kind,
            lambda draw, rows=rows: as_csv(rows, draw),  # type: ignore[misc]
            *(cases, ".csv"),
        )
        assert refused > cases // 10, kind
        assert read > 0, kind


def test_arrays_and_checkpoints(readers: Readers) -> None:
    probs = np.array(readers.folder.probs)

    def array(draw: random.Random) -> bytes:
        buffer = io.BytesIO()
        made: Any = draw.choice(
            [probs, probs.astype(np.float64), -probs, probs[:5], probs.T, probs[0], probs[:, :0]]
        )
        if draw.random() < 0.3:
            made = made.astype(draw.choice(["i8", "u1", "c8", "b1", "U3", "M8[s]", "f2", ">f4"]))
        np.save(buffer, made)
        content = bytearray(buffer.getvalue())
        texts = [b"(90, 3)", b"(10**9,)", b"((((", b"'<f4'", b"'|O'", b"True", b"False", b"[" * 40]
        old, new = draw.choice(texts), draw.choice([*texts, b"(99999999999999, 3)", b"-1"])
        return bytes(content).replace(old, new)[: draw.choice([None, None, 9, 60, 200])]

    def checkpoint(draw: random.Random) -> bytes:
        whole = torch.load(readers.folder.checkpoint, weights_only=True)
        for _ in range(draw.randint(1, 2)):
            holder, key = draw.choice([(whole, key) for key in whole] + list(places(whole)))
            if draw.random() < 0.7:
                holder[key] = junk(draw)
            else:
                del holder[key]
        buffer = io.BytesIO()
        torch.save(whole, buffer)
        content = buffer.getvalue()
        return content[: draw.randrange(len(content))] if draw.random() < 0.1 else content

    refused, read = fuzz(readers, "probs", array, 400, ".npy")
    assert min(refused, read) > 5
    refused, read = fuzz(readers, "last.ckpt", checkpoint, 200, ".ckpt")
    assert min(refused, read) > 20


def test_weights_and_tensors_from_elsewhere(readers: Readers) -> None:
    """State dicts of other programs, and safetensors whose headers lie about what follows."""
    whole = load_file(readers.folder.path / "encoder.safetensors")

    def state(draw: random.Random) -> bytes:
        made: dict[str, Any] = {f"module.encoder_q.{key}": each for key, each in whole.items()}
        for _ in range(draw.randint(0, 3)):
            key = draw.choice([*made])
            value: torch.Tensor = made[key] if torch.is_tensor(made[key]) else torch.ones(1)
            kind = draw.choice([torch.complex64, torch.int8, torch.bool])
            changes = [
                *(value * float("nan"), value.to(kind), value.to("meta"), value.sum()),
                *(torch.zeros(1).expand(10_000), value[:0] if value.ndim else value),
                junk(draw),
            ]
            numbers = draw.choice(["99999999", "7", "-1", "00"])
            name = key.replace("layer1", f"layer{numbers}") if draw.random() < 0.5 else key
            made[name] = draw.choice(changes)
        wrapped = draw.choice([made, {"state_dict": made}, {"model": made, "args": junk(draw)}])
        buffer = io.BytesIO()
        torch.save(wrapped, buffer)
        content = buffer.getvalue()
        return content[: draw.randrange(len(content))] if draw.random() < 0.1 else content

    refused, read = fuzz(readers, "weights", state, 300, ".pth")
    assert min(refused, read) > 10

    def tensors(draw: random.Random) -> bytes:
        header: dict[str, Any] = {
            "__metadata__": {"fingerprint": readers.metrics["fingerprint"]},
            "probs": {"dtype": "F32", "shape": [90, 3], "data_offsets": [0, 1080]},
        }
        if draw.random() < 0.8:
            header = changed(header, draw)
        text = as_json(header, draw)
        size = draw.choice([len(text)] * 8 + [0, len(text) * 2, 2**40, 2**63])
        data = np.array(readers.folder.probs).tobytes()
        return size.to_bytes(8, "little") + text + data[: draw.choice([None, None, None, 500])]

    refused, read = fuzz(readers, "probs", tensors, 300, ".safetensors")
    assert min(refused, read) > 10


def test_members_of_archives(readers: Readers) -> None:
    """Members in another order, twice, cut, sparse, linked, of sizes and names that lie."""

    def make(draw: random.Random) -> bytes:
        blocks = []
        for _ in range(draw.randint(1, 6)):
            name = draw.choice(
                ["a.png", "b/a.png", "../../x.png", "/x.png", "l.cls", "a" * 200, "ü"]
            )
            member = tarfile.TarInfo(name)
            kinds = [tarfile.REGTYPE] * 6 + [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE]
            member.type = draw.choice([*kinds, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"S", b"x", b"L"])
            member.linkname = draw.choice(["", "a.png", "../../etc/passwd", "a" * 150])
            data = draw.randbytes(draw.choice([0, 5, 512, 700]))
            member.size = len(data)
            if draw.random() < 0.2:
                records = ["-512", "0", str(2**40), "x"]
                member.pax_headers = {
                    draw.choice(["size", "path", "GNU.sparse.realsize"]): draw.choice(records)
                }
            kind: Any = draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
            header = bytearray(member.tobuf(kind, errors="surrogateescape"))
            if draw.random() < 0.3:
                sizes = [b"-1024", b"7" * 11, (-512).to_bytes(12, "big", signed=True), b"\x80" * 12]
                header[-512 + 124 : -512 + 136] = draw.choice(sizes).ljust(12, b"\0")
                header[-512 + 148 : -512 + 156] = b" " * 8
                header[-512 + 148 : -512 + 156] = b"%06o\0 " % sum(header[-512:])
            blocks.append(bytes(header) + data + bytes(-len(data) % 512))
        if draw.random() < 0.3:
            blocks.append(draw.choice(blocks))
        draw.shuffle(blocks)
        content = b"".join(blocks) + bytes(draw.choice([0, 512, 1024]))
        return content[: draw.randrange(len(content) + 1)] if draw.random() < 0.2 else content

    refused, read = fuzz(readers, "shard.tar", make, 600, ".tar")
    assert min(refused, read) > 50


def test_descriptions_of_calls(readers: Readers) -> None:
    """Targets that reach out, behind nesting, lists and interpolations."""

    def node(draw: random.Random, depth: int) -> Any:
        if depth == 0 or draw.random() < 0.2:
            return draw.choice([*JUNK[:-1], 8, 3, 0.5])
        names = ["in_features", "out_features", "f", "args", "command", "path", "weights", "model"]
        made: dict[str, Any] = {"_target_": draw.choice(TARGETS)}
        for _ in range(draw.randint(0, 3)):
            inner = node(draw, depth - 1)
            made[draw.choice(names)] = [inner] if draw.random() < 0.3 else inner
        if draw.random() < 0.4:
            made["_args_"] = [node(draw, depth - 1) for _ in range(draw.randint(0, 3))]
        if draw.random() < 0.1:
            made[draw.choice(["_partial_", "_recursive_", "_convert_", "_x_"])] = True
        return made

    def make(draw: random.Random) -> bytes:
        text: str = yaml.safe_dump({"_target_": "torch.nn.Identity", "x": node(draw, 3)})
        return text.encode()

    refused, read = fuzz(readers, "settings", make, 600, ".yaml")
    assert min(refused, read) > 20

    def saved(draw: random.Random) -> bytes:
        """Saved settings: more escapes, aliases and tags; some cut."""
        text = make(draw).decode().replace("${", "\\" * draw.randint(0, 3) + "${")
        more = ["", "", "", "y: &a [1]\nz: *a\n", "y: !!python/name:os.system\n", "? [1]\n", "\t"]
        text = text.replace("weights:", "more:")  # settings may download weights
        content = (text + draw.choice(more)).encode()
        return content[: draw.randrange(len(content))] if draw.random() < 0.1 else content

    refused, read = fuzz(readers, "config.yaml", saved, 400, ".yaml")
    assert min(refused, read) > 20


def test_requests(readers: Readers) -> None:
    """Requests to the review: nothing without the token, nothing of other folders, no exception."""
    outside = readers.root / "secret.json"
    outside.write_text('"a secret"')
    edits = {
        **{"format": FORMAT, "reviewed": "proto/seed0", "num_clusters": 3, "names": {"0": "a"}},
        **{key: readers.metrics[key] for key in ("fingerprint", "digest")},
        **{"merge": [], "split": {}, "move": {"000.png": 1}},
    }
    paths = [
        *("/image/0", "/image/-1", "/image/99999", "/run/clusters.csv", "/run/../secret.json"),
        *(
            "/run/%00",
            "/run/" + "a" * 3000,
            "/edits",
            "//x",
            "/%2e%2e/secret.json",
            "*",
            "",
            "/x y",
        ),
        *(
            "/run/%2e%2e%2fsecret.json",
            f"/run/{outside}",
            "http://x/image/0",
            "http://[/",
            "/run/last.ckpt",
        ),
        *(
            "/image/0?token=TOKEN",
            "/image/0?token=" + "&token=" * 50,
            "/?%ff=%00",
            "/run/metrics.json",
        ),
    ]
    hosts = ["127.0.0.1:PORT", "localhost:PORT", "[::1]", "evil.example", "127.0.0.1:80@x", ""]
    own, answered = "reviewPORT=TOKEN", 0
    cookies = [own, own, f'a={{"b":1}}; {own}', "reviewPORT=x", "", f"a[]=1;{own};reviewPORT=y"]
    versions = ["HTTP/1.0", "", "HTTP/9", "HTTP/1.1.1", "HTTP/x"]
    lengths = ["0", "-1", "9" * 5000, "1e3", "2147483648", "²", "5, 5", ""]
    draw = random.Random(1)  # noqa: S311 - which request to make
    file, read = readers.root / "request.txt", readers.of("request")
    for _ in range(600):
        method = draw.choice(["GET", "GET", "POST", "POST", "PUT", "HEAD", "OPTIONS", "", "G\0T"])
        content = b""
        if method == "POST":
            content = as_json(changed(edits, draw) if draw.random() < 0.7 else edits, draw)
        length = draw.choice(lengths) if draw.random() < 0.2 else str(len(content))
        path = draw.choice(["/edits", *paths]) if method == "POST" else draw.choice(paths)
        lines = [
            f"{method} {path} {draw.choice(versions) if draw.random() < 0.2 else 'HTTP/1.1'}",
            f"Host: {draw.choice(hosts) if draw.random() < 0.2 else hosts[0]}",
            f"Cookie: {draw.choice(cookies) if draw.random() < 0.5 else own}",
            f"Content-Length: {length}",
            "Content-Type: application/json",
        ]
        if draw.random() < 0.2:
            lines.append(draw.choice(["Origin: http://evil", "x" * 70_000, ": ", "Origin: null"]))
        draw.shuffle(tail := lines[1:])
        file.write_bytes("\r\n".join([lines[0], *tail, "", ""]).encode() + content)
        with bounded(), trapped(readers.root):
            answer = read(file)
        assert b"a secret" not in answer
        code = answer[9:12] if answer.startswith(b"HTTP/") else b""
        if code == b"200":
            answered += 1
            assert b"TOKEN" in file.read_bytes()
        assert code in (b"", *b"200 400 403 404 405 413 414 415 431 500 501 505".split()), answer[
            :99
        ]
    assert 10 < answered < 400
