"""Get public weights: resumed, whole or not there, compared with a digest.

Files on Google Drive come through gdown, which knows its confirmation pages. Others come through urllib with ranges of
bytes: `torch.hub.download_url_to_file` starts again from the first byte when a connection is cut.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import http.client
import importlib
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
from psp_lightning.zoo import locate
from psp_lightning.zoo.records import Record

KNOWN = "known_files.json"  # in the weights folder: digests recorded at the first download of a file
ATTEMPTS, PAUSE, TIMEOUT = 5, 0.5, 30.0  # tries without progress, seconds before the second one, seconds of silence
CHUNK = 1 << 20
PAGE_LIMIT = 1 << 16
QUOTA = ("quota", "too many users", "download limit", "many accesses")
Progress = Callable[[int, int | None], None]


def get(name: str, offline: bool = False, url: str | None = None, progress: Progress | None = None) -> tuple[Path, str]:
    """Return the file of public weights in the weights folder; download it where it is missing.

    Args:
        name: key of `RECORDS`.
        offline: download nothing.
        url: another place to get the file from.
        progress: called with the bytes so far and in all.

    Returns:
        The file, and in a sentence what it was compared with.

    Raises:
        UserError: no such weights; offline and not there; no connection, no space, a page instead of data, another
            digest. Says how to place the file by hand.
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
                reason = "no space left on the disk; the next download goes on from the part that is there"
            raise download.failure(f"{error.filename or folder}: {reason}") from None
    return download.target, check(entry, download.target)


def check(entry: Record, file: Path) -> str:
    """Compare a file with the digest of its record, else with the one recorded when it was first seen.

    Returns:
        A sentence that says which; a file without either is recorded now.

    Raises:
        UserError: it differs.
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
            f"SHA-256 {found}: its publisher gives none, so that it was recorded in {path} and is compared from now on "
            "(trust on first use)."
        )
    if before["sha256"] != found:
        raise UserError(
            f"{file} is not the file that was recorded for {entry.name!r} on {before.get('recorded')}: SHA-256 "
            f"{found[:16]}..., recorded {before['sha256'][:16]}... in {path}. Where the new file is meant, take the "
            f"entry {entry.name!r} out of that file."
        )
    return f"SHA-256 {found}: as recorded on {before.get('recorded')} (its publisher gives none)."


def recorded() -> dict[str, dict[str, Any]]:
    """Return SHA-256, size, address and day of the weights without a published digest, by name, when first seen.

    Raises:
        UserError: a damaged record.
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
        raise UserError(f"{path} is damaged. It holds the digests of downloaded weights: mend it or delete it.")
    return known


class _Cut(Exception):
    """The connection ended before the file did."""


