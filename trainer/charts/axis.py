"""The axis of a chart: values to pixels."""

import math
from dataclasses import dataclass


@dataclass
class Axis:
    """Maps a value to a pixel: linear, or logarithmic."""

    left: float
    right: float
    low: float
    high: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self.left + (at - low) / (high - low) * (self.right - self.left)
