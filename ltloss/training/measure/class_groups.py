"""Groups of classes by their number of training images: many, medium, few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ltloss._deprecation import renamed_fields
from ltloss.errors import UserError


@renamed_fields(many_above="many_threshold", few_below="few_threshold")
@dataclass(frozen=True)
class Thresholds:
    """The limits of the groups.

    Classes with more than ``many_threshold`` training images are 'many', those with fewer than ``few_threshold`` are
    'few', and the others are 'medium'. Raises UserError if a class could be both many and few.
    """

    many_threshold: int = 100
    few_threshold: int = 20

    def __post_init__(self) -> None:
        """Check that every class belongs to one group."""
        if self.few_threshold > self.many_threshold + 1:
            raise UserError(
                f"few_threshold {self.few_threshold} lies above many_threshold {self.many_threshold}: a class would be "
                "both; lower it"
            )

    def groups(self, class_counts: Sequence[int]) -> dict[str, np.ndarray]:
        """Masks (C,) of the many, medium and few classes; together they hold every class once."""
        counts = np.asarray(class_counts)
        many, few = counts > self.many_threshold, counts < self.few_threshold
        return {"many": many, "medium": ~many & ~few, "few": few}

    def means(self, per_class: np.ndarray, class_counts: Sequence[int]) -> dict[str, float | None]:
        """The mean of ``per_class`` (C,) over each group, without NaN; None for a group without known values."""
        known = np.isfinite(per_class)
        return {
            name: float(per_class[mask & known].mean()) if (mask & known).any() else None
            for name, mask in self.groups(class_counts).items()
        }

    def describe(self) -> dict[str, str]:
        """The groups in words, such as "many (>100)", for a table's header."""
        return {
            "many": f"many (>{self.many_threshold})",
            "medium": f"medium ({self.few_threshold}-{self.many_threshold})",
            "few": f"few (<{self.few_threshold})",
        }
