"""Parts of the pages that the package itself knows: every command with its help, every configuration field.

    <!-- generated: commands -->

in a page is replaced by `commands()`, which reads the command line without starting it. No TensorFlow.

The table of private hooks stands in versions.md itself, to be read where there is no site:

    python docs/generated.py        # writes it there, from distfit/backends/seams.py
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer.main
import yaml
from pydantic import BaseModel

from distfit import cli
from distfit.backends import seams
from distfit.config import RunConfig, descriptions

_MARK = re.compile(r"^<!-- generated: ([a-z ]+) -->$", re.MULTILINE)
_HOOKS = re.compile(r"(?<=^<!-- written by docs/generated.py -->\n).*(?=^<!-- end -->$)", re.MULTILINE | re.DOTALL)
_INSIDE = r"(keras\.src|tensorflow\.python|tf\.__internal__)[\w.]*"
ROOT = Path(__file__).parent.parent
VERSIONS_PAGE = ROOT / "docs" / "versions.md"


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


def with_hooks(page: str) -> str:
    """versions.md with the tables as they should be."""
    tables = {
        "Replaced for the time of a run": seams.REPLACED,
        "Called, read or overridden": seams.CALLED,
        "Imported": seams.IMPORTED,
    }
    text = "\n\n".join(f"### {title}\n\n{_table(hooks)}" for title, hooks in tables.items())
    return _HOOKS.sub(lambda _: f"\n{text}\n\n", page)


def _table(hooks: tuple[seams.Hook, ...]) -> str:
    asked = any(hook.asked_by for hook in hooks)
    titles = ["hook", "asked by", "where", "why"] if asked else ["hook", "where", "why"]
    rows = [[f"`{hook.path}`", *([_asked_by(hook)] if asked else []), used_in(hook), hook.why] for hook in hooks]
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows])


def _asked_by(hook: seams.Hook) -> str:
    return f"`{hook.asked_by}`" if hook.asked_by else "scripts"


def used_in(hook: seams.Hook) -> str:
    """The modules of distfit that use a hook, by its name or as a string that says what is replaced; "" for none."""
    return ", ".join(f"`{path}`" for path, names in _names().items() if hook.name in names)


@cache
def _names() -> dict[str, set[str]]:
    files = sorted(path for path in (ROOT / "distfit").rglob("*.py") if path != Path(seams.__file__))
    return {str(path.relative_to(ROOT)): set(_hooked(ast.parse(path.read_text()))) for path in files}


def _hooked(module: ast.Module) -> Iterator[str]:
    """Names that may be hooks: private ones, and public ones that are taken from inside, replaced or overridden."""
    nodes = list(ast.walk(module))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and re.fullmatch(_INSIDE, node.module or "")]
    imported = {alias.name for node in froms for alias in node.names}
    yield from imported
    for node in nodes:
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            inside = owner in imported or re.fullmatch(_INSIDE, owner)
            if inside or node.attr.startswith("_") or isinstance(node.ctx, ast.Store):
                yield node.attr
        elif isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            if bases & imported or any(base.startswith(("tf.", "keras.")) for base in bases):
                yield from (method.name for method in node.body if isinstance(method, ast.FunctionDef))
        elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            yield str(node.args[1].value)  # replaced(layer, "_moments", own), getattr(adapter, "_num_samples")


def mend_docstring(app: Any, what: str, name: str, subject: Any, options: Any, lines: list[str]) -> None:
    """Sphinx' `autodoc-process-docstring`: a fenced example, as Markdown has it, in reStructuredText; and a colon
    behind an argument's name instead of napoleon's two hyphens."""
    text = re.sub(r"^```(\w+)\n(.*?)^```$", _directive, "\n".join(lines), flags=re.MULTILINE | re.DOTALL)
    lines[:] = re.sub(r"\*\* -- ", "**: ", text).split("\n")


def _directive(fence: re.Match) -> str:
    body = "".join(f"   {line}\n" for line in fence[2].splitlines())
    return f".. code-block:: {fence[1]}\n\n{body}"


if __name__ == "__main__":
    VERSIONS_PAGE.write_text(with_hooks(VERSIONS_PAGE.read_text()))
