"""Classes by how many training images they have: many, medium, few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ltloss.errors import UserError


@dataclass(frozen=True)
class Thresholds:
    """Which classes are 'many' (more training images than many_above) and 'few' (fewer than few_below).

    Raises UserError where a class could be both.
    """

    many_above: int = 100
    few_below: int = 20

    def __post_init__(self) -> None:
        """Every class belongs to one group."""
        if self.few_below > self.many_above + 1:
            raise UserError(
                f"few_below {self.few_below} lies above many_above {self.many_above}: a class would be both; lower it"
            )

    def groups(self, class_counts: Sequence[int]) -> dict[str, np.ndarray]:
        """Masks (C,) of the many, medium and few classes; together they hold every class once."""
        counts = np.asarray(class_counts)
        many, few = counts > self.many_above, counts < self.few_below
        return {"many": many, "medium": ~many & ~few, "few": few}

    def means(self, per_class: np.ndarray, class_counts: Sequence[int]) -> dict[str, float | None]:
        """Means of the known accuracies (C,) of each group's classes, NaN where unknown; None for a group of none."""
        known = np.isfinite(per_class)
        return {
            name: float(per_class[mask & known].mean()) if (mask & known).any() else None
            for name, mask in self.groups(class_counts).items()
        }

    def describe(self) -> dict[str, str]:
        """The groups in words, for a table's header."""
        return {
            "many": f"many (>{self.many_above})",
            "medium": f"medium ({self.few_below}-{self.many_above})",
            "few": f"few (<{self.few_below})",
        }
