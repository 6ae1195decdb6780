"""Fetching and checking data, from a server on this machine that breaks off."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import re
import stat
import struct
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fuzzing import bounded
from irregular import IRREGULAR, put_in_place
from tiny_omniglot import TINY, members, write_folder, write_zip

from metamom.tasks import Omniglot, download, fetch, images, omniglot, omniglot_archive
from metamom.tasks.download import CHUNK, ResumingDownloader
from metamom.tasks.locate import DataError

NAME = "images_background.zip"


class Server(ThreadingHTTPServer):
    """Serves ``files``; ``breaks`` answers stop halfway; without ``ranges`` it ignores Range requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.breaks = 0
        self.ranges = True
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        if self.path[1:] not in server.files:
            self.send_error(404)
            return
        data, start = server.files[self.path[1:]], 0
        if wanted and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        rest = data[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if server.breaks:
            server.breaks -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def archive(tmp_path) -> bytes:
    """A small archive of several chunks."""
    path = write_zip(tmp_path / "made.zip", members())
    with zipfile.ZipFile(path, "a") as file:
        file.comment = random.Random(0).randbytes(65_000)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch, archive, server):
    """A data set of one small file, published by the server."""
    monkeypatch.setattr(omniglot_archive, "PUBLISHED", {"background": TINY})
    monkeypatch.setattr(fetch, "PUBLISHED", {"background": TINY})
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    monkeypatch.setenv("METAMOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("METAMOM_MIRROR", raising=False)
    published = fetch.DATASETS["omniglot"][0]._replace(
        url=f"{server.url}/{NAME}", md5=hashlib.md5(archive, usedforsecurity=False).hexdigest()
    )
    monkeypatch.setitem(fetch.DATASETS, "omniglot", [published])
    server.files[NAME] = archive


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "omniglot").iterdir() if not path.name.startswith("."))


def test_fetch_and_check(tmp_path, archive):
    root = tmp_path / "root"
    (path,) = fetch.fetch("omniglot", root)
    assert path == root / "omniglot" / NAME
    assert path.read_bytes() == archive
    assert visible(root) == [NAME]
    (checked,) = fetch.check("omniglot", root)
    assert checked == (path, {"characters": 6, "drawings": 24})


def test_what_is_there_stays(tmp_path, server):
    root = tmp_path / "root"
    fetch.fetch("omniglot", root)
    asked = len(server.asked)
    fetch.fetch("omniglot", root)
    assert len(server.asked) == asked
    folders = tmp_path / "folders"
    write_folder(folders / "omniglot", members())
    assert fetch.fetch("omniglot", folders) == [folders / "omniglot" / "images_background"]
    assert len(server.asked) == asked
    damaged = root / "omniglot" / NAME
    damaged.write_bytes(b"mine")
    with pytest.raises(DataError, match="is not a complete zip archive"):
        fetch.fetch("omniglot", root)
    assert damaged.read_bytes() == b"mine"


def test_a_broken_download_goes_on(tmp_path, server, archive):
    server.breaks = 2
    (path,) = fetch.fetch("omniglot", tmp_path)
    assert path.read_bytes() == archive
    first = len(archive) // 2 // CHUNK * CHUNK
    second = first + (len(archive) - first) // 2 // CHUNK * CHUNK
    assert server.asked == [None, f"bytes={first}-", f"bytes={second}-"]
    assert 0 < first < second


