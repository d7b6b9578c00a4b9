"""The rooms of the package: who may import whom, what is public, and what loads with it."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import autoshard

PACKAGE = Path(autoshard.__file__).parent

# A room imports from itself and from rooms above it in this list.
ROOMS = (
    "errors",
    "codec",
    "files",
    "units",
    "installed",
    "host",
    "mesh",
    "hardware",
    "model",
    "processes",
    "layout",
    "graph",
    "cost",
    "search",
    "xla",
    "records",
    "sharding_plan",
    "planner",
    "subject",
    "checking",
    "pipeline",
    "comparison",
    "verification",
    "execution",
    "report",
    "progress",
    "cli",
    "__main__",
)
# A library belongs to the rooms named here; importing it elsewhere, even in a function, is wrong.
LIBRARIES = {
    "keras": {"model"},
    "keras_hub": {"model"},
    "keras_nlp": set(),
    "jax": {"model", "sharding_plan", "xla", "execution"},
    "networkx": {"graph", "search"},
    "scipy": {"search"},
    "platformdirs": {"xla"},
    "tabulate": {"report"},
    "click": {"cli"},
}
LOADED_ONLY_WHEN_USED = (
    "keras",
    "keras_hub",
    "keras_nlp",
    "jax",
    "networkx",
    "scipy",
    "tensorflow",
)
MAX_LINES = 400

MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = ("autoshard", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """`autoshard.hardware.links` -> `hardware`; the package itself -> ``."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Every (module, name) that a file imports, at any depth; the name is `` for `import x`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            yield from ((node.module or "", alias.name) for alias in node.names)


def own_imports(path: Path) -> Iterator[tuple[str, str]]:
    for module, name in imports(path):
        if module == "autoshard" and name in ROOMS:
            yield f"autoshard.{name}", ""
        elif module.split(".")[0] == "autoshard":
            yield module, name


def top_level(path: Path) -> tuple[set[str], set[str], list[str]]:
    """The public definitions of a module, its type aliases (`Spec = ...`), and its `__all__`."""
    names: set[str] = set()
    aliases: set[str] = set()
    listed: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            leaves = [leaf for target in targets for leaf in ast.walk(target)]
            found = {leaf.id for leaf in leaves if isinstance(leaf, ast.Name)}
            if "__all__" in found and node.value is not None:
                listed = ast.literal_eval(node.value)
            aliases |= {name for name in found if name[0].isupper() and not name.isupper()}
            names |= found
    public = {name for name in names if not name.startswith("_")}
    return public - aliases, aliases, listed


def test_every_module_belongs_to_a_room() -> None:
    rooms = {room_of(module_name(path)) for path in MODULES}
    assert rooms - {""} <= set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    room = room_of(module_name(path))
    allowed = set(ROOMS) if room == "" else {*ROOMS[: ROOMS.index(room) + 1]}
    # `from autoshard import __version__` is the one thing that the package gives its rooms.
    wrong = [
        f"{module} {name}"
        for module, name in own_imports(path)
        if room_of(module) not in allowed and (module, name) != ("autoshard", "__version__")
    ]
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_room_uses_no_private_name_of_another(path: Path) -> None:
    room = room_of(module_name(path))
    foreign = [(m, name) for m, name in own_imports(path) if room_of(m) not in ("", room)]
    private = [
        f"{module}.{name}"
        for module, name in foreign
        if any(part.startswith("_") for part in f"{module}.{name}".split(".") if part)
    ]
    assert not private


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_library_is_imported_only_in_the_rooms_that_own_it(path: Path) -> None:
    room = room_of(module_name(path))
    used = {module.split(".")[0] for module, _ in imports(path)}
    assert not [library for library in used if room not in LIBRARIES.get(library, {room})]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_all_lists_the_public_names_and_nothing_private(path: Path) -> None:
    names, aliases, listed = top_level(path)
    room = room_of(module_name(path))
    # A module may pass on names of its own room, and the package those of all its rooms.
    passed_on = {name for module, name in own_imports(path) if room in ("", room_of(module))}
    assert len(listed) == len(set(listed))
    assert not names - set(listed)
    assert not set(listed) - names - aliases - passed_on - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_what_a_room_imports_of_another_is_listed_there(path: Path) -> None:
    room = room_of(module_name(path))
    unlisted = []
    for module, name in own_imports(path):
        home = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        if name and room_of(module) not in ("", room) and home.exists():
            unlisted += [] if name in top_level(home)[2] else [f"{module}.{name}"]
    assert not unlisted


@pytest.mark.parametrize("name", autoshard.__all__)
def test_every_public_name_of_the_package_is_there(name: str) -> None:
    assert getattr(autoshard, name) is not None
    assert name in dir(autoshard)


def test_what_public_functions_raise_can_be_caught_by_its_public_name() -> None:
    public = [getattr(autoshard, name) for name in autoshard.__all__]
    documented = [*filter(callable, public), *vars(autoshard.Plan).values()]
    texts = [inspect.getdoc(getattr(one, "__func__", one)) or "" for one in documented]
    raised = {
        name for text in texts for name in re.findall(r"^    (\w+Error): ", text, re.MULTILINE)
    }
    assert {"NothingFitsError", "MeshError"} <= raised <= set(autoshard.__all__)


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'autoshard' has no attribute 'plans'"):
        autoshard.plans  # noqa: B018


@pytest.mark.parametrize("module", ["autoshard", "autoshard.cli"])
def test_importing_loads_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert not set(LOADED_ONLY_WHEN_USED) & set(result.stdout.split())


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_module_is_longer_than_a_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
