"""Snakemake, which ends together with the sweep that started it. `wda sweep` runs this in a session of its own:

    python -P engine.py PIPE SECONDS ARGUMENTS...

The sweep keeps the other end of the pipe and never writes to it: it reads as ended once the sweep is gone, however it
went. Snakemake is then interrupted, as by Ctrl-C, and after so many seconds killed with all that it runs here.
"""

import os
import select
import signal
import sys
import threading
import time

from snakemake.cli import main


def watch(pipe: int, told: int, seconds: float) -> None:
    """Wait for the end of the sweep or a signal; then end the process group."""
    number = None
    while number not in (signal.SIGTERM, signal.SIGINT):
        if pipe in select.select([pipe, told], [], [])[0]:
            break
        number = os.read(told, 1)[0]
    if number != signal.SIGINT:
        os.killpg(0, signal.SIGINT)
    time.sleep(seconds)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    pipe, seconds, *arguments = sys.argv[1:]
    # Snakemake's own handler of SIGTERM takes a lock that the thread it interrupts may hold: then neither goes on. The
    # number of a signal comes through this pipe in any case.
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=watch, args=(int(pipe), told, float(seconds)), daemon=True).start()
    main(arguments)
