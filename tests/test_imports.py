"""The import rule of docs/architecture.md: a module imports its own room and lower floors, never upwards."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "eat_dist"
FLOORS = [
    {"config", "registry", "batch", "errors", "seeding", "storage", "bucket", "credentials", "provenance", "cpus"},
    {"losses", "attacks", "metrics", "spaces"},
    {"inference", "models", "data", "robustness"},
    {"exchange", "optimisation", "pyfunc_model", "replicas", "schedule"},
    {"defenses"},
    {"checkpoint", "history", "member", "evaluation"},
    {"in_process", "embedding", "console", "tracking", "report", "cluster"},
    {"runs"},
    {"sweeps", "studies"},
    {"cli", "cli_compare", "cli_data", "cli_study", "cli_submit", "cli_sweep", "__main__"},
]
# Rooms of one floor know nothing of each other, but for the loop of a member, which saves and records itself.
ALLOWED_WITHIN_A_FLOOR = {
    ("member", "checkpoint"),
    ("member", "history"),
    ("models", "inference"),
    ("cli", "cli_data"),
    ("cli", "cli_compare"),
    ("cli", "cli_submit"),
    ("cli", "cli_sweep"),
    ("cli", "cli_study"),
    ("cli_study", "cli_sweep"),
    ("cli_submit", "cli_sweep"),
    ("storage", "bucket"),
    ("config", "credentials"),
} | {
    (room, helper)
    for room in ("config", "registry", "storage", "bucket", "batch", "seeding", "__main__")
    for helper in ("errors", "cli")
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms)


def imported(module: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_a_module_imports_its_own_room_and_lower_floors_only(module: Path) -> None:
    if module == PACKAGE / "__init__.py":
        assert not imported(module)
        return
    room = room_of(module)
    for name in imported(module):
        parts = name.split(".")
        if parts[0] != "eat_dist" or len(parts) == 1:
            continue
        other = parts[1]
        if other in ("__version__", room) or (room, other) in ALLOWED_WITHIN_A_FLOOR:
            continue
        assert floor_of(other) < floor_of(room), f"{room} (floor {floor_of(room)}) imports {other} ({floor_of(other)})"


@pytest.mark.parametrize(("library", "room"), [("ray", "cluster"), ("mlflow", "tracking")])
def test_only_one_room_imports(library: str, room: str) -> None:
    importing = {room_of(module) for module in MODULES if any(n.split(".")[0] == library for n in imported(module))}

    assert importing == {room}


def test_every_module_has_a_floor() -> None:
    rooms = {room_of(module) for module in MODULES} - {"__init__"}

    assert rooms == set().union(*FLOORS)
