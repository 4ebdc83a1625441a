"""The rules of the house, held by reading the source: imports point one way, and who may know what.

Nothing of distfit is imported here; two tests start a fresh Python to see what an import loads.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.ranks import ROOT, environment

# From the ground to the roof: a module imports from its own layer and from those before it, also inside
# functions. Within a layer there is no way round in a circle.
LAYERS = {
    "words": "errors",
    "facts": """
        log warned topology config models differences folders cgroups meeting keras_backend
        data.plan data.description data.local data.bad_records
        data.storage data.files data.records data.framing data.example data.ahead
        data.catalog data.index data.index_request data.index_update data.index_cache data.reader
        data.lanes data.read_ahead data.shuffle_window data.streaming
        data.images data.images.* data.image_examples data.transforms data.transforms.* data.cache data.cache_file
        data.identity data.void data.one_step data.pipeline data.rows data.reading data.on_device data.tfrecords
        data.build data.build.* data.inspect.*
        monitor.start_block monitor.terminal monitor.progress monitor.counting watch watch.*
        install install.* launchers launchers.* doctor doctor.*
        checkpoint checkpoint.options checkpoint.fields checkpoint.plain checkpoint.tensors checkpoint.manifest
        checkpoint.pace checkpoint.folder checkpoint.retention checkpoint.lock checkpoint.writer checkpoint.statistics
        checkpoint.tables checkpoint.differences checkpoint.pruning checkpoint.contents checkpoint.listing
        backends.transport backends.base backends.devices
    """,
    "TensorFlow": """
        backends backends.hooks backends.seams backends.single backends.mirrored backends.horovod
        backends.threads training training.*
        data.passes data.sources data.feed callbacks.* checks seeds monitor.announce downloads
        checkpoint.place checkpoint.facts checkpoint.callback_states checkpoint.keras_states
        checkpoint.random_streams checkpoint.state checkpoint.snapshot
        checkpoint.opened checkpoint.publishing checkpoint.not_kept checkpoint.keeper
    """,
    "preparation": "prepare loops loops.data loops.batches loops.trainee loops.training",
    "session": "session loops.face",
    "fitting": "fitting",
    "tests of users": "testing thread_ranks",
    "experiment": "experiment experiment.* bench bench.* checkpoint.export",
    "checking": "checking checking.*",
    "command line": "cli cli.* __main__",
}
ORDER = list(LAYERS)
# They load neither TensorFlow nor Keras when they are imported; the command line shows its help at once.
PURE = ("words", "facts", "session", "command line")
HEAVY = {"tensorflow", "keras", "horovod", "mpi4py"}
# Who may import these libraries, wherever in the file.
ONLY_IN = {
    "horovod": {
        "backends.horovod",
        "install.rank_check",
        "doctor.probe",
        "doctor.rank_probe",
        "launchers.horovodrun_program",
    },
    "mpi4py": {"backends.transport", "install.rank_check", "doctor.probe", "doctor.rank_probe"},
}
ENGINES = ("single", "mirrored", "horovod")
CALLS_THAT_DECIDE = r"(startswith|endswith|isinstance|\.get)$"
LONGEST = 40  # lines of a function, its docstring left out
LONGER = {
    "fitting.fit": "its signature is keras.Model.fit's and takes half of it; the rest is a table of contents",
    "loops.face.HandWritten.training": "its signature is half of distfit.fit's, and is passed on by name",
    "monitor.progress.make_progress": "holds the callback's class, as Keras is imported when one is made",
    "install.recipe._needs": "a table: each requirement of the build, with what to type",
}


def module_name(path: Path) -> str:
    """The dotted name below distfit: "data.plan", "watch" for its `__init__`, "" for distfit's own."""
    parts = path.relative_to(ROOT / "distfit").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@cache
def house() -> dict[str, ast.Module]:
    """Every module that has something in it, parsed; distfit's own `__init__` ("") included."""
    files = sorted((ROOT / "distfit").rglob("*.py"))
    return {module_name(path): ast.parse(path.read_text()) for path in files if path.stat().st_size}


def rooms() -> list[str]:
    return [name for name in house() if name]


def layer_of(module: str) -> str:
    found = [
        layer
        for layer, members in LAYERS.items()
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in members.split())
    ]
    assert len(found) == 1, f"{module} has to be in one layer of tests/test_layers.py, it is in {found}"
    return found[0]


