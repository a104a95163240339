"""How much memory is free, and how much an error says was asked for.

What is free is the least of three: what limits of the process leave (`ulimit -v`), what those of its
control groups leave (containers, services, batch systems), and what the machine has. Importing this module
imports the standard library only, and reading takes some kilobytes: there may be few.
"""

from __future__ import annotations

import re
import resource
from pathlib import Path

__all__ = ["asked_for", "free_memory", "gigabytes"]

_ASKED = re.compile(r"allocate\s+(\d+\.?\d*)\s*(bytes|[kmgtpe]i?b)\b", re.IGNORECASE)
_FREE_ON_GPU = re.compile(r"of which (\d+\.?\d*)\s*(bytes|[kmgtpe]i?b) is free", re.IGNORECASE)
_UNITS = "bkmgtpe"
_UNLIMITED = 1 << 60
"""Version 1 of control groups writes a number beyond this for no limit."""


def asked_for(message: str) -> int | None:
    """Return the bytes that numpy, OpenCV or torch say they could not have; None for other words.

    Example:
        >>> asked_for("Unable to allocate 2.00 GiB for an array with shape (268435456,)")
        2147483648
    """
    return _bytes_in(_ASKED, message)


def free_memory(message: str = "", *, root: Path = Path("/")) -> int | None:
    """Return the bytes that are free; None where nothing tells.

    Args:
        message: of an error; torch's of a GPU says what is free there, which is what counts then.
        root: below which `proc` and `sys` are.
    """
    there = _bytes_in(_FREE_ON_GPU, message)
    if there is not None:
        return there
    try:
        left = [*_left_to_process(root), *_left_to_groups(root), *_left_to_machine(root)]
    except MemoryError:  # there is none to look
        return None
    return max(min(left), 0) if left else None


def gigabytes(n: int) -> str:
    """Return a number of bytes in units of 10^9 or, where it is less than one, of 10^6 bytes.

    Example:
        >>> gigabytes(3_140_000_000), gigabytes(40_000_000)
        ('3.1 GB', '40 MB')
    """
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def _bytes_in(pattern: re.Pattern[str], message: str) -> int | None:
    found = pattern.search(message)
    if found is None:
        return None
    unit = found[2].lower()
    base = 1024 if "i" in unit else 1000
    return int(float(found[1]) * base ** _UNITS.index(unit[0]))


def _left_to_process(root: Path) -> list[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _fields(root / "proc/self/status").get("VmSize")
    return [] if limit == resource.RLIM_INFINITY or used is None else [limit - used]


def _left_to_machine(root: Path) -> list[int]:
    fields = _fields(root / "proc/meminfo")
    return [fields["MemAvailable"] + fields.get("SwapFree", 0)] if "MemAvailable" in fields else []


def _left_to_groups(root: Path) -> list[int]:
    """Return what is left to the control groups around this process, of version 2 and 1."""
    left = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        limit, use, cached = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        group = Path(name.lstrip("/"))
        # A container sees its own group at the top, whatever the name says.
        for folder in dict.fromkeys([top / group, *(top / one for one in group.parents), top]):
            most, now = _text(folder / limit).strip(), _text(folder / use).strip()
            if most.isdecimal() and now.isdecimal() and int(most) < _UNLIMITED:
                stat = re.search(rf"^{cached} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                left.append(int(most) - int(now) + (int(stat[1]) if stat else 0))
    return left


def _fields(file: Path) -> dict[str, int]:
    """Return the sizes of a file of lines `Name:  123 kB`, in bytes."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB$", _text(file), re.MULTILINE)
    return {name: 1024 * int(size) for name, size in lines}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
