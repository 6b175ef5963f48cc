"""Getting public weights: resumed, whole or not there, compared with a digest.

Files on Google Drive come through gdown, which knows its confirmation pages. Others come through urllib with ranges of
bytes: `torch.hub.download_url_to_file` starts again from the first byte when a connection is cut.
"""

from __future__ import annotations

import contextlib
import datetime
import email.message
import errno
import hashlib
import http.client
import importlib
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from psp_lightning.utils.errors import UserError
from psp_lightning.zoo import locate as pretrained
from psp_lightning.zoo.records import Record

KNOWN = "known_files.json"  # in the weights folder: digests recorded at the first download of a file
ATTEMPTS, PAUSE, TIMEOUT = 5, 0.5, 30.0  # tries without progress, seconds before the second one, seconds of silence
CHUNK = 1 << 20
PAGE_LIMIT = 1 << 16
QUOTA = (b"quota", b"too many users", b"download limit")
Progress = Callable[[int, int | None], None]


class _Cut(Exception):
    """The connection ended before the file did."""


def get(name: str, offline: bool = False, url: str | None = None, progress: Progress | None = None) -> tuple[Path, str]:
    """The file of public weights in the weights folder, downloaded where it is not there.

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
    entry, folder = pretrained.record(name), pretrained.weights_dir()
    target = folder / entry.filename
    if not target.is_file():
        if offline:
            raise _failure(entry, folder, f"{target} does not exist, and offline=true forbids downloads")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(entry, folder):
                if not target.is_file():  # another process may have been faster
                    _fetch(entry, url or entry.url, folder, progress)
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            if error.errno == errno.ENOSPC:
                reason = "no space left on the disk; the part that is there will be gone on from"
            raise _failure(entry, folder, f"{error.filename or folder}: {reason}") from None
    return target, check(entry, target)


def check(entry: Record, file: Path) -> str:
    """Compare a file with the digest of its record, else with the one recorded when it was first seen.

    Returns:
        A sentence that says which; a file without either is recorded now.

    Raises:
        UserError: it differs.
    """
    found = pretrained.sha256(file)
    if entry.sha256 is not None:
        if not found.startswith(entry.sha256):
            pretrained.verify(entry.name, file)  # raises, with the words of every other use
        return f"SHA-256 {found}: as published ({entry.sha256})."
    folder = pretrained.weights_dir()
    known = _read_known(folder)
    before = known.get(entry.name)
    if before is None:
        day = datetime.date.today().isoformat()
        known[entry.name] = {"sha256": found, "bytes": file.stat().st_size, "url": entry.url, "recorded": day}
        _write_known(folder, known)
        return (
            f"SHA-256 {found}: its publisher gives none, so that it was recorded in {folder / KNOWN} and is compared "
            "from now on (trust on first use)."
        )
    if before["sha256"] != found:
        raise UserError(
            f"{file} is not the file that was recorded for {entry.name!r} on {before.get('recorded')}: SHA-256 "
            f"{found[:16]}..., recorded {before['sha256'][:16]}... in {folder / KNOWN}. Where the new file is meant, "
            f"take the entry {entry.name!r} out of that file."
        )
    return f"SHA-256 {found}: as recorded on {before.get('recorded')} (its publisher gives none)."


def recorded() -> dict[str, dict[str, Any]]:
    """By name of weights: SHA-256, size, address and day of those without a published digest, when first seen.

    Raises:
        UserError: a damaged record.
    """
    return _read_known(pretrained.weights_dir())


def _failure(entry: Record, folder: Path, reason: str) -> UserError:
    """The error that says what happened and how to place the file by hand."""
    return UserError(
        f"Weights {entry.name!r}: {reason}.\n"
        f"By hand (licence: {entry.licence}): open {entry.url} in a browser, or run\n"
        f"  {entry.command(folder)}\n"
        f"and put the file at {folder / entry.filename}; another folder: set PSP_WEIGHTS."
    )


def _read_known(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / KNOWN
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


def _write_known(folder: Path, known: dict[str, dict[str, Any]]) -> None:
    path = folder / KNOWN
    part = path.with_name(f".{KNOWN}.{os.getpid()}")
    try:
        part.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


@contextlib.contextmanager
def _alone(entry: Record, folder: Path) -> Iterator[None]:
    """Keeps a second process from writing the same file, where the platform can."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:
        yield
        return
    with open(folder / f".{entry.filename}.lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _failure(entry, folder, "another process is downloading it: wait for it") from None
        yield


def _fetch(entry: Record, url: str, folder: Path, progress: Progress | None) -> None:
    part, target = folder / f".{entry.filename}.part", folder / entry.filename
    if "drive.google.com" in url:
        _fetch_drive(entry, folder, part)
    else:
        _fetch_http(entry, url, folder, part, progress)
    _refuse_page(entry, folder, part)
    if entry.sha256 is not None:
        found = _sha256(part)
        if not found.startswith(entry.sha256):
            _drop(part)
            raise _failure(
                entry,
                folder,
                f"what {url} gave has SHA-256 {found[:16]}..., published is {entry.sha256}; it was deleted",
            )
    os.replace(part, target)
    for rest in (_tag_file(part), folder / f".{entry.filename}.lock"):
        with contextlib.suppress(OSError):
            rest.unlink()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _refuse_page(entry: Record, folder: Path, part: Path) -> None:
    """Raise, and delete the part, where it is a web page and no data."""
    with open(part, "rb") as file:
        head = file.read(PAGE_LIMIT)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head and not start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return
    _drop(part)
    if not head:
        raise _failure(entry, folder, "the server gave an empty file")
    if any(word in start for word in QUOTA):
        raise _failure(entry, folder, "the server says that too many people downloaded the file; try again in a day")
    raise _failure(entry, folder, "the server gave a web page instead of the file (a login or a confirmation)")


def _fetch_drive(entry: Record, folder: Path, part: Path) -> None:
    try:
        gdown: Any = importlib.import_module("gdown")
    except ImportError:
        raise _failure(
            entry, folder, "it lies on Google Drive, which needs gdown: pip install 'psp-lightning[download]'"
        ) from None
    try:
        got = gdown.download(id=entry.drive_id, output=str(part), quiet=True, resume=True)
    except OSError:
        raise
    except Exception as error:  # gdown's own exceptions, of which versions differ, and those of requests
        text = str(error)
        reason = (text.strip().splitlines() or [type(error).__name__])[0][:200]
        if any(word in text.lower().encode() for word in (*QUOTA, b"many accesses")):
            reason = f"Google Drive refuses it for now, as too many people downloaded it ({reason}); try again in a day"
        raise _failure(entry, folder, f"gdown could not get it: {reason}") from None
    if got is None or not part.is_file():
        raise _failure(entry, folder, "gdown could not get it; the file may have moved")


def _fetch_http(entry: Record, url: str, folder: Path, part: Path, progress: Progress | None) -> None:
    failures, before = 0, -1
    while True:
        try:
            _continue(entry, url, folder, part, progress)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise _failure(entry, folder, f"{url} answers {error.code} {error.reason}") from None
            reason = f"{error.code} {error.reason}"
        except (_Cut, http.client.HTTPException, ConnectionError, TimeoutError, urllib.error.URLError) as error:
            reason = str(getattr(error, "reason", None) or error or type(error).__name__)
        except ValueError as error:  # no such kind of address
            raise _failure(entry, folder, f"{url}: {error}") from None
        size = part.stat().st_size if part.exists() else 0
        failures = 1 if size > before >= 0 else failures + 1  # a cut after some progress does not count up
        before = size
        if failures >= ATTEMPTS:
            kept = f"; {size} bytes are kept and will be gone on from" if size else ""
            raise _failure(entry, folder, f"{url}: {reason}, {failures} times{kept}")
        time.sleep(PAUSE * 2 ** (failures - 1))


def _drop(part: Path) -> None:
    """What was downloaded is not the file: nothing of it is gone on from."""
    for path in (part, _tag_file(part)):
        path.unlink(missing_ok=True)


def _tag_file(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _continue(entry: Record, url: str, folder: Path, part: Path, progress: Progress | None) -> None:
    """One request: the rest of the file, where the server still has the one that the part is of, else all of it."""
    start, tag = (part.stat().st_size if part.exists() else 0), _read_tag(part)
    request = urllib.request.Request(url, headers={"User-Agent": "psp-lightning", "Accept-Encoding": "identity"})
    if start and tag:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", tag)
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after what is there: whole, or of another file
            whole = (error.headers.get("Content-Range") or "").rpartition("/")[2]
            if whole == str(start):
                return
            part.unlink()
            raise _Cut("the file on the server has changed") from None
        raise
    with answer:
        headers: email.message.Message = answer.headers
        if answer.status == 206:
            first = (headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
            if first != str(start):
                part.unlink()
                raise _Cut("the server goes on from another place")
        else:
            start = 0
        if "html" in (headers.get("Content-Type") or ""):
            part.write_bytes(answer.read(PAGE_LIMIT))
            _refuse_page(entry, folder, part)
        length = headers.get("Content-Length")
        total = start + int(length) if length is not None and length.isdigit() else None
        if total is not None and (free := shutil.disk_usage(folder).free) < total - start:
            raise OSError(errno.ENOSPC, f"{total - start} bytes are missing, {free} are free", os.fspath(folder))
        if not start:
            _write_tag(part, headers)
        with open(part, "ab" if start else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                start += len(chunk)
                if progress is not None:
                    progress(start, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and start < total:
        raise _Cut(f"the connection was cut after {start} of {total} bytes")


def _read_tag(part: Path) -> str | None:
    try:
        return _tag_file(part).read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeError):
        return None


def _write_tag(part: Path, headers: email.message.Message) -> None:
    """Keeps what tells this file of the server from a later one: its ETag, else its date."""
    tag = headers.get("ETag")
    if tag is None or tag.startswith("W/"):
        tag = headers.get("Last-Modified")
    if tag and tag.isascii():
        _tag_file(part).write_text(tag, encoding="ascii")
    else:
        _tag_file(part).unlink(missing_ok=True)
