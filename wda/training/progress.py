"""How far a training is, in one line: on a terminal it is written over, elsewhere it goes to the log "wda"."""

from __future__ import annotations

import time

from wda.passes import Line

__all__ = ["Progress"]


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
        self.line, self.start = Line(shown), time.monotonic()

    def step(self, line: str, last: bool = False) -> None:
        """One step more; `last` where an epoch ends with it."""
        self.done += 1
        passed = time.monotonic() - self.start
        left = passed * (self.total - self.done) / (self.done - self.first)
        self.line.tell(f"{line}, {passed:.0f} s, {left:.0f} s left", last=last, always=last)
