"""What the documentation shows runs: docstring examples, README.md and docs/*.md; and every public name has one."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import pkgutil
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ltloss

ROOT = Path(__file__).parents[2]
NEEDS_EXTRAS = {"matplotlib", "PIL", "sklearn", "safetensors", "tqdm", "tomli"}


def module_names() -> list[str]:
    found = [info.name for info in pkgutil.walk_packages(ltloss.__path__, "ltloss.")]
    return ["ltloss", *(name for name in found if not name.endswith("__main__"))]


def imported(name: str) -> types.ModuleType:
    """A module of the package; the test is skipped where an extra that it needs is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in NEEDS_EXTRAS:
            pytest.skip(f"needs {error.name}")
        raise


@pytest.mark.parametrize("name", module_names())
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an example may write files
    module = imported(name)
    if name == "ltloss.interop.safetensors":
        pytest.importorskip("safetensors")  # imported on use
    with torch.random.fork_rng():
        failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def public_objects() -> Iterator[tuple[str, Any]]:
    """Functions and classes that users are meant to call, by the ``__all__`` of the modules that serve them."""
    modules = [ltloss, ltloss.functional, ltloss.class_balance]
    names = ("margins", "losses.class_centers", "distributed", "interop", "export", "extend", "optim", "testing")
    names += ("interop.insightface", "interop.pytorch_metric_learning", "contrastive", "sub_centers")
    names += ("sklearn",) if importlib.util.find_spec("sklearn") else ()
    modules += [importlib.import_module(f"ltloss.{name}") for name in names]
    for module in modules:
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing) or (inspect.isclass(thing) and not issubclass(thing, tuple)):
                yield f"{module.__name__}.{name}", thing


@pytest.mark.parametrize(
    ("name", "thing"), list(public_objects()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_public_name_has_an_example(name: str, thing: Any) -> None:
    assert thing.__doc__, f"{name} has no docstring"
    assert ">>>" in thing.__doc__, f"{name} has no example"


# Their first line says what they return.
RETURNS_IN_ONE_LINE = {name for name in ltloss.runtime.__all__ if name.startswith("current_")} | {"takes_soft_labels"}


def parameters_of(thing: Any) -> list[inspect.Parameter]:
    found = inspect.signature(thing).parameters.values()
    return [one for one in found if one.name not in ("args", "kwargs")]


# Their docstrings name the object or the function that has the same options.
REFERS = {"ClassParallel", "LargeMarginSoftmaxLoss", "PrototypeSGD"}


def source_of(thing: Any) -> str:
    """Empty where Python wrote it, as the constructor of a dataclass."""
    try:
        return inspect.getsource(thing)
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("name", "thing"), list(public_objects()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_public_name_says_what_a_reader_asks(name: str, thing: Any) -> None:
    """Each argument, the shapes of tensors, the result, the errors, and what else there is."""
    said, short = thing.__doc__, name.rpartition(".")[2]
    parameters = [] if issubclass(thing if inspect.isclass(thing) else int, Exception) else parameters_of(thing)
    missing = [one.name for one in parameters if not re.search(rf"\b{one.name}\b", said)]
    assert not missing or short in REFERS, "arguments without a word"
    if any("Tensor" in str(one.annotation) for one in parameters):
        assert re.search(r"\([A-Z][^)]*,[^)]*\)|any shape", said), "no shape of a tensor"
    if inspect.isfunction(thing) and str(inspect.signature(thing).return_annotation) != "None":
        assert "Returns:" in said or short in RETURNS_IN_ONE_LINE
    body = vars(thing).get("__init__") if inspect.isclass(thing) else thing
    if body is not None and re.search(r"raise |check_\w+\(", source_of(body)):
        assert "Raises:" in said
    assert "See also: " in said


ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|obj|exc):`~?([\w.]+)`")


def documented(module: types.ModuleType) -> Iterator[tuple[Any, str]]:
    """What a module defines, with its docstring, and the class that each method is in."""
    yield module, module.__doc__ or ""
    for thing in vars(module).values():
        if getattr(thing, "__module__", None) == module.__name__ and isinstance(thing, type | types.FunctionType):
            yield thing, thing.__doc__ or ""
            for method in vars(thing).values() if isinstance(thing, type) else ():
                yield thing, getattr(method, "__doc__", None) or ""


def resolves(name: str, module: types.ModuleType, owner: Any) -> bool:
    for start in (owner, module):
        found = start
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return True
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("name", module_names())
def test_names_in_docstrings_exist(name: str) -> None:
    module = imported(name)
    unknown = [
        one for owner, said in documented(module) for one in ROLE.findall(said) if not resolves(one, module, owner)
    ]
    assert not unknown


@pytest.mark.parametrize("name", [name for name in module_names() if not name.startswith("ltloss.training")])
def test_everything_says_what_it_is(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for attribute in getattr(module, "__all__", ()):
        thing = getattr(module, attribute)
        if isinstance(thing, types.FunctionType | type):
            assert thing.__doc__, f"{name}.{attribute}"


@pytest.mark.parametrize("name", [*ltloss.functional.__all__, *ltloss.contrastive.__all__])
def test_reference_twins_have_the_same_signature(name: str) -> None:
    public = ltloss.contrastive if name in ltloss.contrastive.__all__ else ltloss.functional
    ours, twin = (inspect.signature(getattr(m, name)) for m in (public, ltloss.reference))
    wanted = [part for part in ours.parameters.items() if part[0] not in ("shard", "update")]  # a twin is dense
    assert wanted == list(twin.parameters.items())


FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_examples_of_the_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ```python block, in order and in one namespace per page."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "example"}
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(1))
        code = compile("\n" * line + match[1], str(page.name), "exec")  # errors then name the line of the page
        exec(code, namespace)
