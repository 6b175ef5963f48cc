"""Download public weights: resumable, atomic, and checked against a digest.

Files on Google Drive are downloaded with gdown, which handles Drive's confirmation pages. All others are downloaded
with urllib and byte ranges, because `torch.hub.download_url_to_file` restarts from the first byte when a connection is
cut.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.web_page import is_web_page
from psp_lightning.zoo import locate
from psp_lightning.zoo.records import Record

KNOWN = "known_files.json"  # file in the weights folder with the digests that were recorded when a file was first seen
ATTEMPTS = 5  # without progress
PAUSE = 0.5  # seconds before the second attempt; doubles with each attempt
TIMEOUT = 30.0  # seconds without data
CHUNK, PAGE_LIMIT = 1 << 20, 1 << 16  # bytes
QUOTA = ("quota", "too many users", "download limit", "many accesses")
Progress = Callable[[int, int | None], None]


def get(name: str, offline: bool = False, url: str | None = None, progress: Progress | None = None) -> tuple[Path, str]:
    """Return a file of public weights in the weights folder, downloading it if it is missing.

    Args:
        name: a key of `RECORDS`.
        offline: never download.
        url: download from here instead of the published address.
        progress: called with the bytes so far and the total, if it is known.

    Returns:
        The file, and a sentence that says what its digest was compared with.

    Raises:
        UserError: unknown name; missing file and `offline`; no connection, a full disk, a web page instead of the
            file, a wrong digest. The message says how to place the file by hand.
    """
    entry, folder = locate.record(name), locate.weights_dir()
    download = _Download(entry, url or entry.url, folder, progress)
    if not download.target.is_file():
        if offline:
            raise download.failure(f"{download.target} does not exist, and offline=true forbids downloads")
        try:
            download.run()
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            if error.errno == errno.ENOSPC:
                reason = "no space left on the disk; the next attempt resumes the partial download"
            raise download.failure(f"{error.filename or folder}: {reason}") from None
    return download.target, check(entry, download.target)


def check(entry: Record, file: Path) -> str:
    """Compare a file with its published digest or, if none is published, with the one recorded at first sight.

    If neither exists, the digest is recorded now.

    Returns:
        A sentence that says what the file was compared with.

    Raises:
        UserError: the digests differ.
    """
    locate.verify(entry.name, file)
    found = locate.sha256(file)
    if entry.sha256 is not None:
        return f"SHA-256 {found}: as published ({entry.sha256})."
    known, path = recorded(), locate.weights_dir() / KNOWN
    before = known.get(entry.name)
    if before is None:
        day = datetime.date.today().isoformat()
        known[entry.name] = {"sha256": found, "bytes": file.stat().st_size, "url": entry.url, "recorded": day}
        try:
            with replacing(path) as part:
                part.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from None
        return (
            f"SHA-256 {found}: no published digest exists. This one was recorded in {path} and is checked from now on "
            "(trust on first use)."
        )
    if before["sha256"] != found:
        raise UserError(
            f"{file} is not the file that was recorded for {entry.name!r} on {before.get('recorded')}: SHA-256 "
            f"{found[:16]}..., recorded {before['sha256'][:16]}... in {path}. To accept the new file, delete the entry "
            f"{entry.name!r} there."
        )
    return f"SHA-256 {found}: as recorded on {before.get('recorded')} (no published digest exists)."


def recorded() -> dict[str, dict[str, Any]]:
    """Return the entries of `known_files.json` by name: sha256, bytes, url, recorded (a date).

    Raises:
        UserError: the file is damaged.
    """
    path = locate.weights_dir() / KNOWN
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        good = isinstance(known, dict) and all(isinstance(entry["sha256"], str) for entry in known.values())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise UserError(f"{path} is damaged. It contains the digests of downloaded weights: repair or delete it.")
    return known


class _Cut(Exception):
    """The connection ended before the file did."""


@dataclass
class _Download:
    """A download into `folder`, with the partial file and its ETag beside the target."""

    entry: Record
    url: str
    folder: Path
    progress: Progress | None

    def __post_init__(self) -> None:
        name = self.entry.filename
        self.target, self.part = self.folder / name, self.folder / f".{name}.part"
        self.tag, self.lock = self.folder / f".{name}.part.tag", self.folder / f".{name}.lock"

    def failure(self, reason: str) -> UserError:
        """Return an error with the reason and how to place the file by hand."""
        return UserError(
            f"Weights {self.entry.name!r}: {reason}.\n"
            f"By hand (licence: {self.entry.licence}): open {self.entry.url} in a browser, or run\n"
            f"  {self.entry.command(self.folder)}\n"
            f"and put the file at {self.target}. Set PSP_WEIGHTS to use another folder."
        )

    def run(self) -> None:
        """Download the file, unless another process has done so meanwhile; raise a UserError if the download fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.lock, timeout=0):
                if not self.target.is_file():
                    self._fetch()
        except Timeout:
            raise self.failure("another process is downloading it; wait until it has finished") from None

    def _fetch(self) -> None:
        (self._from_drive if "drive.google.com" in self.url else self._from_server)()
        self._reject_page()
        expected, found = self.entry.sha256, locate.sha256(self.part)
        if expected is not None and not found.startswith(expected):
            self._drop()
            raise self.failure(
                f"the file from {self.url} has SHA-256 {found[:16]}..., but {expected} is published; it was deleted"
            )
        os.replace(self.part, self.target)
        self.tag.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # Windows cannot delete open files
            self.lock.unlink()

    def _drop(self) -> None:
        """Delete the partial file, because it is not the wanted one."""
        self.part.unlink(missing_ok=True)
        self.tag.unlink(missing_ok=True)

    def _reject_page(self) -> None:
        """Delete the partial file and raise if it is empty or a web page."""
        with open(self.part, "rb") as file:
            head = file.read(PAGE_LIMIT)
        if head and not is_web_page(head):
            return
        self._drop()
        if not head:
            raise self.failure("the server sent an empty file")
        if any(word.encode() in head.lower() for word in QUOTA):
            raise self.failure("the server says that too many people have downloaded the file; try again in a day")
        raise self.failure("the server sent a web page instead of the file (a login or a confirmation)")

    def _from_drive(self) -> None:
        try:
            import gdown
        except ImportError:
            raise self.failure(
                "it is on Google Drive, which needs gdown: pip install 'psp-lightning[download]'"
            ) from None
        try:
            got = gdown.download(id=self.entry.drive_id, output=str(self.part), quiet=True, resume=True)
        except OSError:
            raise
        except Exception as error:  # the classes of gdown's exceptions differ between versions
            text = str(error)
            reason = (text.strip().splitlines() or [type(error).__name__])[0][:200]
            if any(word in text.lower() for word in QUOTA):
                reason = f"too many people have downloaded it from Google Drive ({reason}); try again in a day"
            raise self.failure(f"gdown could not download it: {reason}") from None
        if got is None or not self.part.is_file():
            raise self.failure("gdown could not download it; the file may have moved")

    def _from_server(self) -> None:
        failures, before = 0, -1
        while True:
            try:
                return self._request()
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in (408, 429):
                    raise self.failure(f"{self.url} answers {error.code} {error.reason}") from None
                reason = f"{error.code} {error.reason}"
            except (_Cut, http.client.HTTPException, ConnectionError, TimeoutError, urllib.error.URLError) as error:
                reason = str(getattr(error, "reason", None) or error or type(error).__name__)
            except ValueError as error:  # unknown kind of URL
                raise self.failure(f"{self.url}: {error}") from None
            size = self._size()
            failures = 1 if size > before >= 0 else failures + 1  # progress resets the count
            before = size
            if failures >= ATTEMPTS:
                kept = f"; {size} bytes are kept for the next attempt" if size else ""
                raise self.failure(f"{self.url}: {reason}, {failures} times{kept}")
            time.sleep(PAUSE * 2 ** (failures - 1))

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _request(self) -> None:
        """Resume if the server's file is unchanged, otherwise restart."""
        start = self._size()
        headers = {"User-Agent": "psp-lightning", "Accept-Encoding": "identity"}
        request = urllib.request.Request(self.url, headers=headers)
        tag = self.tag.read_text(encoding="ascii", errors="ignore") if self.tag.is_file() else ""
        if start and tag:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", tag)
        try:
            answer = urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            # the server has nothing after these bytes: the partial file is complete, or belongs to another file
            if error.headers.get("Content-Range", "").rpartition("/")[2] == str(start):
                return
            self.part.unlink()
            raise _Cut("the file on the server has changed") from None
        with answer:
            if answer.status != 206:
                start = 0
            elif not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                self.part.unlink()
                raise _Cut("the server resumed at another position")
            if "html" in answer.headers.get("Content-Type", ""):
                self.part.write_bytes(answer.read(PAGE_LIMIT))
                self._reject_page()
            length = answer.headers.get("Content-Length", "")
            self._write(answer, start, start + int(length) if length.isdigit() else None)

    def _write(self, answer: Any, start: int, total: int | None) -> None:
        """Append an answer to the partial file, or write it anew if `start` is 0."""
        if total is not None and (free := shutil.disk_usage(self.folder).free) < total - start:
            raise OSError(errno.ENOSPC, f"{total - start} bytes are needed, {free} are free", os.fspath(self.folder))
        if not start:
            self._keep_tag(answer.headers)
        with open(self.part, "ab" if start else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                start += len(chunk)
                if self.progress is not None:
                    self.progress(start, total)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and start < total:
            raise _Cut(f"the connection was cut after {start} of {total} bytes")

    def _keep_tag(self, headers: Message) -> None:
        """Store the server's ETag or modification date, which tells whether a later answer is about the same file."""
        tag = headers.get("ETag")
        if tag is None or tag.startswith("W/"):
            tag = headers.get("Last-Modified")
        if tag and tag.isascii():
            self.tag.write_text(tag.strip(), encoding="ascii")
        else:
            self.tag.unlink(missing_ok=True)
