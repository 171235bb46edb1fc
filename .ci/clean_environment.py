"""Build wheel and sdist, install each in an empty environment, and run there what README.md and examples/ show.

    python .ci/clean_environment.py [FOLDER]

Needs `pip install build`. FOLDER (a temporary one by default) gets the environments; nothing is imported from the
checkout. `make package` does it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXTRAS = "train,sklearn,lightning,bench"  # what README and examples import
OPTIONS = {"demo": ["--fast"], "toponyms": ["--limit", "300"]}  # the others take seconds as they are
AS_MODULES = {"lightning_module"}  # it says so: it imports its neighbour
WITH_RANKS = {"class_parallel": ["--fsdp"]}


def run(command: list[str | Path], folder: Path) -> None:
    """A command that must succeed, in a folder, without what the caller's environment would add."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    print("$", *(part.name if isinstance(part, Path) else part for part in command), flush=True)
    start = time.monotonic()
    subprocess.run([str(part) for part in command], cwd=folder, env=environment, check=True)
    print(f"  {time.monotonic() - start:.0f} s", flush=True)


def environment(folder: Path, requirement: str) -> Path:
    """The Python of a new environment that has this requirement and what it needs."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", requirement], folder)
    return python


def examples(python: Path, folder: Path) -> None:
    """Every example, as it says that it is run."""
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for file in sorted((folder / "examples").glob("[!_]*.py")):
        name = file.stem
        program: list[str | Path] = ["-m", f"examples.{name}"] if name in AS_MODULES else [file]
        run([python, *program, *OPTIONS.get(name, [])], folder)
        if name in WITH_RANKS:
            ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            run([python, *ranks, file, *WITH_RANKS[name]], folder)


def main() -> None:
    """Build, install, run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="where to put it (default: a temporary folder)")
    given = parser.parse_args().folder
    folder = Path(tempfile.mkdtemp(prefix="ltloss-")) if given is None else given.resolve()
    empty = folder / "empty"
    empty.mkdir(parents=True)
    run([sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT], folder)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    blocks = FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    (empty / "first.py").write_text(blocks[0], encoding="utf-8")
    (empty / "readme.py").write_text("\n".join(blocks), encoding="utf-8")
    where = "import ltloss, sys; assert ltloss.__file__.startswith(sys.prefix), ltloss.__file__"
    for name, requirement, program in (
        ("sdist", f"{sdist}", "first.py"),
        ("wheel", f"ltloss[{EXTRAS}] @ {wheel.as_uri()}", "readme.py"),
    ):
        python = environment(folder / name, requirement)
        run([python, "-c", where], empty)
        run([python, program], empty)
        run([python.with_name("ltloss"), "--version"], empty)
    examples(python, empty)
    if given is None:
        shutil.rmtree(folder)
    print("README.md and examples run from wheel and sdist")


if __name__ == "__main__":
    main()
