"""The house has floors: what stands on one knows only what is below it, or beside it in its own room."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = (
    (
        *("pipeline.cpu", "pipeline.documents", "pipeline.drain", "pipeline.errors", "pipeline.exit_codes"),
        *(
            "pipeline.files",
            "pipeline.handover",
            "pipeline.hashes",
            "pipeline.ipc",
            "pipeline.library_logs",
            "pipeline.pages",
        ),
        *("pipeline.parallel", "pipeline.processes", "pipeline.progress", "pipeline.redaction"),
        *(
            "pipeline.starting",
            "pipeline.stopping",
            "pipeline.streams",
            "pipeline.tables",
            "pipeline.targets",
            "pipeline.watchdog",
        ),
    ),
    ("pipeline.stores",),
    (
        *(
            "pipeline.corpus",
            "pipeline.hidden",
            "pipeline.hub",
            "pipeline.models",
            "pipeline.options",
            "pipeline.ownership",
            "pipeline.probe",
        ),
        *("pipeline.settings", "pipeline.spelling", "pipeline.tokenizer", "pipeline.vocabulary", "pipeline.weights"),
    ),
    ("pipeline.formats", "pipeline.approximate", "pipeline.sketch"),
    ("pipeline.cache",),
    ("pipeline.inspection", "pipeline.lifecycle", "pipeline.selection"),
    ("pipeline.runs",),
    ("pipeline.launch",),
    ("stages.prepare", "stages.cache_logits", "stages.train_student"),
    ("stages.demo", "stages.estimate", "pipeline.cli", "pipeline.submit"),
)
"""The lowest first. A room is a package, or a module beside the packages; those of one floor are listed together."""
APART = ({"stages.prepare", "stages.cache_logits", "stages.train_student"}, {"pipeline.lifecycle", "pipeline.runs"})
"""Rooms that know nothing of each other: what stages share is a corpus or the manifest of a cache."""
FACADES = ("pipeline", "stages")
"""Packages of packages, whose own file is on no floor."""


def arrows() -> Iterator[tuple[str, str]]:
    """Which module imports which, anywhere in it, as two dotted names."""
    modules = {name_of(path): path for folder in ("pipeline", "stages") for path in (ROOT / folder).rglob("*.py")}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                imported = [module if module in modules else node.module for module in full]
            for module in imported:
                if module.partition(".")[0] in FACADES:
                    yield name, module


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_every_module_is_on_a_floor():
    rooms = {room_of(name) for name, _ in arrows()} - set(FACADES)
    listed = [room for floor in FLOORS for room in floor]
    assert rooms <= set(listed)
    assert len(listed) == len(set(listed))
    missing = [
        room for room in listed if not any((ROOT / room.replace(".", "/")).parent.glob(room.split(".")[1] + "*"))
    ]
    assert missing == []


def test_no_arrow_points_upwards():
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    upwards = [
        f"{name} imports {module}"
        for name, module in arrows()
        if name not in FACADES and floor_of[room_of(module)] > floor_of[room_of(name)]
    ]
    assert upwards == []


def test_rooms_that_stand_apart_do_not_know_each_other():
    pairs = ((name, module, {room_of(name), room_of(module)}) for name, module in arrows())
    assert [
        f"{name} imports {module}"
        for name, module, rooms in pairs
        if len(rooms) == 2 and any(rooms <= apart for apart in APART)
    ] == []


def test_no_module_imports_itself_in_a_circle():
    targets: dict[str, set[str]] = {}
    for name, module in arrows():
        targets.setdefault(name, set()).add(module)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for module in sorted(targets.get(name, ())):
                visit(module, (*path, name))
            done.add(name)

    for name in sorted(targets):
        visit(name, ())


def test_floors_are_those_of_the_document():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.search(r"\| floor.*?\n\n", text, re.DOTALL)[0].splitlines()[2:]
    written = [sorted(re.findall(r"`([a-z_.]+)`", row)) for row in reversed(rows) if row]
    assert written == [sorted(room.removeprefix("pipeline.") for room in floor) for floor in FLOORS]
