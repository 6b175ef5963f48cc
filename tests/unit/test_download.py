"""Downloads from a server on the loopback address: interrupted, resumed, wrong, disk full, pages instead of data."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from psp_lightning.utils.errors import UserError
from psp_lightning.zoo import download, locate
from psp_lightning.zoo.records import Record

DATA = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(DATA).hexdigest()


@dataclass
class Behaviour:
    """The server's behaviour. `requests` are the Range headers that it received."""

    data: bytes = DATA
    cuts: list[int] = field(default_factory=list)  # bytes after which the next responses are cut
    etag: str | None = '"one"'
    status: int = 200
    content_type: str = "application/octet-stream"
    length: bool = True
    ranges: bool = True
    failures: int = 0  # number of initial responses with status 503
    requests: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[tuple[Behaviour, str]]:
    behaviour = Behaviour()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            requested = self.headers.get("Range")
            behaviour.requests.append(requested)
            if behaviour.failures:
                behaviour.failures -= 1
                self.send_error(503)
                return
            if behaviour.status != 200:
                self.send_error(behaviour.status)
                return
            same = self.headers.get("If-Range") in (None, behaviour.etag)
            start = int(requested.removeprefix("bytes=").rstrip("-")) if requested and behaviour.ranges and same else 0
            size = len(behaviour.data)
            if start >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            if behaviour.etag:
                self.send_header("ETag", behaviour.etag)
            self.send_header("Content-Type", behaviour.content_type)
            if behaviour.length:
                self.send_header("Content-Length", str(size - start))
            self.send_header("Connection", "close")
            self.end_headers()
            end = start + behaviour.cuts.pop(0) if behaviour.cuts else size
            self.wfile.write(behaviour.data[start:end])
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield behaviour, f"http://127.0.0.1:{http.server_address[1]}/w.pth"
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "weights"
    monkeypatch.setenv("PSP_WEIGHTS", str(folder))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSE", 0.001)
    return folder


def record(monkeypatch: pytest.MonkeyPatch, url: str, sha256: str | None = None) -> Record:
    entry = Record("mine", "w.pth", url, "MIT", "tests", sha256)
    monkeypatch.setitem(locate.RECORDS, "mine", entry)
    return entry


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {download.KNOWN}


def test_whole_file(server, folder, monkeypatch):
    behaviour, url = server
    record(monkeypatch, url, DIGEST[:8])
    seen = []
    file, message = download.get("mine", progress=lambda done, total: seen.append((done, total)))
    assert file == folder / "w.pth" and file.read_bytes() == DATA and "as published" in message
    assert names(folder) == {"w.pth"} and seen[-1] == (len(DATA), len(DATA))
    assert locate.find("mine") == file
    download.get("mine", offline=True)
    assert len(behaviour.requests) == 1, "an existing file must not be downloaded again"


def test_cut_connections_are_resumed(server, folder, monkeypatch):
    behaviour, url = server
    record(monkeypatch, url, DIGEST)
    behaviour.cuts = [100_000, 300_000, 1, 200_000]
    assert download.get("mine")[0].read_bytes() == DATA
    assert behaviour.requests == [None, "bytes=100000-", "bytes=400000-", "bytes=400001-", "bytes=600001-"]


def test_a_later_call_resumes(server, folder, monkeypatch):
    behaviour, url = server
    record(monkeypatch, url, DIGEST)
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    behaviour.cuts = [70_000]
    with pytest.raises(UserError, match="cut after 70000 of 1048576 bytes.*70000 bytes are kept") as error:
        download.get("mine")
    assert "By hand" in str(error.value) and not (folder / "w.pth").exists()
    assert download.get("mine")[0].read_bytes() == DATA and behaviour.requests[-1] == "bytes=70000-"
    assert names(folder) == {"w.pth"}


