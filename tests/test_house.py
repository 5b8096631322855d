"""The order of the house: who may import whom, and how much a function may ask for."""

import ast
import pathlib
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Ground first; rooms of one floor may not import each other.
FLOORS = (
    {"digest", "progress", "devices", "intervals", "reading"},
    {"model", "prompts"},
    {"records"},
    {"parallel"},
    {"rows"},
    {"kernels"},
    {"io", "plan"},
    {"chat"},
    {"report"},
    {"evaluation"},
    {"study"},
    {"methods"},
    {"configs"},
    {"launch"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted([*(ROOT / "jaxsafe").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    parts = module.split(".")
    return "launch" if parts[0] == "launch" else parts[1] if len(parts) > 1 else ""


def imports_of(path):
    """Modules that a file imports when it runs; what stands under TYPE_CHECKING is for readers alone."""
    tree = ast.parse(path.read_text())
    unread = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    known = {module_of(file) for file in FILES}
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.ImportFrom):
            folder = module_of(path.parent / "x").split(".")[: -node.level] if node.level else []
            module = ".".join([*folder, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield whole if whole in known else module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


EDGES = {module_of(path): {m for m in imports_of(path) if m.split(".")[0] in ("jaxsafe", "launch")} for path in FILES}


def test_every_folder_is_installed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        path.parent.relative_to(ROOT)
        for room in ("jaxsafe", "launch", "configs")
        for path in (ROOT / room).rglob("*.py")
    }
    outside = {folder: name for name, folder in setuptools["package-dir"].items()}
    names = {".".join((outside.get(folder.parts[0], folder.parts[0]), *folder.parts[1:])) for folder in folders}
    assert set(setuptools["packages"]) == names


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module in EDGES} - {""}
    assert rooms <= FLOOR.keys(), f"rooms without a floor: {sorted(rooms - FLOOR.keys())}"


def test_nothing_imports_upwards():
    for module, imported in EDGES.items():
        for other in imported:
            here, there = room_of(module), room_of(other)
            if not here or not there or here == there:
                continue  # the package itself opens every room, and a version is no room
            assert FLOOR[there] < FLOOR[here], f"{module} ({here}) imports {other} ({there})"


def test_files_and_folders_have_no_circle():
    files = {module: {m for m in imported if m in EDGES and m != module} for module, imported in EDGES.items()}
    files["jaxsafe"] = set()  # its names are looked up when they are used
    left = dict(files)
    while free := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"files that import each other: {sorted(left)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_asks_for_more_than_seven_things(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef):
            continue
        arguments = node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        names = [name for name in names if name not in ("self", "cls")]
        assert len(names) <= 7, f"{path.name}:{node.lineno} {node.name} has {len(names)} parameters"
