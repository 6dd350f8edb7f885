"""How many processors there are, and how several processes share them."""

import os


def cores() -> int:
    """Return on how many processors this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(processes: int, *, no_wish: int = 0) -> int:
    """Return how many threads each of several processes on this machine gets; no more than OMP_NUM_THREADS says.

    That variable counts as not set where it is ``no_wish``.
    """
    share, wish = max(1, cores() // processes), os.environ.get("OMP_NUM_THREADS", "")
    limit = int(wish) if wish.isdecimal() else 0
    return share if limit in (0, no_wish) else min(share, limit)
