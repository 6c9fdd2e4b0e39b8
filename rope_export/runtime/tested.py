"""The newest versions this package was tested with, as ``constraints.txt`` of its sources has them.

A newer one may well do; where it does not, that is the first thing to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

TESTED = {
    "torch": "2.13.0",
    "onnx": "1.23.2",
    "onnx-ir": "1.1.0",
    "onnxscript": "0.7.2",
    "onnxruntime": "1.31.1",
    "transformers": "5.24.0",
}


def newer_than_tested(installed: Mapping[str, str | None]) -> Iterator[str]:
    """One line for each version that is newer than any this package was tested with.

    Args:
        installed: versions by distribution, None where there is none.

    Raises:
        ModuleNotFoundError: ``packaging``, which compares versions, is missing.
    """
    from packaging.version import InvalidVersion, Version

    for name, tested in TESTED.items():
        try:
            found = Version(installed.get(name) or "0")
        except InvalidVersion:  # of a build of one's own; what it is newer than, nobody knows
            continue
        # Without what a build says of itself: 2.13.0+cpu is 2.13.0.
        if Version(found.public) > Version(tested):
            yield (
                f"{name} {installed[name]} is newer than {tested}, the newest rope-export was "
                f"tested with: if it fails, try {name}=={tested}"
            )
