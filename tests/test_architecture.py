"""docs/architecture.md says how things are: every file, every room, imports that run downwards."""

from __future__ import annotations

import ast
import re

from test_layers import PACKAGE, ROOT, imported, modules

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PICTURES = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)


def rooms() -> list[set[str]]:
    """The files and folders of each room, from above to below."""
    found: list[set[str]] = []
    for line in PICTURES[1].splitlines():
        names = set(
            re.findall(r"(?:\b[a-z_]+\.py|[a-z_]+/)(?=\s|$)", line[:30] if line[0] != " " else line)
        )
        if line[0] == " ":
            found[-1] |= names
        else:
            found.append(names)
    return found


def room_of(module: str, all_rooms) -> int:
    top = module.split(".")[0]
    places = [i for i, names in enumerate(all_rooms) if f"{top}.py" in names or f"{top}/" in names]
    assert len(places) == 1, f"{module} is in {len(places)} rooms"
    return places[0]


def test_imports_run_down_the_rooms():
    all_rooms = rooms()
    for name, path in modules():
        for other in imported(path):
            if other not in ("", "__init__"):
                assert room_of(name, all_rooms) <= room_of(other, all_rooms), f"{name}: {other}"


def test_every_file_is_listed_with_its_first_sentence():
    """What it lacks stands in the message, as it has to be written there."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py":
            told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            line = f"- `{path.name}`: {' '.join(told.split(chr(10) * 2)[0].split())}"
            assert line in PAGE, f"docs/architecture.md lacks: {line}"


def test_the_way_of_a_token_leads_through_files_that_exist():
    named = re.findall(r"\b((?:[a-z_]+/)*[a-z_0-9]+\.py)\b", PICTURES[0])
    assert len(named) > 15
    for name in named:
        assert list(PACKAGE.rglob(name)) or (PACKAGE / name).exists(), name
