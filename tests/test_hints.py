"""Hints are commands that can be pasted: each stands alone on a line of its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from trt_wan.cli.main import cli

ROOT = Path(__file__).parents[1]
FOLDERS = ("trt_wan", "build", "runtime", "preprocess", "engines", "benchmarks")
SUBCOMMANDS = "|".join(cli.commands)
COMMAND = re.compile(
    rf"\b((?:cat \S+ \| )?trt-wan (?:{SUBCOMMANDS})\b|(?:pip|pipx|apt|apt-get|conda) install\b|python -m \w"
    r"|(?:ffmpeg|mkdir|rm|mv|cp|chmod) [-\w/'.\0])"
)
MAKES_COMMANDS = {"install_command", "shell_command", "shlex.join"}
TABLES = {"engines/store/folders.py"}  # no hints: a column that names commands
VALUE = "\0"  # stands for a value in an f-string
COMMAND_VALUE = "trt-wan run \0"  # stands for a command in an f-string


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Line number and text of every string that is no docstring, with VALUE for the values in f-strings."""
    tree = ast.parse(source)
    parts = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    parts |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(map(_piece, node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            yield node.lineno, node.value


def _piece(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    calls = (node.func for node in ast.walk(part) if isinstance(node, ast.Call))
    return COMMAND_VALUE if MAKES_COMMANDS & set(map(ast.unparse, calls)) else VALUE


def not_alone(text: str) -> list[str]:
    """The lines that hold a command and something else."""
    return [
        line
        for line in text.splitlines()
        if (found := COMMAND.search(line)) and (found.start() or line.endswith((".", ",", ";", ")", "…")))
    ]


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ("Run:\ntrt-wan build --size 832x480", True),
        ("Run: trt-wan build", False),
        ("trt-wan list shows them.", False),
        ("Make it:\nmkdir -p out", True),
        ("Make it: mkdir -p out", False),
        ("It takes long in the form of a list", True),
        ("Run:\npip install torch, from PyTorch", True),  # not found: the end of a command is not known
        ("Run: pip install torch", False),
        ("(ffmpeg -i a.mp4 -vf scale=2:2 …)", False),
    ],
)
def test_the_rule(text: str, alone: bool) -> None:
    assert (not not_alone(text)) == alone


@pytest.mark.parametrize(
    ("source", "alone"),
    [
        ("""x = f"Run: {install_command('rtx')}" """, False),
        ("""x = f"Run: {shell_command(('list',))} now" """, False),
        ("""x = f"{shlex.join(parts)}" """, True),
        ("""x = with_commands("Run:", install_command("rtx"))""", True),
    ],
)
def test_commands_that_calls_make_are_found(source: str, alone: bool) -> None:
    assert not [bad for _, text in texts(source) for bad in not_alone(text)] == alone


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_command_stands_alone_on_its_line(folder: str) -> None:
    wrong = []
    for module in sorted((ROOT / folder).rglob("*.py")):
        where = module.relative_to(ROOT).as_posix()
        if where not in TABLES:
            found = texts(module.read_text())
            wrong += [f"{where}:{line}: {bad!r}" for line, text in found for bad in not_alone(text)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_hint_installs_by_a_name_that_is_not_ours(folder: str) -> None:
    """`pip install 'trt-wan[rtx]'` takes the name from PyPI: see install_command."""
    for module in (ROOT / folder).rglob("*.py"):
        for line, text in texts(module.read_text()):
            assert not re.search(r"install\b.*trt-wan", text), f"{module}:{line}: {text}"


def test_a_usage_error_of_click_names_a_command_too() -> None:
    result = CliRunner().invoke(cli, ["run", "--nonsense", "--json"])
    assert result.exit_code == 2 and '"hint": "Run:\\ncli run --help"' in result.stdout
