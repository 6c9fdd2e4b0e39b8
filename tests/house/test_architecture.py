"""The page of the architecture names files that are there, and every room there is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = sorted(p.parent.name for p in (ROOT / "rope_export").glob("*/__init__.py"))


def test_every_file_it_names_is_there():
    named = re.findall(r"`((?:\w+/)?\w+\.py)`", PAGE)
    assert len(named) > 30
    files = [
        path.as_posix()
        for folder in ("rope_export", "cli")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in files)] == []


def test_every_room_is_drawn_and_held_to_its_floor():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    floors = re.search(r"^layers = \[(.*?)\]", settings, re.DOTALL | re.MULTILINE)
    held = set(re.findall(r"\w+", floors[1]))
    assert set(ROOMS) <= held
    assert [room for room in ROOMS if f"<b>{room}</b>" not in PAGE] == []
