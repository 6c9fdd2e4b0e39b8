"""Which shared libraries a library needs, and which of them the loader does not find: Linux only.

The loader names the first one that is missing. Read here is the list it goes through: the
``DT_NEEDED`` entries of the dynamic section (System V ABI, "Dynamic Linking").
"""

from __future__ import annotations

import ctypes
import struct
import sys
from pathlib import Path
from typing import BinaryIO

_ELF_64_LITTLE = b"\x7fELF\x02\x01"
_LOAD, _DYNAMIC = 1, 2  # kinds of segment
_END, _NEEDED, _STRINGS, _STRINGS_SIZE = 0, 1, 5, 10  # entries of the dynamic section


def needed_libraries(path: Path) -> tuple[str, ...]:
    """Names of the libraries that ``path`` is linked to, in its order.

    Empty for what is no 64-bit little-endian ELF file, or a damaged one.
    """
    try:
        with path.open("rb") as file:
            return _needed(file)
    except (OSError, struct.error, StopIteration):
        return ()


def missing_libraries(path: Path) -> tuple[str, ...]:
    """Names of the libraries that ``path`` needs and the loader does not find.

    What a library that is found needs in turn is counted too. Empty where this cannot be told.
    """
    if sys.platform != "linux":
        return ()
    missing: dict[str, None] = {}
    for name in needed_libraries(path):
        if (path.parent / name).exists():
            continue
        try:
            ctypes.CDLL(name)
        except OSError as error:
            absent, _, reason = str(error).partition(": ")
            missing[absent if "cannot open" in reason else name] = None
    return tuple(missing)


def _needed(file: BinaryIO) -> tuple[str, ...]:
    header = file.read(64)
    if not header.startswith(_ELF_64_LITTLE):
        return ()
    (table,) = struct.unpack_from("<Q", header, 32)
    entry_size, count = struct.unpack_from("<HH", header, 54)
    segments = []
    for index in range(count):
        file.seek(table + index * entry_size)
        kind, _, offset, address, _, size = struct.unpack("<IIQQQQ", file.read(40))
        segments.append((kind, offset, address, size))
    start, length = next((o, n) for kind, o, _, n in segments if kind == _DYNAMIC)
    file.seek(start)
    entries = []
    for tag, value in struct.iter_unpack("<QQ", file.read(length)):
        if tag == _END:
            break
        entries.append((tag, value))
    found = dict(entries)
    if not found.keys() >= {_NEEDED, _STRINGS, _STRINGS_SIZE}:
        return ()
    place = found[_STRINGS]  # an address: where in the file it is, its segment says
    offset, address = next(
        (o, a) for kind, o, a, n in segments if kind == _LOAD and a <= place < a + n
    )
    file.seek(offset + place - address)
    strings = file.read(found[_STRINGS_SIZE])
    names = [strings[value:].partition(b"\0")[0] for tag, value in entries if tag == _NEEDED]
    return tuple(name.decode(errors="replace") for name in names)
