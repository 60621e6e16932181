"""The pages: every command in them is one, every link leads somewhere, every snippet compiles.

Commands are parsed by the command's own parser, not run: what needs a model of somebody else, hours
or a network cannot be. Those that run in a minute are run by the tests of their commands.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from redrafter_mlx import cli
from redrafter_mlx.__main__ import main as umbrella

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OTHERS = ("pip ", "pytest", "ruff ", "mypy", "curl ", "export ", "git ", "cd ", "npm ")
"""What a line may begin with that is no command of ours."""


def blocks(language: str):
    for page in PAGES:
        for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")):
            if kind == language:
                yield page.name, code


def commands():
    for page, code in blocks("shell"):
        for line in code.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s&&\s", line):
                part = re.sub(r"\s+#\s.*$", "", part).strip()
                if part and not part.startswith(("#", *OTHERS)):
                    yield pytest.param(part, id=f"{page}: {part[:60]}")


class Parsed(Exception):
    """The flags were understood; nothing more is wanted."""


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_is_understood(line, monkeypatch, capsys):
    parts = [part.strip() for part in re.split(r"\s[|<>]\s?", line)]
    words = shlex.split(next(part for part in parts if not part.startswith("printf ")))
    if words[0] == "mlx.launch":
        words = words[words.index("--") + 1 :]
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]

    monkeypatch.setattr(cli, "run", lambda main, parser, args=None: _parse(parser, args))
    monkeypatch.setattr(cli, "called_as", "")
    if words[0] == "redrafter-mlx":
        run = lambda: umbrella(words[1:])
    else:
        assert words[:2] == ["python", "-m"], line
        module = importlib.import_module(_module(words[2]))
        run = lambda: module.main(words[3:])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", _parse_others)
    with pytest.raises(Parsed):
        run()


def _module(name: str) -> str:
    package = name in ("convert", "redrafter_mlx.chat", "redrafter_mlx.server")
    return f"{name}.__main__" if package else name


def _parse(parser, args):
    parser.parse_args(args)
    raise Parsed


_real = argparse.ArgumentParser.parse_args


def _parse_others(parser, args=None, namespace=None):
    _real(parser, args, namespace)
    raise Parsed


@pytest.mark.parametrize(("page", "code"), list(blocks("python")))
def test_a_snippet_compiles_and_imports_what_there_is(page, code):
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("redrafter_mlx"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target
