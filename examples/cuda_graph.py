"""A whole training step in one CUDA graph: for small heads, whose step waits for the host and not for the GPU.

Run ``python examples/cuda_graph.py``. Forward, backward and the optimizer's step are recorded once and then replayed by
one call of the host. Without a GPU the same steps run one by one, and the loss is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ltloss import ArcFaceLoss

N, C, D, STEPS = 256, 1000, 512, 30


class Step:
    """A training step on tensors that stay where they are, so that it can be recorded."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(64, D).to(device), ArcFaceLoss(C, D).to(device)
        parameters = [*self.backbone.parameters(), *self.head.parameters()]
        # A recorded step cannot look at a counter on the host.
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, capturable=device.type == "cuda")
        self.images, self.labels = torch.zeros(N, 64, device=device), torch.zeros(N, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)

    def __call__(self) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad(set_to_none=False)
        loss = self.head(self.backbone(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a graph. It runs three times before, so that kernels are compiled and all memory is taken."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def batches(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Images around a mean for each class, and their labels."""
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(C, 64, generator=generator)
    drawn = []
    for _ in range(STEPS):
        labels = torch.randint(C, (N,), generator=generator)
        images = means[labels] + 0.3 * torch.randn(N, 64, generator=generator)
        drawn.append((images.to(device), labels.to(device)))
    return drawn


def train(device: torch.device, wrap: Callable[[Callable[[], None]], Callable[[], None]]) -> tuple[float, float]:
    """The last loss, and milliseconds a step."""
    step, data = Step(device), batches(device)
    step.images.copy_(data[0][0])
    step.labels.copy_(data[0][1])
    run = wrap(step)
    start = time.perf_counter()
    for images, labels in data:
        step.images.copy_(images)
        step.labels.copy_(labels)
        run()
    loss = float(step.loss)  # waits for the device
    return loss, 1e3 * (time.perf_counter() - start) / STEPS


def main() -> None:
    """Train with and without the graph."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways = {"one by one": lambda step: step, **({"as a graph": recorded} if device.type == "cuda" else {})}
    for name, wrap in ways.items():
        loss, milliseconds = train(device, wrap)
        print(f"{name}: loss {loss:.3f} after {STEPS} steps, {milliseconds:.2f} ms a step on {device}")


if __name__ == "__main__":
    main()
