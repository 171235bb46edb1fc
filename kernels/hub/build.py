"""Write the loss head as Hugging Face's hub wants its kernels, and load it from there: ``make hub``.

    python kernels/hub/build.py [FOLDER]

``FOLDER``, ``build/hub`` by default, gets ``build.toml``, ``CARD.md`` and one package for each backend in ``build/``. A
package is what ``package/`` has, the modules of ``ltloss`` that this imports, and all of ``ltloss_kernels``, with every
import of them made relative. Its files are the same for each backend: they are Python.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = {"ltloss": ROOT / "ltloss", "ltloss_kernels": HERE.parent / "ltloss_kernels"}
ALONGSIDE = ("LICENSE", "NOTICE")


def module_file(module: str) -> Path | None:
    """The file of a module of ours; None if the name is no module."""
    package, *parts = module.split(".")
    place = SOURCES[package].joinpath(*parts)
    candidates = (place / "__init__.py", place.with_suffix(".py"))
    return next((file for file in candidates if file.is_file()), None)


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of ours that a file imports, inside functions too; imports under ``TYPE_CHECKING`` do not count."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in SOURCES)
        elif isinstance(node, ast.ImportFrom) and _ours(node.module):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending += ast.iter_child_nodes(node)


def _ours(module: object) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in SOURCES


def needed() -> dict[Path, Path]:
    """Every file of the package: its place in the package -> where it is now."""
    files = {file.relative_to(HERE / "package"): file for file in sorted((HERE / "package").rglob("*.py"))}
    pending = [name for file in files.values() for name in imports(ast.parse(file.read_text(encoding="utf-8")))]
    kernels = SOURCES["ltloss_kernels"]
    files |= {file.relative_to(kernels.parent): file for file in sorted(kernels.rglob("*.py"))}
    while pending:
        module = pending.pop()
        file = module_file(module)
        if file is None or not module.startswith("ltloss."):
            continue
        place = file.relative_to(SOURCES["ltloss"])
        if place not in files:
            files[place] = file
            pending += [module.rpartition(".")[0], *imports(ast.parse(file.read_text(encoding="utf-8")))]
    return files


def relative(source: str, place: Path) -> str:
    """The text of a file of the package with every import of ours made relative, and nothing else changed.

    Raises:
        ValueError: an import has no relative form, as ``import ltloss`` or ``import ltloss.functional``.
    """
    lines = [line.encode() for line in source.splitlines(keepends=True)]  # ast counts columns in bytes
    dots = b"." * len(place.parts)
    edits: list[tuple[int, int, int, bytes]] = []  # line, from, to, text
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _ours(node.module):
            start = node.col_offset + len("from ")
            text = dots + _inside(str(node.module)).encode()
            edits.append((node.lineno, start, start + len(str(node.module)), text))
        elif isinstance(node, ast.Import) and any(map(_ours, (alias.name for alias in node.names))):
            (alias,) = node.names
            if not _inside(alias.name) or "." in alias.name:
                raise ValueError(f"{place}, line {node.lineno}: import {alias.name} has no relative form")
            edits.append((node.lineno, node.col_offset, node.col_offset, b"from " + dots + b" "))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "import_module":
            (name,) = node.args
            written = ast.unparse(name).lstrip("f")[1:-1]  # a string, or one that is formatted
            if _ours(written):
                start, stop = name.col_offset + isinstance(name, ast.JoinedStr) + 1, int(name.end_col_offset or 0)
                edits.append((node.lineno, start, start + len(written), dots + _inside(written).encode()))
                edits.append((node.lineno, stop, stop, b", __package__"))
    for line, start, stop, text in sorted(edits, reverse=True):
        lines[line - 1] = lines[line - 1][:start] + text + lines[line - 1][stop:]
    return b"".join(lines).decode()


def _inside(module: str) -> str:
    """The name of a module relative to the package; empty for ``ltloss``, which is the package itself."""
    return "" if module == "ltloss" else module.removeprefix("ltloss.")


def build(folder: Path) -> dict[str, Path]:
    """Write everything; return the folder of each backend's package."""
    general: dict[str, Any] = tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))["general"]
    files = {place: relative(file.read_text(encoding="utf-8"), place).encode() for place, file in needed().items()}
    files |= {Path(name): (ROOT / name).read_bytes() for name in ALONGSIDE}
    content = hashlib.sha256(b"".join(place.as_posix().encode() + files[place] for place in sorted(files))).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("build.toml", "CARD.md"):
        shutil.copy(HERE / name, folder)
    packages = {backend: folder / "build" / f"torch-{backend}" for backend in general["backends"]}
    for backend, package in packages.items():
        shutil.rmtree(package, ignore_errors=True)
        for place, text in files.items():
            (package / place).parent.mkdir(parents=True, exist_ok=True)
            (package / place).write_bytes(text)
        described = {
            "id": f"_{general['name']}_{backend}_{content[:7]}",  # the name of the module, and of its operators
            **{key: general[key] for key in ("name", "version", "license")},
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {
                "algorithm": "sha256",
                "files": {place.as_posix(): _digest(files[place]) for place in sorted(files)},
            },
        }
        (package / "metadata.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return packages


def _digest(text: bytes) -> str:
    return base64.b64encode(hashlib.sha256(text).digest()).decode()


def main(folder: Path) -> int:
    """Build, print what was built, and check it in separate processes: in PyTorch, and with the kernels."""
    for package in build(folder).values():
        described = json.loads((package / "metadata.json").read_text(encoding="utf-8"))
        print(f"{package}: {len(described['digest']['files'])} files, operators in torch.ops.{described['id']}")
    backends = ["torch", *(["triton"] if importlib.util.find_spec("triton") else [])]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    for backend in backends:
        done = subprocess.run([sys.executable, HERE / "check.py", folder, backend], env=environment, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(*sys.argv[1:]) if sys.argv[1:] else ROOT / "build" / "hub"))
