"""Which part of the package may import which: one way, without a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "misa_kernels"
# From what knows least to what knows all; `reference` is the oracle, which imports nothing of ours. A part imports from
# parts before it, and its own files from one another; those of `run` have an order, too.
ORDER = [
    ["reference", "clock"],
    ["ranks"],
    ["outside"],
    ["gradients"],
    ["memory", "draw"],
    ["kernels"],
    ["options"],
    ["advice", "monitor"],
    ["run", "run.layout", "run.parts", "run.arrivals"],
    ["run.scores", "run.live", "run.slice_layers"],
    ["run.updater"],
    ["run.ruled"],
    ["run.checkpoint", "run.meeting"],
    ["run.run"],
    ["run.resume"],
    ["interface"],
    ["optimizer", "presets", "rules", "slice_adapters"],
    ["distributed", "tools"],
    ["integrations"],
    ["__init__", "__main__"],
]
# Of a file. About 300 are a smell; one that grows beyond this answers two questions.
LINES = 430
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> Iterator[str]:
    """Yield the modules of ours that a file imports anywhere, within functions and for type checkers, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("misa_kernels."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "misa_kernels":
            assert node.level == 0, f"{path}: relative"
            base = (node.module or "").partition(".")[2]
            for alias in node.names:
                module = f"{base}.{alias.name}" if base else alias.name
                yield module if module in FILES else base or "__init__"


def part_of(module: str) -> str:
    return module if module in LEVEL else module.split(".")[0]


def test_every_part_has_its_place():
    assert {part_of(module) for module in FILES} == set(LEVEL)


def test_no_file_is_longer_than_a_reader_wants():
    lines = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert max(lines.values()) <= LINES, sorted(lines.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    part = part_of(module)
    for imported in imports_of(FILES[module]):
        other = part_of(imported)
        if other == "__init__":
            # The version, and the folder that the package lies in.
            assert LEVEL[part] >= LEVEL["tools"], f"{module} imports the package's own names"
        elif other != part:
            assert LEVEL[other] < LEVEL[part], f"{module} imports {imported}, which comes after it"


def test_no_circle():
    graph = {
        module: {other for other in imports_of(path) if other in FILES and other not in (module, "__init__")}
        for module, path in FILES.items()
    }
    assert list(TopologicalSorter(graph).static_order())


def test_the_oracle_imports_nothing_of_ours():
    assert not list(imports_of(FILES["reference"]))


def private_names(node: ast.AST) -> set[str]:
    """Return the private names that a class gives its objects: methods, attributes, fields."""
    named = {part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
    named |= {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in ("self", "cls")
    }
    named |= {
        part.target.id
        for part in ast.walk(node)
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }
    return {name for name in named if name.startswith("_") and not name.startswith("__")}


def test_nobody_reads_another_object_s_private_fields():
    trees = {path: ast.parse(path.read_text()) for path in FILES.values()}
    classes = {
        (path, node.name): node
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    # torch's modules have `_modules`, too.
    ours = set().union(*map(private_names, classes.values())) - {"_modules"}
    assert len(ours) > 100

    def reads(node: ast.AST, own: set[str]) -> Iterator[str]:
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.ClassDef):
                bases = {base.id for base in part.bases if isinstance(base, ast.Name)}
                kin = [other for (_, name), other in classes.items() if name in bases] + [part]
                yield from reads(part, set().union(*map(private_names, kin)))
                continue
            if isinstance(part, ast.Attribute) and part.attr in ours - own:
                yield f"line {part.lineno}: {ast.unparse(part)}"
            yield from reads(part, own)

    found = {str(path.relative_to(PACKAGE)): list(reads(tree, set())) for path, tree in trees.items()}
    assert not {path: lines for path, lines in found.items() if lines}
