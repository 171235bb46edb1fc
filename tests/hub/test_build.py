"""The loss head as a kernel of the Hugging Face hub: whole, without absolute imports, beside other builds of itself."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hub import build
from torch import nn

import ltloss
from ltloss import functional


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build.build(tmp_path_factory.mktemp("hub"))


def _described(package: Path) -> dict[str, Any]:
    return json.loads((package / "metadata.json").read_text())


@pytest.fixture(scope="module")
def loaded(packages: dict[str, Path]) -> dict[str, ModuleType]:
    """As ``kernels`` does: under the id of the build."""
    modules = {}
    for backend, package in packages.items():
        name = _described(package)["id"]
        spec = importlib.util.spec_from_file_location(name, package / "__init__.py")
        modules[backend] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[backend])
    return modules


def test_it_computes_the_same_where_ltloss_cannot_be_imported(packages: dict[str, Path]) -> None:
    """Against float64, in a process of its own, which fails if a module of ours is there in the end."""
    folder = packages["cpu"].parents[1]
    done = subprocess.run(
        [sys.executable, build.HERE / "check.py", folder, "torch"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("by hand", "d loss/dx", "d layer/dw", "AMSoftmaxLoss", "nearest", "top_k"):
        assert f"{name} " in done.stdout


def test_the_encoding_of_the_machine_does_not_count(packages: dict[str, Path], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", f"from hub import build; build.build(build.Path({str(tmp_path)!r}))"],
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(build.HERE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert _described(tmp_path / "build" / "torch-cpu") == _described(packages["cpu"])


def test_only_relative_imports_of_itself(packages: dict[str, Path]) -> None:
    """And beside those PyTorch, Triton, NumPy and the standard library."""
    allowed = {*sys.stdlib_module_names, "torch", "triton", "numpy"}
    files = list(packages["cpu"].rglob("*.py"))
    assert len(files) > 50
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                used = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                used = {str(node.module).partition(".")[0]}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                used = (
                    {"ltloss"} if "ltloss." in ast.unparse(node) and "__package__" not in ast.unparse(node) else set()
                )
            else:
                continue
            assert used <= allowed, f"{file}, line {node.lineno}: {used - allowed}"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_import_is_there(packages: dict[str, Path], loaded: dict[str, ModuleType]) -> None:
    """Inside functions too, but for those of a type checker. Classes over ranks are not part of it."""
    package, name = packages["cpu"], loaded["cpu"].__name__
    for file in package.rglob("*.py"):
        inside = ".".join((name, *file.relative_to(package).parent.parts))
        pending: list[ast.AST] = [ast.parse(file.read_text())]
        while pending:
            node = pending.pop()
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            pending += ast.iter_child_nodes(node)
            if isinstance(node, ast.ImportFrom) and node.level:
                module = importlib.import_module("." * node.level + (node.module or ""), inside)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.util.find_spec(f"{module.__name__}.{alias.name}")
    folders = {file.name for file in package.iterdir() if file.is_dir()} - {"__pycache__"}
    assert folders == {"chunked", "ltloss", "ltloss_kernels", "ops"}


def test_builds_stand_side_by_side(loaded: dict[str, ModuleType]) -> None:
    """Two builds and ltloss in one process: operators of their own, switches of their own, the same values."""
    features, prototypes, labels = torch.randn(6, 8), torch.randn(40, 8, requires_grad=True), torch.arange(6)
    given = {"scale": 16.0, "angular_margin": 0.3}

    def outcome(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss = module.margin_cross_entropy(features, prototypes, labels, **given)
        return loss, *torch.autograd.grad(loss, prototypes)

    with ltloss.use_backend("torch"):
        expected = outcome(functional)
    for backend, module in loaded.items():
        name = module.__name__
        assert name.startswith(f"_ltloss_{backend}_")
        assert module.margin_cross_entropy.__module__ == f"{name}.functional"
        operators = [operator.name() for operator in sys.modules[f"{name}.ops._dispatch"].IMPLEMENTATIONS]
        assert len(operators) > 10
        assert all(operator.startswith(f"{name}::") for operator in operators)
        with module.use_backend("reference"):
            assert ltloss.current_backend() != "reference"
        for found, known in zip(outcome(module), expected, strict=True):
            assert torch.equal(found, known)
    assert len({module.__name__ for module in loaded.values()}) == 2


def test_layers_have_a_forward_and_nothing_else(loaded: dict[str, ModuleType]) -> None:
    """What ``kernels.kernelize`` asks of a layer."""
    layers = loaded["cpu"].layers
    for name in layers.__all__:
        layer = getattr(layers, name)
        assert issubclass(layer, nn.Module)
        assert layer.__init__ is nn.Module.__init__
        own = {member for member, _ in inspect.getmembers(layer)} - {
            member for member, _ in inspect.getmembers(nn.Module)
        }
        assert own <= {"can_torch_compile", "has_backward"}
        assert len(inspect.signature(layer.forward).parameters) == 3


@pytest.mark.slow
def test_layers_compile_in_one_graph(loaded: dict[str, ModuleType]) -> None:
    """``can_torch_compile`` says so."""
    features, labels = torch.randn(4, 8), torch.arange(4)
    for name, own in (
        ("CombinedMarginLoss", {"angular_margin": 0.3, "cosine_margin": 0.1}),
        ("AMSoftmaxLoss", {"margin": 0.2}),
    ):
        layer = getattr(loaded["cpu"].layers, name)
        module = layer()
        module.weight = nn.Parameter(torch.randn(40, 8) if name == "CombinedMarginLoss" else torch.randn(8, 40))
        vars(module).update(scale=16.0, **own)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        found, expected = (torch.autograd.grad(each(features, labels), module.weight)[0] for each in (compiled, module))
        torch.testing.assert_close(found, expected)


def test_metadata_describes_the_files(packages: dict[str, Path]) -> None:
    ids = set()
    for backend, package in packages.items():
        described = _described(package)
        assert described["backend"] == {"type": backend}
        assert described["name"] == "ltloss"
        assert (package / "ltloss" / "__init__.py").is_file()
        for name, digest in described["digest"]["files"].items():
            assert base64.b64decode(digest) == hashlib.sha256((package / name).read_bytes()).digest()
        found = {str(file.relative_to(package)) for file in package.rglob("*") if file.is_file()}
        assert {name for name in found if "__pycache__" not in name} == {*described["digest"]["files"], "metadata.json"}
        ids.add(described["id"].removeprefix(f"_ltloss_{backend}_"))
    (content,) = ids
    assert len(content) == 7


def test_other_content_has_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: dict[str, Path]
) -> None:
    monkeypatch.setattr(build, "ALONGSIDE", ("LICENSE",))
    other = build.build(tmp_path)
    assert _described(other["cpu"])["id"] != _described(packages["cpu"])["id"]
    again = build.build(tmp_path)
    assert _described(again["cpu"]) == _described(other["cpu"])


@pytest.mark.parametrize(
    ("source", "place", "expected"),
    [
        ("from ltloss.ops.labels import a\n", "functional.py", "from .ops.labels import a\n"),
        ("from ltloss import functional as F\n", "layers.py", "from . import functional as F\n"),
        ("from ltloss.errors import (\n    A,\n)\n", "ops/x.py", "from ..errors import (\n    A,\n)\n"),
        ("from ltloss_kernels.device import a\n", "ltloss_kernels/x.py", "from ..ltloss_kernels.device import a\n"),
        (
            "def f():\n    import ltloss_kernels  # é\n",
            "ops/x.py",
            "def f():\n    from .. import ltloss_kernels  # é\n",
        ),
        (
            "a = 'é', importlib.import_module('ltloss_kernels.running')\n",
            "ops/x.py",
            "a = 'é', importlib.import_module('..ltloss_kernels.running', __package__)\n",
        ),
        (
            'importlib.import_module(f"ltloss.distributed.{module}")\n',
            "ops/x.py",
            'importlib.import_module(f"..distributed.{module}", __package__)\n',
        ),
        (
            "from ltloss_other import a\nimport importlib\nimportlib.import_module(f'{__name__}.x')\n",
            "x.py",
            "from ltloss_other import a\nimport importlib\nimportlib.import_module(f'{__name__}.x')\n",
        ),
    ],
)
def test_imports_become_relative(source: str, place: str, expected: str) -> None:
    assert build.relative(source, Path(place)) == expected


@pytest.mark.parametrize("source", ["import ltloss\n", "x = 1\nimport ltloss_kernels.running\n"])
def test_an_import_without_a_relative_form_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"x\.py, line \d: import ltloss"):
        build.relative(source, Path("ops/x.py"))