def imports(tree: ast.AST, *, inside_functions: bool) -> set[str]:
    """The dotted names that a module imports, `from a import b` as both a and a.b; not for type checking."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"an import relative to its package: {ast.unparse(node)}"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting.extend(node.orelse)
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting.extend(ast.iter_child_nodes(node))
    return found


def neighbours(module: str) -> set[str]:
    """The modules of distfit that a module imports, anywhere; a package only where it is meant itself."""
    named = {
        name.removeprefix("distfit").removeprefix(".")
        for name in imports(house()[module], inside_functions=True)
        if name == "distfit" or name.startswith("distfit.")
    }
    found = {name for name in named if name in house()}
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)} - {""}


def functions() -> dict[str, ast.FunctionDef]:
    """Every function and method by module and qualified name."""
    found: dict[str, ast.FunctionDef] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            name = f"{prefix}.{child.name}" if named else prefix
            if isinstance(child, ast.FunctionDef):
                found[name] = child
            visit(child, name)

    for module, tree in house().items():
        visit(tree, module)
    return found


def loaded_by(*modules: str) -> set[str]:
    """Which of the heavy libraries a fresh Python has loaded after these imports."""
    program = f"import sys, {', '.join(modules)}; print(*({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", rooms())
def test_imports_point_one_way(module):
    below = ORDER[: ORDER.index(layer_of(module)) + 1]
    assert [other for other in sorted(neighbours(module)) if layer_of(other) not in below] == []


def test_no_imports_go_round_in_a_circle():
    left = {module: neighbours(module) for module in rooms()}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}


def test_every_pattern_of_a_layer_has_a_module():
    patterns = [pattern for members in LAYERS.values() for pattern in members.split()]
    assert [pattern for pattern in patterns if not fnmatch.filter(rooms(), pattern)] == []


@pytest.mark.parametrize("module", [module for module in rooms() if layer_of(module) in PURE])
def test_pure_modules_name_no_heavy_library_at_their_top(module):
    top = {name.split(".")[0] for name in imports(house()[module], inside_functions=False)}
    assert top & HEAVY == set()


def test_pure_modules_load_no_heavy_library():
    # `__main__` would run the command.
    pure = [module for module in rooms() if layer_of(module) in PURE and module != "__main__"]
    assert loaded_by("distfit", *(f"distfit.{module}" for module in pure)) == set()


def test_the_look_at_loaded_libraries_sees_them():
    assert "keras" in loaded_by("distfit.callbacks.saver")


@pytest.mark.parametrize(("library", "allowed"), ONLY_IN.items())
def test_engines_are_imported_in_one_place(library, allowed):
    users = {
        module
        for module, tree in house().items()
        if any(name.split(".")[0] == library for name in imports(tree, inside_functions=True))
    }
    assert users == allowed


def names_of_engines_decided_on(tree: ast.AST) -> list[str]:
    """Where a program branches on an engine's name: compared, matched, looked up or tested for its class."""
    found = []
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node]
        elif isinstance(node, (ast.MatchValue, ast.Subscript)):
            parts = [node.value if isinstance(node, ast.MatchValue) else node.slice]
        elif isinstance(node, ast.Dict):
            parts = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Call) and re.search(CALLS_THAT_DECIDE, ast.unparse(node.func)):
            parts = list(node.args)
        words = {leaf for part in parts for leaf in map(_word, ast.walk(part))}
        if words & {*ENGINES, *map(str.title, ENGINES)}:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def _word(node: ast.AST) -> object:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return node.id if isinstance(node, ast.Name) else None


# `install` builds the package of that name, whichever engine then runs.
@pytest.mark.parametrize("module", [name for name in house() if name.split(".")[0] not in ("backends", "install")])
def test_engines_are_known_by_name_only_in_backends(module):
    assert names_of_engines_decided_on(house()[module]) == []


@pytest.mark.parametrize(
    "code",
    [
        "if name == 'mirrored': pass",
        "if name in ('single', 'auto'): pass",
        "match name:\n    case 'horovod': pass",
        "{'horovod': 2}[name]",
        "isinstance(backend, Mirrored)",
    ],
)
def test_each_way_of_deciding_on_a_name_is_seen(code):
    assert names_of_engines_decided_on(ast.parse(code))


def test_git_keeps_every_module():
    """A pattern of .gitignore once hid a whole room, which then was in no clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("no clone: nothing is kept by git here")
    files = [str(path.relative_to(ROOT)) for path in (ROOT / "distfit").rglob("*.py")]
    ignored = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ignored.returncode, ignored.stdout) == (1, ""), ignored.stderr


@pytest.mark.parametrize("module", rooms())
def test_every_module_opens_with_its_purpose(module):
    assert (ast.get_docstring(house()[module]) or "").strip()


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_functions_are_short():
    lengths = {}
    for name, function in functions().items():
        docstring = ast.get_docstring(function) is not None
        lengths[name] = _lines(function) - (_lines(function.body[0]) if docstring else 0)
    longest = sorted(lengths.items(), key=lambda item: -item[1])[:5]
    too_long = {name for name, lines in lengths.items() if lines > LONGEST}
    assert too_long == set(LONGER), f"the five longest: {longest}"


def public_homes() -> dict[str, str]:
    """The public names of distfit and the modules that `distfit.__getattr__` takes them from."""
    for node in house()[""].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            return ast.literal_eval(node.value)
    raise AssertionError("distfit/__init__.py has no _HOMES")


def public(name: str) -> ast.FunctionDef | ast.ClassDef:
    tree = house()[public_homes()[name].removeprefix("distfit.")]
    found = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name]
    assert len(found) == 1, f"{public_homes()[name]} does not define {name}"
    return found[0]


def parameters(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """What a caller passes: a function's arguments, `__init__`'s, or a dataclass's fields."""
    if isinstance(node, ast.FunctionDef):
        given = node.args
        return [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return [ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)]
    own = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    return [name for item in own for name in parameters(item) if name != "self"]