def test_another_process_goes_on_too(tmp_path, server, archive):
    server.breaks = 1
    part, target = tmp_path / "a.part", tmp_path / "a"
    came = len(archive) // 2 // CHUNK * CHUNK
    with pytest.raises(DataError, match=rf"broke off after {came} bytes .*a\.part"):
        ResumingDownloader(part, limit=1 << 20, attempts=1)(f"{server.url}/{NAME}", target, None)
    assert part.read_bytes() == archive[:came]
    ResumingDownloader(part, limit=1 << 20)(f"{server.url}/{NAME}", target, None)
    assert target.read_bytes() == archive
    assert not part.exists()
    assert server.asked[-1] == f"bytes={came}-"


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("have", ["all", "more", "half"])
def test_partial_files_of_any_length(tmp_path, server, archive, have, ranges):
    server.ranges = ranges
    part = tmp_path / "omniglot" / f"{NAME}.part"
    part.parent.mkdir()
    part.write_bytes({"all": archive, "more": archive + b"x", "half": archive[: len(archive) // 2]}[have])
    assert fetch.fetch("omniglot", tmp_path)[0].read_bytes() == archive
    assert visible(tmp_path) == [NAME]


@pytest.mark.parametrize("kind", [*IRREGULAR, "a link to a file"])
def test_something_else_in_the_place_of_the_partial_file(tmp_path, kind, server):
    """It is neither waited for nor written through."""
    part, outside = tmp_path / "root" / "omniglot" / f"{NAME}.part", tmp_path / "outside"
    outside.write_bytes(b"mine")
    if kind in IRREGULAR:
        put_in_place(kind, part)
    else:
        part.parent.mkdir(parents=True)
        part.symlink_to(outside)
    before = sorted(tmp_path.rglob("*"))
    with bounded(10, 64), pytest.raises(DataError, match=rf"{part} is a .*, where the partial download should go"):
        fetch.fetch("omniglot", tmp_path / "root")
    assert outside.read_bytes() == b"mine"
    assert [path for path in sorted(tmp_path.rglob("*")) if path.suffix != ".lock"] == before
    assert server.asked == []


@pytest.mark.parametrize("kind", IRREGULAR)
def test_something_else_in_the_place_of_the_lock(tmp_path, kind, archive):
    put_in_place(kind, tmp_path / "omniglot" / f".{NAME}.lock")
    with bounded(10, 64):
        if kind == "a named pipe":  # which can be locked as well
            assert fetch.fetch("omniglot", tmp_path)[0].read_bytes() == archive
        else:
            with pytest.raises(DataError, match="can't write"):
                fetch.fetch("omniglot", tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_fetched_files_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        (path,) = fetch.fetch("omniglot", tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_wrong_digest(tmp_path, server, archive):
    server.files[NAME] = archive[:-1] + b"x"
    with pytest.raises(DataError, match="isn't the published file"):
        fetch.fetch("omniglot", tmp_path)
    assert visible(tmp_path) == []
    server.files[NAME] = archive
    fetch.fetch("omniglot", tmp_path)
    assert visible(tmp_path) == [NAME]


def test_a_file_without_end(tmp_path, server):
    part = tmp_path / "a.part"
    with pytest.raises(DataError, match="more than 100 bytes"):
        ResumingDownloader(part, limit=100)(f"{server.url}/{NAME}", tmp_path / "a", None)
    assert not part.exists()


def test_a_server_that_has_no_such_file_or_is_not_there(tmp_path, server, monkeypatch):
    with pytest.raises(DataError, match="404"):
        fetch.fetch("omniglot", tmp_path, mirror=f"{server.url}/elsewhere/")
    closed = Server()
    closed.server_close()
    monkeypatch.setenv("METAMOM_MIRROR", closed.url)
    with pytest.raises(DataError, match="broke off after 0 bytes"):
        fetch.fetch("omniglot", tmp_path)
    assert visible(tmp_path) == []


def test_a_mirror(tmp_path, server, archive):
    server.files[f"mirror/{NAME}"] = server.files.pop(NAME)
    assert fetch.fetch("omniglot", tmp_path, mirror=f"{server.url}/mirror")[0].read_bytes() == archive


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't write"):
        fetch.fetch("omniglot", tmp_path / "file")


def test_unknown_and_missing_data(tmp_path):
    for ask in (fetch.fetch, fetch.check):
        with pytest.raises(ValueError, match="knows the data sets omniglot, mnist, fashion; got 'imagenet'"):
            ask("imagenet", tmp_path)
    with pytest.raises(FileNotFoundError, match="metamom data fetch omniglot"):
        fetch.check("omniglot", tmp_path)


def test_packed_images_are_fetched(tmp_path, server, monkeypatch):
    data = struct.pack(">HBBI", 0, 8, 1, 4) + bytes([1, 2, 3, 4])
    name = images.FILES[1]
    monkeypatch.setattr(images, "SIZES", {"train": 4})
    digests = [hashlib.md5(held, usedforsecurity=False).hexdigest() for held in (data, gzip.compress(data, mtime=0))]
    monkeypatch.setitem(images.UNPACKED["fashion"], name, digests[0])
    server.files[f"{name}.gz"] = gzip.compress(data, mtime=0)
    published = fetch.DATASETS["fashion"][1]
    assert published.name == name
    local = published._replace(url=f"{server.url}/{name}.gz", md5=digests[1])
    monkeypatch.setitem(fetch.DATASETS, "fashion", [local])
    assert fetch.fetch("fashion", tmp_path) == [tmp_path / "fashion_mnist" / f"{name}.gz"]
    assert fetch.check("fashion", tmp_path)[0].holds == {"labels": 4}


def test_omniglot_downloads_if_allowed(tmp_path, monkeypatch, server):
    names = tuple(f"background/Alpha/character0{n}" for n in (1, 2, 3))
    monkeypatch.setattr(omniglot, "split_characters", lambda split: names)
    with pytest.raises(FileNotFoundError):
        Omniglot(tmp_path, split="background", ways=3)
    assert Omniglot(tmp_path, split="background", ways=3, image_size=12, download=True).num_classes == 12
    Omniglot(tmp_path, split="background", ways=3, image_size=12, download=True)
    assert len(server.asked) == 1


def test_published_addresses_and_digests(monkeypatch):
    monkeypatch.undo()
    for published in [published for dataset in fetch.DATASETS.values() for published in dataset]:
        assert published.url.startswith(("https://", fetch.FASHION))  # which has no https; the digest is checked
        assert published.url.endswith((f"{published.name}.zip", f"{published.name}.gz"))
        assert re.fullmatch("[0-9a-f]{32}", published.md5)