def test_a_part_of_another_file_is_discarded(server, folder, monkeypatch):
    behaviour, url = server
    record(monkeypatch, url, DIGEST)
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    behaviour.cuts, behaviour.data = [70_000], b"x" * 500_000
    with pytest.raises(UserError, match="70000 bytes are kept"):
        download.get("mine")
    behaviour.data, behaviour.etag = DATA, '"two"'
    assert download.get("mine")[0].read_bytes() == DATA


@pytest.mark.parametrize("change", [{"etag": None}, {"ranges": False}, {"etag": 'W/"weak"'}])
def test_servers_that_cannot_resume(server, folder, monkeypatch, change):
    behaviour, url = server
    record(monkeypatch, url, DIGEST)
    for key, value in change.items():
        setattr(behaviour, key, value)
    behaviour.cuts = [50_000, 60_000]
    assert download.get("mine")[0].read_bytes() == DATA


def test_a_part_that_is_complete(server, folder, monkeypatch):
    """The download was killed between the last byte and the renaming."""
    behaviour, url = server
    record(monkeypatch, url, DIGEST)
    folder.mkdir()
    (folder / ".w.pth.part").write_bytes(DATA)
    (folder / ".w.pth.part.tag").write_text('"one"')
    assert download.get("mine")[0].read_bytes() == DATA and behaviour.requests == [f"bytes={len(DATA)}-"]
    (folder / "w.pth").unlink()
    (folder / ".w.pth.part").write_bytes(DATA + b"more")
    (folder / ".w.pth.part.tag").write_text('"one"')
    assert download.get("mine")[0].read_bytes() == DATA


def test_wrong_hash(server, folder, monkeypatch):
    behaviour, url = server
    record(monkeypatch, url, "0" * 64)
    with pytest.raises(UserError, match=f"SHA-256 {DIGEST[:16]}.*but 000.* is published; it was deleted") as error:
        download.get("mine")
    assert names(folder) <= {".w.pth.lock"}, "no part of the wrong file may be kept"
    assert str(folder / "w.pth") in str(error.value) and "curl" in str(error.value)
    (folder / "w.pth").write_bytes(b"mine")
    with pytest.raises(UserError, match="not the published file"):
        download.get("mine")


def test_trust_on_first_use(server, folder, monkeypatch):
    behaviour, url = server
    entry = record(monkeypatch, url)
    _, message = download.get("mine")
    assert "trust on first use" in message and DIGEST in message
    known = json.loads((folder / download.KNOWN).read_text())
    assert known["mine"]["sha256"] == DIGEST and known["mine"]["bytes"] == len(DATA)
    assert "as recorded on" in download.get("mine")[1] and download.recorded() == known
    (folder / "w.pth").write_bytes(DATA[:-1] + b"x")
    with pytest.raises(UserError, match="not the file that was recorded for 'mine'.*delete the entry 'mine'"):
        download.get("mine")
    (folder / download.KNOWN).write_text("{")
    with pytest.raises(UserError, match="known_files.json is damaged"):
        download.check(entry, folder / "w.pth")


@pytest.mark.parametrize(
    ("data", "content_type", "message"),
    [
        (b"<!DOCTYPE html><html>Please log in</html>", "text/html; charset=utf-8", "a web page instead of the file"),
        (b"<!DOCTYPE html><html>Please log in</html>", "application/octet-stream", "a web page instead of the file"),
        (b"<html>Google Drive - Quota exceeded</html>", "text/html", "too many people"),
        (b"", "application/octet-stream", "an empty file"),
    ],
)
def test_pages_are_rejected_as_weights(server, folder, monkeypatch, data, content_type, message):
    behaviour, url = server
    record(monkeypatch, url)
    behaviour.data, behaviour.content_type = data, content_type
    if not data:
        behaviour.status = 200
        monkeypatch.setattr(download._Download, "_request", lambda self: self.part.write_bytes(b""))
    with pytest.raises(UserError, match=message) as error:
        download.get("mine")
    assert "By hand" in str(error.value) and not [name for name in names(folder) if name.endswith((".pth", ".part"))]


