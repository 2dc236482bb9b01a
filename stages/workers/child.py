"""Run gmpipe in a process that ends with its parent.

`python -m stages.workers.child PARENT ARGUMENT...` becomes `python -m stages.cli ARGUMENT...`, and
the kernel kills it as soon as the process PARENT ends, however that ends. (More precisely: as soon
as the thread that started it ends.)
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; see prctl(2)


def main() -> None:
    """Ask for the parent's end as a signal, then become the command."""
    parent, *arguments = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        sys.exit(f"the process {parent} that started this one has ended")
    # The request outlives the exec. -P: the modules come from where gmpipe is installed, as they
    # do for the parent, not from the current folder.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "stages.cli", *arguments])


if __name__ == "__main__":
    main()
