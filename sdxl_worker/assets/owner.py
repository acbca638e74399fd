"""Who wrote a temporary file, and whether that process is still alive."""

import os
import re
import socket
import time
from pathlib import Path

_TAG = re.compile(r"\.(?P<host>[^~/.]+)~(?P<pid>\d+)~(?P<born>\d+)~[0-9a-f]+\.part$")


def owner_tag() -> str:
    """`host~pid~start` of this process, for the name of a temporary file."""
    return f"{_host()}~{os.getpid()}~{_born(os.getpid())}"


def is_left_over(path: Path, *, older_than_s: float) -> bool:
    """True when the writer of `path` is dead: known for this host, presumed after `older_than_s` without a write."""
    found = _TAG.search(path.name)
    if found is not None and found["host"] == _host():
        return not _is_alive(int(found["pid"]), int(found["born"]))
    try:
        return time.time() - path.stat().st_mtime > older_than_s
    except OSError:
        return False


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())[:40] or "unknown"


def _born(pid: int) -> int:
    """The process's start time in clock ticks since boot (proc(5), field 22), 0 where there is no /proc.

    A restarted container has the same host name and often the same process id; this tells the two apart.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _is_alive(pid: int, born: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return _born(pid) == born