def section(docstring: str, title: str) -> str:
    """The indented text under "Args:" and its kin; "" without one."""
    found = re.search(rf"^{title}:\n((?:[ \t]+\S.*\n?|\n)+)", docstring, re.MULTILINE)
    return found[1] if found else ""


def test_public_names_are_listed_alike_in_all_three_places():
    tree = house()[""]
    assigned = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    checked = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distfit.")
        for alias in node.names
    }
    listed = ast.literal_eval(assigned["__all__"])
    assert listed == sorted(listed)
    assert set(listed) == set(public_homes()) == checked


# Not made by users (`init` makes it), or made by nobody but distfit's own code.
MADE_ELSEWHERE = {"Session", "DistfitError", "InputError", "RunError"}
REFUSING = {
    *("Checkpoint", "Images", "Jitter", "TFRecords", "TensorBoard", "check", "evaluate", "fit", "init", "predict"),
    *("callback_policies", "chief_only", "on_every_rank", "reduced"),
}
RETURNING = {"check", "chief_only", "evaluate", "fit", "on_every_rank", "predict", "reduced"}


@pytest.mark.parametrize("name", public_homes())
def test_public_names_are_documented(name):
    node = public(name)
    docstring = ast.get_docstring(node) or ""
    assert docstring
    if name not in MADE_ELSEWHERE:
        described = section(docstring, "Args")
        missing = [one for one in parameters(node) if not re.search(rf"\b{one}\b", described)]
        assert missing == []
    assert bool(section(docstring, "Raises")) == (name in REFUSING)
    assert bool(section(docstring, "Returns")) == (name in RETURNING)
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")]
    if isinstance(node, ast.ClassDef):
        if any(ast.unparse(base).startswith("keras.callbacks.") for base in node.bases):
            methods = [method for method in methods if not re.fullmatch(r"(on|set)_\w+", method.name)]  # Keras' own
        assert [method.name for method in methods if not ast.get_docstring(method)] == []


def test_the_design_page_lists_every_module_and_no_other():
    page = (ROOT / "docs" / "design.md").read_text()
    listing = page.split("## The house", 1)[1].split("```", 2)[1]
    shown = re.findall(r"^  (\w+(?:\.py|/)) ", listing, re.MULTILINE)
    assert [name for name in shown if not (ROOT / "distfit" / name).exists()] == []
    assert len(shown) > 15
    names = {module: module.rsplit(".", 1)[-1] for module in rooms() if module != "__main__"}
    assert [module for module, name in names.items() if not re.search(rf"\b{name}\b", listing)] == []


INSIDE = r"(keras\.src|tensorflow\.python|tf\.__internal__)[\w.]*"
# What puts something of ours in a method's place; its second argument is the method.
REPLACING = {"replaced"}
# Underscored, and not with the prefix of what distfit leaves on objects of others.
OTHERS = r"_(?!distfit_)[a-z]\w+"
# Python's own, and the end of a tag of TensorBoard.
NOT_HOOKS = {"_current_frames", "_exit", "_getframe", "_replace", "_vs_iterations"}


def private_hooks() -> set[str]:
    """Names of TensorFlow and Keras that are not public (from inside, or underscored and not ours), or replaced."""
    nodes = [node for tree in house().values() for node in ast.walk(tree)]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    ours = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    ours |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    ours |= {node.attr for node in attributes if ast.unparse(node.value) == "self"}
    named = {node.attr for node in attributes}
    named |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    inside = {node.attr for node in attributes if re.fullmatch(INSIDE, ast.unparse(node.value))}
    inside |= {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and re.fullmatch(INSIDE, node.module or "")
        for alias in node.names
    }
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) in REPLACING]
    replaced = {node.args[1].value for node in calls if isinstance(node.args[1], ast.Constant)}
    return inside | replaced | {name for name in named - ours if re.fullmatch(OTHERS, name)} - NOT_HOOKS


def test_the_table_of_seams_has_every_private_hook():
    from distfit.backends.seams import HOOKS

    parts = {part for hook in HOOKS for part in hook.path.split(".")}
    assert private_hooks() - parts == set(), "add a line to distfit/backends/seams.py"
    assert {"_value", "_flat_losses", "EpochIterator"} <= private_hooks()
