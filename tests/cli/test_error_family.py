"""The command line tells errors apart by their type: one line for the family, a traceback for a defect."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
import torch

import ltloss
from ltloss import errors
from ltloss.cli.command import reported
from ltloss.errors import BackendError, DistributedError, DivergedError, LtlossError, VariableError


def _kinds(kind: type[LtlossError]) -> Iterator[type[LtlossError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


def _raising(error: BaseException) -> int:
    def command() -> int:
        raise error

    return reported(command)


@pytest.mark.parametrize("kind", list(_kinds(LtlossError)))
def test_the_family_is_reported_in_one_line(kind: type[LtlossError], capsys: pytest.CaptureFixture[str]) -> None:
    assert kind.__module__ == errors.__name__
    assert _raising(kind("what was\ngiven")) == 2
    assert capsys.readouterr().err == "ltloss: error: what was given\n"
    assert str(pickle.loads(pickle.dumps(kind("across processes")))) == "across processes"


@pytest.mark.parametrize(
    "defect",
    [
        RuntimeError("backend 'triton' is mentioned"),
        RuntimeError("home directory"),
        ValueError("environment variable"),
        ValueError("embedded null byte"),
        ValueError("out of memory"),
        type("DistributedError", (RuntimeError,), {})("of somebody else"),
    ],
    ids=repr,
)
def test_what_only_reads_like_one_keeps_its_traceback(defect: Exception) -> None:
    with pytest.raises(type(defect)) as caught:
        _raising(defect)
    assert caught.value is defect


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA"), OverflowError("too large")])
def test_no_memory_has_types(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert _raising(error) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ltloss: error: ")


def test_they_remain_what_callers_expect() -> None:
    assert issubclass(DistributedError, RuntimeError)
    assert issubclass(BackendError, RuntimeError)
    assert issubclass(VariableError, ValueError)
    assert DistributedError is ltloss.distributed.DistributedError


def test_a_backend_that_cannot_serve_has_a_type_of_its_own() -> None:
    features, prototypes = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    with ltloss.use_backend("triton"), pytest.raises(BackendError):
        ltloss.functional.margin_cross_entropy(features, prototypes, torch.tensor([0, 1]), scale=8.0)


def test_what_diverged_can_be_told_without_the_advice() -> None:
    error = pickle.loads(pickle.dumps(DivergedError("the loss is nan; or so", "lower --lr")))
    assert (error.what, str(error)) == ("the loss is nan; or so", "the loss is nan; or so; lower --lr")
