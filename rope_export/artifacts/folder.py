"""The artifact folder appears whole or not at all, and never takes what is not its own."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rope_export.artifacts.files import CONFIG, MODEL, OURS, VECTORS
from rope_export.errors import BadInputError

# Folders being written, with the parents made for them: what an interruption must clear away.
_unfinished: dict[Path, list[Path]] = {}


def check_destination(path: Path) -> None:
    """Check that an artifact can be put at ``path`` without losing anything of the user's.

    Raises:
        BadInputError: it is a file, a folder with other things in it, or cannot be written.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise BadInputError(
            f"{str(path)!r}: is no valid text in this locale; use another name or a UTF-8 locale"
        ) from None
    here = Path.cwd()
    if path.resolve() == here or path.resolve() in here.parents:
        raise BadInputError(f"{path}: is the current folder, or above it; give a folder inside it")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise BadInputError(f"{path}: is not a folder; give a new folder or an earlier artifact")
    if path.is_dir():
        foreign = sorted(
            entry.name
            for entry in path.iterdir()
            if entry.name not in OURS and not entry.name.startswith(VECTORS)
        )
        if foreign:
            raise BadInputError(
                f"{path}: holds {foreign[0]!r}, not part of an artifact, and it would be lost; "
                "give a new folder or an earlier artifact"
            )
    parent = path.resolve().parent
    if (parent / MODEL).exists() and (parent / CONFIG).exists():
        raise BadInputError(f"{path}: {parent} is an artifact itself; give a folder beside it")
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise BadInputError(f"{path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BadInputError(f"{path}: {parent} is not writable")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a folder beside ``path`` to write into; on success it takes the place of ``path``.

    On any exception, interruption included, the folder is removed and ``path`` is as it was.
    """
    check_destination(path)
    path = path.resolve()
    try:
        made = _make_parents(path.parent)
        folder = Path(tempfile.mkdtemp(prefix=".rope-export.tmp-", dir=path.parent))
    except OSError as error:
        raise BadInputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        folder.chmod(0o777 & ~_umask())
        _unfinished[folder] = made
        yield folder
        _swap_in(folder, path)
    finally:
        discard_unfinished()


def discard_unfinished() -> None:
    """Remove every folder being written, and the parents made for it that are still empty."""
    while _unfinished:
        folder, made = _unfinished.popitem()
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:  # deepest first
            with suppress(OSError):
                parent.rmdir()


def _make_parents(parent: Path) -> list[Path]:
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
    return missing


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap_in(folder: Path, path: Path) -> None:
    """Put ``folder`` at ``path``; what was there ends up at ``folder``, to be removed."""
    if not path.exists():
        folder.rename(path)
        return
    if _exchange(folder, path):
        return
    # No atomic exchange on this platform: two renames, undone if the second fails.
    aside = folder.with_name(folder.name + ".old")
    path.rename(aside)
    try:
        folder.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux's renameat2); False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
