"""The example trains; with a GPU the graph gives the loss of the steps one by one."""

from __future__ import annotations

import pytest
import torch

from examples import cuda_graph


def test_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "STEPS", 6)
    device = torch.device("cpu")
    first = cuda_graph.Step(device)
    first.images, first.labels = cuda_graph.batches(device)[0]
    first()
    last, _ = cuda_graph.train(device, lambda step: step)
    assert last < float(first.loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph needs a GPU")
def test_a_graph_trains_as_single_steps_do() -> None:
    step, graphed = cuda_graph.Step(torch.device("cuda")), cuda_graph.Step(torch.device("cuda"))
    replay = cuda_graph.recorded(graphed)  # which trains on zeros three times
    for _ in range(3):
        step()
    for images, labels in cuda_graph.batches(torch.device("cuda"))[:5]:
        for one, run in ((step, step), (graphed, replay)):
            one.images.copy_(images)
            one.labels.copy_(labels)
            run()
        assert torch.equal(step.loss, graphed.loss)
