"""The benchmarks import from the examples of this checkout, whatever else is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_another_package_of_this_name_does_not_come_first(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "__init__.py").touch()
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", "import examples.plain_loop; print(examples.__file__)"],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=tmp_path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(ROOT / "examples" / "__init__.py"), done.stderr