def test_server_errors(server, folder, monkeypatch):
    behaviour, url = server
    record(monkeypatch, url)
    for status in (404, 403):
        behaviour.status = status
        with pytest.raises(UserError, match=f"answers {status}.*\n.*By hand"):
            download.get("mine")
    assert len(behaviour.requests) == 2, "such responses must not be retried"
    behaviour.status, behaviour.failures = 200, 3
    assert download.get("mine")[0].is_file(), "an overloaded server must be asked again"


def test_no_server(folder, monkeypatch):
    record(monkeypatch, "http://127.0.0.1:9/w.pth")
    with pytest.raises(UserError, match=r"refused, 5 times\.\nBy hand"):
        download.get("mine")
    record(monkeypatch, "nonsense")
    with pytest.raises(UserError, match="unknown url type"):
        download.get("mine")


def test_no_space(server, folder, monkeypatch):
    behaviour, url = server
    record(monkeypatch, url, DIGEST)
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(UserError, match="no space left on the disk.*\nBy hand"):
            download.get("mine")

    def full(file: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(download.os, "fsync", full)
        with pytest.raises(UserError, match="no space left on the disk"):
            download.get("mine")
    assert not (folder / "w.pth").exists()
    assert download.get("mine")[0].read_bytes() == DATA, "the download must resume when there is space"


def test_folder_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PSP_WEIGHTS", str(tmp_path / "file" / "weights"))
    record(monkeypatch, server[1])
    with pytest.raises(UserError, match="file.*\nBy hand.*\n.*\nand put the file at"):
        download.get("mine")


def test_offline(folder, monkeypatch):
    record(monkeypatch, "http://127.0.0.1:9/w.pth")
    with pytest.raises(UserError, match="offline=true forbids downloads.*\nBy hand.*MIT"):
        download.get("mine", offline=True)
    assert not folder.exists()
    with pytest.raises(UserError, match="Did you mean 'ir_se50'"):
        download.get("irse50", offline=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_two_processes(server, folder, monkeypatch):
    folder.mkdir()
    record(monkeypatch, server[1])
    lock = folder / ".w.pth.lock"
    program = f"import fcntl, sys; f = open({str(lock)!r}, 'wb'); fcntl.flock(f, 2); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is downloading"):
            download.get("mine")
        other.communicate("\n")
    assert download.get("mine")[0].is_file()


# --- Google Drive, through a stand-in of gdown ---------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, run: Any) -> list[dict]:
    calls: list[dict] = []

    def fake(**arguments: Any) -> Any:
        calls.append(arguments)
        return run(arguments["output"])

    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=fake))
    return calls


def test_drive(folder, monkeypatch):
    record(monkeypatch, "https://drive.google.com/uc?id=ABC")
    calls = stand_in(monkeypatch, lambda output: Path(output).write_bytes(DATA) and output)
    assert download.get("mine")[0].read_bytes() == DATA
    assert calls[0]["id"] == "ABC" and calls[0]["resume"] is True
    for run, message in (
        (lambda output: Path(output).write_bytes(b"<html>Quota exceeded") and output, "too many people"),
        (lambda output: None, "may have moved"),
    ):
        (folder / "w.pth").unlink(missing_ok=True)
        stand_in(monkeypatch, run)
        with pytest.raises(UserError, match=message):
            download.get("mine")

    def refuses(output: str) -> None:
        raise RuntimeError("Cannot retrieve the public link of the file.\nYou may have had many accesses.")

    stand_in(monkeypatch, refuses)
    with pytest.raises(UserError, match="too many people have downloaded it.*Cannot retrieve.*\nBy hand"):
        download.get("mine")


def test_drive_without_gdown(folder, monkeypatch):
    entry = record(monkeypatch, "https://drive.google.com/uc?id=ABC")
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UserError, match=r"pip install 'psp-lightning\[download\]'.*\n.*browser"):
        download.get("mine")
    assert replace(entry, url="https://a/b").drive_id is None
