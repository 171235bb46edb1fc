"""Imports point one way, and nothing is imported in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "ltloss": ROOT / "ltloss",
    "ltloss_kernels": ROOT / "kernels" / "ltloss_kernels",
    "benchmarks": ROOT / "benchmarks",
}

GROUND = (
    "margins",
    "numerics",
    "regularizers",
    "class_balance",
    "runtime",
    "reference",
    "_types",
    "_transforms",
    "_validation",
    "_calibration",
)
# (who, must not import): prefixes of module names.
FORBIDDEN = [
    *((f"ltloss.{name}", f"ltloss.{above}") for name in GROUND for above in ("losses", "training")),
    ("ltloss_kernels", "ltloss."),
    ("ltloss_kernels.device", "ltloss_kernels.config"),
    ("ltloss_kernels.config", "ltloss_kernels.device"),
    ("ltloss.chunked", "ltloss.ops"),
    ("ltloss.ops", "ltloss.losses"),
    ("ltloss.ops", "ltloss.functional"),
    ("ltloss.functional", "ltloss.losses"),
    ("ltloss.contrastive", "ltloss.losses"),
    ("ltloss.losses", "ltloss.training"),
    *((f"ltloss.{name}", "ltloss.optim") for name in ("ops", "losses", "distributed")),
    ("ltloss.optim", "ltloss.training"),
    ("ltloss.distributed", "ltloss.training"),
    ("ltloss.distributed", "ltloss.interop"),
    ("ltloss.interop", "ltloss.training"),
    ("ltloss.export", "ltloss.training"),
    *((f"ltloss.{name}", "ltloss.training") for name in ("sklearn", "_estimator")),
    ("ltloss._estimator", "ltloss.sklearn"),
    ("ltloss.losses", "ltloss._estimator"),
    ("ltloss.training.data", "ltloss.training.run"),
    ("ltloss.errors", "ltloss."),
    ("ltloss._files", "ltloss."),
]


def _modules() -> dict[str, Path]:
    found = {}
    for package, root in PACKAGES.items():
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = file
    return found


MODULES = _modules()


def _imports(module: str, *, deferred: bool, types: bool = False) -> Iterator[str]:
    """Modules of ours that a module imports; with ``deferred``, also inside functions; with ``types``, for types."""
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(file.read_text())]
    while pending:
        node = pending.pop()
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not deferred:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if name in MODULES or base in MODULES:
                    yield name if name in MODULES else base
        pending += ast.iter_child_nodes(node)


@cache
def _reached(module: str, *, deferred: bool = False, types: bool = False) -> frozenset[str]:
    """What importing a module imports with it, directly and further on."""
    seen: set[str] = set()
    ahead = [module]
    while ahead:
        new = set(_direct(ahead.pop(), deferred=deferred, types=types)) - seen
        seen |= new
        ahead += new
    return frozenset(seen)


@cache
def _direct(module: str, *, deferred: bool, types: bool) -> frozenset[str]:
    # The package itself names what it imports when that is asked for.
    return frozenset(_imports(module, deferred=deferred, types=types and module != "ltloss"))


@pytest.mark.parametrize(("who", "what"), FORBIDDEN, ids=lambda name: name)
def test_nobody_imports_upwards(who: str, what: str) -> None:
    wrong = [
        f"{module} imports {used}"
        for module in MODULES
        if f"{module}.".startswith(f"{who}.")
        for used in _imports(module, deferred=True)
        if f"{used}.".startswith(what if what.endswith(".") else f"{what}.")
    ]
    assert not wrong, wrong


def test_only_the_command_imports_the_command() -> None:
    using = {
        module for module in MODULES if any(name.startswith("ltloss.cli") for name in _imports(module, deferred=True))
    }
    assert {module for module in using if not module.startswith(("ltloss.cli", "benchmarks."))} == {"ltloss.__main__"}


def test_there_are_no_circles_inside_functions_or_for_types_neither() -> None:
    assert [module for module in MODULES if module in _reached(module, deferred=True, types=True)] == []


def test_the_library_reaches_neither_triton_nor_the_command() -> None:
    roots = ("ltloss.functional", "ltloss.losses.long_tail", "ltloss.losses.cosine_space")
    reached = set().union(*map(_reached, roots))
    wrong = [name for name in reached if name.startswith(("ltloss_kernels", "ltloss.cli", "ltloss.training"))]
    # ltloss_kernels.config reads PyTorch's precision of products, without Triton.
    assert {name for name in wrong if not name.startswith("ltloss_kernels.config")} <= {"ltloss_kernels"}
