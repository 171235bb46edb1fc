"""The one exception of class-parallel work: what went wrong, on which rank, told on every rank."""

from __future__ import annotations

__all__ = ["DistributedError"]


class DistributedError(RuntimeError):
    """Ranks disagree, another rank failed, or one is gone. Raised on every rank that is still there.

    Example:
        >>> from ltloss.distributed import DistributedError
        >>> raise DistributedError("rank 1 of 2 failed, so all do: ValueError: ...")
        Traceback (most recent call last):
        ltloss.distributed.errors.DistributedError: rank 1 of 2 failed, so all do: ValueError: ...
    """
