"""Between two lines of a training's log."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Window:
    """What the steps since the last line came to: transformers logs their mean, so this does."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def take(self, values: Mapping[str, float]) -> None:
        """Add a step; a value that is no finite number is left out, as in transformers."""
        for name, value in values.items():
            finite = math.isfinite(value)
            self.sums[name] = self.sums.get(name, 0.0) + (value if finite else 0.0)
            self.counts[name] = self.counts.get(name, 0) + finite

    def means(self) -> dict[str, float]:
        """The means, and begin anew.

        >>> window = Window()
        >>> window.take({"loss": 2.0})
        >>> window.take({"loss": 4.0})
        >>> window.means(), window.means()
        ({'loss': 3.0}, {})
        """
        found = {name: self._mean(name) for name in self.sums}
        self.sums, self.counts = {}, {}
        return found

    def _mean(self, name: str) -> float:
        return self.sums[name] / self.counts[name] if self.counts[name] else math.nan
