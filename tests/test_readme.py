"""What the README shows runs as written."""

import re
from pathlib import Path

import pytest

from fuseformer.cli import _parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_python_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})


def commands(beginning):
    lines = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]
    return [line for line in lines if line.startswith(beginning)]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"make ([a-z-]+)", README)) - {"a"}
    assert {"demo", "test", "lint"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_commands_are_understood():
    assert len(commands("fuseformer ")) >= 4
    for line in commands("fuseformer "):
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
        assert _parser().parse_args(words[1:]).command == words[1]
