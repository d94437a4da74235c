"""How far a training is, in one line: on a terminal it is written over, elsewhere it goes to the log "wda"."""

from __future__ import annotations

import logging
import sys
import time

__all__ = ["Progress"]

_log = logging.getLogger("wda")
_SECONDS_BETWEEN_LOG_LINES = 10.0


class Progress:
    """Shows what is done of so many steps, some of which an earlier process may have done.

    Parameters
    ----------
    total, done : int
    shown : bool or None
        True for a line on the standard error, False for none; None for one on a terminal and, elsewhere, a line in the
        log every ten seconds and at each end of an epoch.

    Examples
    --------
    >>> Progress(10, 0, shown=False).step("epoch 1/2")
    """

    def __init__(self, total: int, done: int, shown: bool | None) -> None:
        self.total, self.done, self.first = total, done, done
        self.bar = sys.stderr.isatty() if shown is None else shown
        self.logs = shown is None and not self.bar
        self.start = self.logged = time.monotonic()

    def step(self, line: str, last: bool = False) -> None:
        """One step more; `last` where an epoch ends with it."""
        self.done += 1
        now = time.monotonic()
        left = (now - self.start) * (self.total - self.done) / (self.done - self.first)
        line = f"{line}, {now - self.start:.0f} s, {left:.0f} s left"
        if self.bar:
            print(f"\r{line}   ", end="\n" if last else "", file=sys.stderr, flush=True)
        elif self.logs and (last or now - self.logged >= _SECONDS_BETWEEN_LOG_LINES):
            self.logged = now
            _log.info(line)
