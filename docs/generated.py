"""Parts of the pages that the package itself knows: every command with its help, every configuration field.

    <!-- generated: commands -->

in a page is replaced by `commands()`, which reads the command line without starting it. No TensorFlow.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import typer.main
import yaml
from pydantic import BaseModel

from distfit import cli
from distfit.config import RunConfig, descriptions

_MARK = re.compile(r"^<!-- generated: ([a-z ]+) -->$", re.MULTILINE)


def fill(app: Any, page: str, source: list[str]) -> None:
    """Sphinx' `source-read`: puts each generated part where a page asks for it."""
    parts = {"commands": commands, "fields": fields}
    source[0] = _MARK.sub(lambda mark: parts[mark[1]](), source[0])


def commands() -> str:
    """Every command under its name, with what `--help` shows."""
    return "\n\n".join(f"## {' '.join(words)}\n\n```text\n{context.get_help()}\n```" for words, context in walk())


def walk() -> Iterator[tuple[list[str], Any]]:
    """Every command as its words and a context that knows its help, groups before their members."""
    root = typer.main.get_command(cli.app)
    yield from _walk(root, ["distfit"], None)


def _walk(command: Any, words: list[str], parent: Any) -> Iterator[tuple[list[str], Any]]:
    context = command.make_context(words[-1], [], parent=parent, resilient_parsing=True, terminal_width=96)
    yield words, context
    for name, member in getattr(command, "commands", {}).items():
        yield from _walk(member, [*words, name], context)


def fields() -> str:
    """The configuration's fields as a table: dotted name, default, choices, meaning."""
    rows = [_row(name, meaning) for name, meaning in descriptions()]
    return "\n".join(["| field | default | meaning |", "|---|---|---|", *rows])


def _row(name: str, meaning: str) -> str:
    field = _field(name)
    group = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    if group:
        default = ""
    elif field.is_required():
        default = "needed"
    else:
        default = f"`{_yaml(field.get_default(call_default_factory=True))}`"
    choices = ", ".join(f"`{_yaml(choice)}`" for choice in _choices(field.annotation))
    text = re.sub(r"([*|])", r"\\\1", meaning)
    return f"| `{name}` | {default} | {text}{': ' if choices else ''}{choices} |"


def _field(name: str) -> Any:
    section: Any = RunConfig
    *parents, last = name.split(".")
    for parent in parents:
        section = section.model_fields[parent].annotation
    return section.model_fields[last]


def _choices(annotation: Any) -> list[Any]:
    """What a Literal allows, also as one of several alternatives; nothing for other types."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def mend_docstring(app: Any, what: str, name: str, subject: Any, options: Any, lines: list[str]) -> None:
    """Sphinx' `autodoc-process-docstring`: a fenced example, as Markdown has it, in reStructuredText; and a colon
    behind an argument's name instead of napoleon's two hyphens."""
    text = re.sub(r"^```(\w+)\n(.*?)^```$", _directive, "\n".join(lines), flags=re.MULTILINE | re.DOTALL)
    lines[:] = re.sub(r"\*\* -- ", "**: ", text).split("\n")


def _directive(fence: re.Match) -> str:
    body = "".join(f"   {line}\n" for line in fence[2].splitlines())
    return f".. code-block:: {fence[1]}\n\n{body}"
