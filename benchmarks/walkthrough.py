"""``python -m benchmarks.walkthrough``: how many calls and files lie between a call of a loss and its kernels.

It runs one training step in Triton's interpreter and looks at the Python stack of every kernel launch. It also counts
how often the source lists the options of the loss. Both are of the checkout in the working directory.
"""

from __future__ import annotations

import ast
import os
import traceback
from pathlib import Path
from unittest import mock

ROOTS = ("ltloss", "kernels")
# One entry per option, with all its names.
_NAMES = """scale angular_margin/angle cosine_margin/cosine angle_multiplier/multiplier label_smoothing ignore_index
    beyond_pi margin_gradient/gradient class_weight normalize_features reduction"""
OPTIONS = [set(names.split("/")) for names in _NAMES.split()]
ENOUGH = 5  # options in one place that count as a list

Call = tuple[str, str]  # file, relative to the checkout, and function


def _calls(root: Path) -> list[Call]:
    """The calls on the stack in the package's own files, outermost first."""
    stack = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
    own = [(path.relative_to(root), name) for path, name in stack if path.is_relative_to(root)]
    return [(str(path), name) for path, name in own if path.parts[0] in ROOTS]


def launches(root: Path) -> dict[str, list[tuple[str, list[Call]]]]:
    """For forward and backward of one step: the kernel of each launch, and the host calls above it."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from triton.runtime.interpreter import GridExecutor

    import ltloss

    phases: dict[str, list[tuple[str, list[Call]]]] = {"forward": [], "backward": []}
    launch, current = GridExecutor.__call__, phases["forward"]

    def recorded(self: GridExecutor, *args: object, **options: object) -> object:
        current.append((self.fn.__name__, _calls(root)))
        return launch(self, *args, **options)

    torch.manual_seed(0)
    head, features = ltloss.ArcFaceLoss(20, 8), torch.randn(4, 8, requires_grad=True)
    with mock.patch.object(GridExecutor, "__call__", recorded), ltloss.use_backend("triton"):
        head(features, torch.arange(4)).backward()  # imports the kernels
        phases["forward"].clear()
        loss = head(features, torch.arange(4))
        current = phases["backward"]
        loss.backward()
    return phases


def _listed(node: ast.AST) -> set[str]:
    """The names in a signature, a call, or the body of a class."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return {one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    if isinstance(node, ast.Call):
        return {one.arg for one in node.keywords if one.arg} | {_name(one) for one in node.args}
    if isinstance(node, ast.ClassDef):
        return {
            one.name if isinstance(one, ast.FunctionDef) else _name(getattr(one, "target", None)) for one in node.body
        }
    return set()


def _name(node: ast.AST | None) -> str:
    return str(getattr(node, "id", getattr(node, "attr", "")))


def option_lists(source: str) -> list[int]:
    """Line numbers of the places that list at least ``ENOUGH`` options of the loss."""
    return [
        node.lineno  # type: ignore[attr-defined]
        for node in ast.walk(ast.parse(source))
        if sum(bool(names & _listed(node)) for names in OPTIONS) >= ENOUGH
    ]


def main() -> int:
    """Print depth, files and lists."""
    root = Path.cwd()
    for phase, found in launches(root).items():
        kernel, calls = max(found, key=lambda one: len(one[1]))
        files = {file for _, stack in found for file, _ in stack}
        print(f"{phase}: at most {len(calls)} host calls ({kernel}), {len(files)} files, {len(found)} launches")
        for file, function in calls:
            print(f"    {file}: {function}")
    lists = {
        str(file.relative_to(root)): lines
        for name in ROOTS
        for file in sorted((root / name).rglob("*.py"))
        if (lines := option_lists(file.read_text()))
    }
    print(f"lists of at least {ENOUGH} options: {sum(map(len, lists.values()))} in {len(lists)} files")
    for name, lines in lists.items():
        print(f"    {name}: {', '.join(map(str, lines))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