@dataclass
class _Download:
    """One file on its way into `folder`; its part, and the tag that tells it from a later file, lie beside it."""

    entry: Record
    url: str
    folder: Path
    progress: Progress | None

    def __post_init__(self) -> None:
        name = self.entry.filename
        self.target, self.part = self.folder / name, self.folder / f".{name}.part"
        self.tag, self.lock = self.folder / f".{name}.part.tag", self.folder / f".{name}.lock"

    def failure(self, reason: str) -> UserError:
        """Make the error that says what happened and how to place the file by hand."""
        return UserError(
            f"Weights {self.entry.name!r}: {reason}.\n"
            f"By hand (licence: {self.entry.licence}): open {self.entry.url} in a browser, or run\n"
            f"  {self.entry.command(self.folder)}\n"
            f"and put the file at {self.target}; another folder: set PSP_WEIGHTS."
        )

    def run(self) -> None:
        """Download the file, unless another process does or did."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.lock, timeout=0):
                if not self.target.is_file():
                    self._fetch()
        except Timeout:
            raise self.failure("another process is downloading it: wait for it") from None

    def _fetch(self) -> None:
        (self._from_drive if "drive.google.com" in self.url else self._from_server)()
        self._refuse_page()
        expected, found = self.entry.sha256, locate.sha256(self.part)
        if expected is not None and not found.startswith(expected):
            self._drop()
            raise self.failure(
                f"what {self.url} gave has SHA-256 {found[:16]}..., published is {expected}; it was deleted"
            )
        os.replace(self.part, self.target)
        self.tag.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # Windows deletes no open file
            self.lock.unlink()

    def _drop(self) -> None:
        """Delete what was downloaded: it is not the file, and nothing may go on from it."""
        self.part.unlink(missing_ok=True)
        self.tag.unlink(missing_ok=True)

    def _refuse_page(self) -> None:
        """Delete the part and raise where it is a web page and no data."""
        with open(self.part, "rb") as file:
            head = file.read(PAGE_LIMIT)
        start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if head and not start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
            return
        self._drop()
        if not head:
            raise self.failure("the server gave an empty file")
        if any(word.encode() in start for word in QUOTA):
            raise self.failure("the server says that too many people downloaded the file; try again in a day")
        raise self.failure("the server gave a web page instead of the file (a login or a confirmation)")

    def _from_drive(self) -> None:
        try:
            gdown: Any = importlib.import_module("gdown")
        except ImportError:
            raise self.failure(
                "it lies on Google Drive, which needs gdown: pip install 'psp-lightning[download]'"
            ) from None
        try:
            got = gdown.download(id=self.entry.drive_id, output=str(self.part), quiet=True, resume=True)
        except OSError:
            raise
        except Exception as error:  # gdown's own exceptions, of which versions differ, and those of requests
            text = str(error)
            reason = (text.strip().splitlines() or [type(error).__name__])[0][:200]
            if any(word in text.lower() for word in QUOTA):
                reason = (
                    f"Google Drive refuses it for now, as too many people downloaded it ({reason}); try again in a day"
                )
            raise self.failure(f"gdown could not get it: {reason}") from None
        if got is None or not self.part.is_file():
            raise self.failure("gdown could not get it; the file may have moved")

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
            except ValueError as error:  # no such kind of address
                raise self.failure(f"{self.url}: {error}") from None
            size = self._size()
            failures = 1 if size > before >= 0 else failures + 1  # a cut after some progress does not count up
            before = size
            if failures >= ATTEMPTS:
                kept = f"; {size} bytes are kept and will be gone on from" if size else ""
                raise self.failure(f"{self.url}: {reason}, {failures} times{kept}")
            time.sleep(PAUSE * 2 ** (failures - 1))

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _request(self) -> None:
        """Ask for the rest of the file, where the server still has the one that the part is of, else for all of it."""
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
            # nothing after what is there: the part is whole, or of another file
            if (error.headers.get("Content-Range") or "").rpartition("/")[2] == str(start):
                return
            self.part.unlink()
            raise _Cut("the file on the server has changed") from None
        with answer:
            told: Message = answer.headers
            if answer.status != 206:
                start = 0
            elif not (told.get("Content-Range") or "").startswith(f"bytes {start}-"):
                self.part.unlink()
                raise _Cut("the server goes on from another place")
            if "html" in (told.get("Content-Type") or ""):
                self.part.write_bytes(answer.read(PAGE_LIMIT))
                self._refuse_page()
            length = told.get("Content-Length") or ""
            self._write(answer, start, start + int(length) if length.isdigit() else None)

    def _write(self, answer: Any, start: int, total: int | None) -> None:
        """Write the bytes of an answer to the part, from `start` on."""
        if total is not None and (free := shutil.disk_usage(self.folder).free) < total - start:
            raise OSError(errno.ENOSPC, f"{total - start} bytes are missing, {free} are free", os.fspath(self.folder))
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
        """Keep what tells this file of the server from a later one: its ETag, else its date."""
        tag = headers.get("ETag")
        if tag is None or tag.startswith("W/"):
            tag = headers.get("Last-Modified")
        if tag and tag.isascii():
            self.tag.write_text(tag.strip(), encoding="ascii")
        else:
            self.tag.unlink(missing_ok=True)
