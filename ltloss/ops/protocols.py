"""The interfaces that the pass over all prototypes needs of a shard of the classes and of a fused update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from ltloss._types import TakeGradient

if TYPE_CHECKING:
    from ltloss_kernels import PrototypeUpdate

__all__ = ["Shard", "Update"]


class Shard(Protocol):
    """The classes that this rank multiplies, and the collectives that combine the results of all ranks."""

    @property
    def index(self) -> Tensor | None:
        """(K,) the sampled classes among this rank's, ascending; None for all."""

    @property
    def is_first(self) -> bool:
        """Whether this rank adds what belongs to a sample but to no class."""

    def take(self, prototypes: Tensor) -> Tensor:
        """The prototypes at hand, a function of all of them (C, D)."""

    def rows(self, samples: int) -> slice:
        """The rows of the global batch that this rank multiplies with its prototypes."""

    def local_labels(self, labels: Tensor) -> Tensor:
        """Labels (N,) as indices of the prototypes at hand, -1 for those of other ranks."""

    def local_prior(self, log_prior: Tensor | None) -> Tensor | None:
        """The prior (C,) of the prototypes at hand."""

    def gather(self, vectors: Tensor) -> Tensor:
        """(k, n) of this rank's rows -> (class ranks, k, N) of all."""

    def reduce_features(self, gradient: Tensor, samples: int) -> Tensor:
        """Gradient (n, D) of this rank's rows, summed over the class ranks, as (N, D)."""

    def sum_gradients(self, factor: Tensor) -> Tensor:
        """The factor (N,) of the features as it is; its gradient, of which a rank has its own rows, of all ranks."""

    def reduce_prototypes(self, gradient: Tensor) -> Tensor:
        """Gradient of the prototypes at hand, summed over the ranks that hold the same."""

    def reduce_prior(self, gradient: Tensor) -> Tensor:
        """Gradient (K,) of the prior of the prototypes at hand, as that of the whole prior (C,), of all ranks."""


class Update(Protocol):
    """An optimizer that updates the prototypes inside the backward, slab by slab: see :mod:`ltloss.optim`."""

    def reads(self, prototypes: Tensor) -> Tensor:
        """The prototypes without a gradient, for a pass that ends in the update."""

    def run(self, function: Any, *arguments: Any) -> Any:
        """``function.apply(*arguments, self, anchor)``, where a compiler does not see it."""

    def joined(self, loss: Tensor) -> Tensor:
        """The prototypes (C, D) for a further term of ``loss``, whose gradient joins before the update."""

    def replaced(self) -> None:
        """Called after the prototypes were overwritten: state that belongs to their former values is reset."""

    def watch(self, node: Any) -> None:
        """Remember a forward pass, the node of an autograd Function."""

    def begin(self, node: Any, upstream: Tensor, shard: Shard | None) -> TakeGradient | PrototypeUpdate | None:
        """Start the update in the backward of ``node``; None where there is nothing to move. Raises before it moves.

        Where the kernels can do all of it, what they need for it.
        """
