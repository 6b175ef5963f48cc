"""A lock file among processes, also of several machines with a common folder, that cannot hang.

The owner writes who it is and touches the file as long as it lives. A waiter breaks the lock when its owner is a
process of this machine that is gone, or when the file has not changed for a while by the waiter's own clock (clocks of
machines differ). Should two owners meet all the same, both build, and the one that is later finds the work done: what
is protected here is time, never correctness, which rests on the atomic rename of `_jit`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

BEAT, STALE, POLL = 2.0, 30.0, 0.2  # seconds between two signs of life, until their lack counts, between two looks


class FileLock:
    """Lock by the existence of `path`."""

    def __init__(self, path: Path, beat: float = BEAT, stale: float = STALE, poll: float = POLL) -> None:
        self.path, self.beat, self.stale, self.poll = path, beat, stale, poll
        self._token = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.broken = 0  # stale locks that this one removed

    def acquire(self, settled: Callable[[], bool]) -> bool:
        """Wait for the lock; True when it is held, False as soon as `settled()`: another did what was to be done."""
        seen: tuple[str, int] | None = None
        since = time.monotonic()
        while not self._create():
            if settled():
                return False
            now = self._look()
            if now is None:  # released this moment
                continue
            if now != seen:
                seen, since = now, time.monotonic()
            if self._is_dead(now[0]) or time.monotonic() - since > self.stale:
                self._break(now[0])
                seen = None
                continue
            time.sleep(self.poll)
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        return True

    def release(self) -> None:
        """Remove the lock, unless another has broken it and made its own."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        now = self._look()
        if now is not None and self._owner(now[0]).get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump({"token": self._token, "pid": os.getpid(), "host": socket.gethostname()}, file)
        return True

    def _look(self) -> tuple[str, int] | None:
        """Content and time of the file; None when it is gone."""
        try:
            return self.path.read_text(), self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    @staticmethod
    def _owner(text: str) -> dict[str, object]:
        try:
            owner = json.loads(text)
        except ValueError:  # its owner is just writing it, or died doing so
            return {}
        return owner if isinstance(owner, dict) else {}

    def _is_dead(self, text: str) -> bool:
        owner = self._owner(text)
        pid = owner.get("pid")
        if os.name != "posix" or owner.get("host") != socket.gethostname() or not isinstance(pid, int):
            return False
        try:
            os.kill(pid, 0)  # asks, does not kill
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False

    def _break(self, text: str) -> None:
        """Move the lock with this content away. Another may have done so and made a new one: that one is put back."""
        aside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if aside.read_text() == text:
            self.broken += 1
        else:
            try:
                os.link(aside, self.path)
            except OSError:  # a third one was quicker, or there are no links: then two build, see above
                pass
        aside.unlink()

    def _live(self) -> None:
        while not self._stop.wait(self.beat):
            try:
                if self._owner(self.path.read_text()).get("token") != self._token:
                    return
                os.utime(self.path)
            except OSError:
                return
