"""The two switches, and what importing the package brings in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.refusals import missing, refused
from torch.utils._python_dispatch import TorchDispatchMode

import ltloss
from ltloss.functional import margin_cross_entropy, nearest_prototype, top_k
from ltloss.ops import labels as labels_operator
from ltloss.testing import problem

ROOT = Path(__file__).parents[2]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process that finds the checkout."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def output(code: str, **environment: str) -> str:
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestUseBackend:
    def test_as_context_manager(self) -> None:
        before = ltloss.current_backend()
        with ltloss.use_backend("reference") as outer:
            assert isinstance(outer, ltloss.use_backend)
            assert ltloss.current_backend() == "reference"
            with ltloss.use_backend("torch"):
                assert ltloss.current_backend() == "torch"
            assert ltloss.current_backend() == "reference"
        assert ltloss.current_backend() == before

    def test_an_error_inside_restores_it(self) -> None:
        before = ltloss.current_backend()
        with pytest.raises(KeyError), ltloss.use_backend("reference"):
            raise KeyError
        assert ltloss.current_backend() == before

    def test_as_statement(self) -> None:
        with ltloss.use_backend("auto"):
            ltloss.use_backend("torch")
            assert ltloss.current_backend() == "torch"
        assert ltloss.current_backend() == "auto"

    def test_unknown_name(self) -> None:
        before = ltloss.current_backend()
        with refused("backend", "auto", "triton", "torch", "reference", "'cuda'"):
            ltloss.use_backend("cuda")
        assert ltloss.current_backend() == before

    def test_reference_is_dense(self) -> None:
        """It really is another implementation: no operator of ours runs."""

        class Refused(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                assert func.namespace != "ltloss"
                return func(*args, **(kwargs or {}))

        with ltloss.use_backend("reference"), Refused():
            given = problem()
            margin_cross_entropy(*given)
            nearest_prototype(given.prototypes)
            top_k(given.features, given.prototypes)
        with pytest.raises(AssertionError), ltloss.use_backend("torch"), Refused():
            margin_cross_entropy(*given)


class TestDebug:
    def test_switch(self) -> None:
        before = ltloss.current_debug()
        with ltloss.debug_labels():
            assert ltloss.current_debug()
            with ltloss.debug_labels(False):
                assert not ltloss.current_debug()
            with pytest.raises(IndexError), ltloss.debug_labels(False):
                [][0]
            assert ltloss.current_debug()
            ltloss.set_debug(False)
            assert not ltloss.current_debug()
        assert ltloss.current_debug() == before

    def test_labels_on_the_cpu_are_always_checked(self) -> None:
        given = problem()
        with ltloss.debug_labels(False), pytest.raises(IndexError):
            margin_cross_entropy(given.features, given.prototypes, given.labels + 9)

    def test_unchecked_labels_are_never_read_out_of_bounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a GPU does: a bad label makes its sample NaN (or counts for nothing), and the others are right."""
        given = problem(4, 6, 3, ignored=False)
        expected = margin_cross_entropy(*given, angular_margin=torch.ones(6), reduction="none")
        monkeypatch.setattr(labels_operator, "check_label_range", lambda *_: None)
        labels = given.labels.clone()
        labels[2] = 10**6
        got = margin_cross_entropy(
            given.features, given.prototypes, labels, angular_margin=torch.ones(6), reduction="none"
        )
        assert got.isnan().tolist() == [False, False, True, False]
        assert torch.equal(got[[0, 1, 3]], expected[[0, 1, 3]])


class TestEnvironment:
    def test_backend(self) -> None:
        code = "import ltloss; print(ltloss.current_backend())"
        assert output(code, LTLOSS_BACKEND="reference") == "reference"
        assert output(code) == "auto"
        failed = run(code, LTLOSS_BACKEND="gpu")
        assert failed.returncode != 0
        assert not missing(failed.stderr, "LTLOSS_BACKEND", "auto", "triton", "torch", "reference", "'gpu'")

    def test_debug(self) -> None:
        code = "import ltloss; print(ltloss.current_debug())"
        assert [output(code, LTLOSS_DEBUG=value) for value in ("1", "0", "")] == ["True", "False", "False"]


class TestImport:
    def test_brings_in_nothing_and_is_fast(self) -> None:
        """Neither Triton nor what only the training needs, no device touched, under a second beyond torch's own."""
        unwanted = "{'triton', 'matplotlib', 'PIL', 'sklearn', 'safetensors', 'tqdm', 'timm', 'torchvision'}"
        code = (
            "import sys, time, torch, numpy\n"
            "before, start = set(sys.modules), time.perf_counter()\n"
            "import ltloss\n"
            "took = time.perf_counter() - start\n"
            f"print(sorted({unwanted} & {{name.partition('.')[0] for name in set(sys.modules) - before}}))\n"
            "print('ltloss.training' in sys.modules, torch.cuda.is_initialized(), took < 1.0 or took)\n"
        )
        assert output(code).splitlines() == ["[]", "False False True"]

    def test_the_first_call_of_the_kernels_warns_of_nothing(self) -> None:
        pytest.importorskip("triton")
        code = (
            "import warnings; warnings.simplefilter('error', UserWarning); import torch; "
            "torch.library.Library.impl.__kwdefaults__['allow_override'] = False; "  # the default before PyTorch 2.13
            "import ltloss; "
            "ltloss.use_backend('triton'); m = ltloss.ArcFaceLoss(7, 4); x = torch.randn(2, 4, requires_grad=True); "
            "m(x, torch.tensor([1, 2])).backward(); m.predict(x, 2); print(float(x.grad.abs().sum()) > 0)"
        )
        done = run(code, TRITON_INTERPRET="1")
        assert done.stdout == "True\n", done.stderr

    def test_works_without_triton_and_refuses_its_backend(self) -> None:
        code = (
            "import sys\n"
            "class Block:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name.partition('.')[0] == 'triton':\n"
            "            raise ImportError('no triton here')\n"
            "sys.meta_path.insert(0, Block())\n"
            "import torch, ltloss\n"
            "module = ltloss.LongTailLoss.from_counts([5, 2, 1], 4)\n"
            "module(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])).backward()\n"
            "print(module.predict(torch.randn(2, 4)).index.shape[0], 'triton' in sys.modules)\n"
            "ltloss.use_backend('triton')\n"
            "try:\n"
            "    module(torch.randn(1, 4), torch.tensor([0]))\n"
            "except ltloss.errors.BackendError:\n"
            "    print('refused')\n"
        )
        assert output(code).splitlines() == ["2 False", "refused"]

    def test_version_and_names(self) -> None:
        assert ltloss.__version__.count(".") == 2
        assert all(hasattr(ltloss, name) for name in ltloss.__all__)
