"""Every library that is missing is named, not only the one the loader stops at."""

from __future__ import annotations

import shutil
import struct
import subprocess

import pytest

from rope_export.runtime import libraries, providers

LIBRARY = providers.library_folder() / "libonnxruntime_providers_shared.so"


@pytest.mark.skipif(not LIBRARY.exists(), reason="this build of onnxruntime has no such library")
def test_all_missing_libraries_are_named(tmp_path):
    needed = libraries.needed_libraries(LIBRARY)
    assert "libc.so.6" in needed
    assert libraries.missing_libraries(LIBRARY) == ()
    if shutil.which("readelf"):
        text = subprocess.check_output(["readelf", "-d", LIBRARY], text=True)
        shown = [line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line]
        assert list(needed) == shown
    content = LIBRARY.read_bytes()
    renamed = tmp_path / "renamed.so"
    renamed.write_bytes(
        content.replace(b"libgcc_s.so.1\0", b"libabsent.so1\0").replace(b"libm.so", b"libQ.so")
    )
    assert set(libraries.missing_libraries(renamed)) == {"libabsent.so1", "libQ.so.6"}
    (tmp_path / "libQ.so.6").touch()  # beside it, where it is found
    assert libraries.missing_libraries(renamed) == ("libabsent.so1",)


def test_a_library_at_an_address_of_its_own(tmp_path):
    """Strings are found by address, which is not their place in the file."""
    names = b"\0libone.so\0libtwo.so.2\0"
    base, dynamic, strings = 0x400000, 64 + 2 * 56, 64 + 2 * 56 + 5 * 16
    entries = ((1, 1), (5, base + strings), (1, 11), (10, len(names)), (0, 0))
    size = strings + len(names)
    header = b"\x7fELF\x02\x01\x01".ljust(32, b"\0") + struct.pack("<QQIHHH", 64, 0, 0, 64, 56, 2)
    segments = ((1, 0, base, size), (2, dynamic, base + dynamic, 5 * 16))
    file = tmp_path / "own.so"
    file.write_bytes(
        header.ljust(64, b"\0")
        + b"".join(struct.pack("<IIQQQQQQ", k, 4, o, a, a, n, n, 8) for k, o, a, n in segments)
        + b"".join(struct.pack("<QQ", *entry) for entry in entries)
        + names
    )
    assert libraries.needed_libraries(file) == ("libone.so", "libtwo.so.2")


def test_what_is_no_library_needs_nothing(tmp_path):
    file = tmp_path / "file"
    assert libraries.needed_libraries(file) == ()
    for content in (b"", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + bytes(80), b"text" * 40):
        file.write_bytes(content)
        assert libraries.needed_libraries(file) == ()
