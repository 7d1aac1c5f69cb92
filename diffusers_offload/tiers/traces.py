"""Finds writes to private mappings of files that nobody counted: the system counts the pages that they made private."""

from __future__ import annotations


def private_bytes() -> dict[int, int]:
    """For the address at which each mapping of this process begins, its bytes that are no longer the file's.

    Empty where the system does not tell (Linux does). Takes milliseconds.
    """
    found, start = {}, 0
    try:
        with open("/proc/self/smaps") as lines:
            for line in lines:
                head, _, rest = line.partition(" ")
                if not head.endswith(":"):  # "7f00-7f10 rw-p ...", before the numbers of that mapping
                    start = int(head.partition("-")[0], 16)
                elif head == "Anonymous:":
                    found[start] = int(rest.split()[0]) * 1024
    except (OSError, ValueError):
        return {}
    return found
