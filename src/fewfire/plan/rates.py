"""How fast this machine's kernels are, as measured: products by format and tokens, float arithmetic, a fork-join.

What `fewfire doctor` and `bench` measure (kernels/probe.py) and the step formulas take in place of vendors' peaks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Of the native engine, over the shapes of docs/bench.md; `benchmarks/prediction.py` measures what they rest on.
OVERLAP = 0.40  # of arithmetic that hides behind reading; of reading behind arithmetic more, the longer that is
PRODUCT_SHARE = 0.95  # of a product's own speed reached within a model: parts of uneven size
ATTENTION_SHARE = 0.60  # of the float32 peak, by scores and values
LATENT_SHARE = 0.27  # the same, of latent attention
ROW_OPS = 150  # of float32 arithmetic that a number of a row costs, in place of what is done with it once or twice:
# norms, codes, rotations, the cache, gathering, activations, weighted sums (0.8 ns on one core of 180 GFLOP/s)
FORKS_PER_LAYER = 10  # parts of a layer that wait for all threads
STEP_S = 200e-6  # of a step in Python: bookkeeping of pages, counts, the choice of the token


@dataclass(frozen=True)
class KernelRates:
    """Operations/s of weights in each format times some tokens, from caches: ((tokens, rate), ...), tokens rising.

    A multiply-add is two operations. `float_ops_per_s`: float32, from registers. `fork_join_s`: all threads start on a
    small part and are waited for.
    """

    products: Mapping[str, tuple[tuple[int, float], ...]]
    float_ops_per_s: float
    fork_join_s: float

    def product_s(self, format_name: str, num_weights: float, num_tokens: float) -> float:
        """Seconds of arithmetic of `num_weights` weights times `num_tokens` tokens, their bytes at hand.

        Between measured numbers of tokens time a weight is a straight line; beyond them the rate is the last one.
        A format that was not measured counts as bf16.
        """
        points = self.products.get(format_name) or self.products["bf16"]
        num_weights /= PRODUCT_SHARE
        at = bisect_right(points, num_tokens, key=lambda point: point[0])
        if at == 0 or at == len(points):
            tokens, rate = points[max(0, at - 1)]
            return 2 * num_weights * max(num_tokens, points[0][0]) / rate
        (low, low_rate), (high, high_rate) = points[at - 1], points[at]
        part = (num_tokens - low) / (high - low)
        return 2 * num_weights * ((1 - part) * low / low_rate + part * high / high_rate)

    def attention_s(self, flops: float, *, is_latent: bool = False) -> float:
        """Seconds of scores and values of attention."""
        return flops / (self.float_ops_per_s * (LATENT_SHARE if is_latent else ATTENTION_SHARE))

    def rows_s(self, numbers: float) -> float:
        """Seconds of all that is done with rows between products, of so many numbers."""
        return numbers * ROW_OPS / self.float_ops_per_s

    def between(self, other: KernelRates) -> KernelRates:
        """What work takes that runs half of the time at either's rates, of the same formats and tokens."""
        mean = lambda one, two: 2 / (1 / one + 1 / two)  # noqa: E731
        return KernelRates(
            {
                name: tuple(
                    (n, mean(one, two)) for (n, one), (_, two) in zip(points, other.products[name], strict=True)
                )
                for name, points in self.products.items()
            },
            float_ops_per_s=mean(self.float_ops_per_s, other.float_ops_per_s),
            fork_join_s=(self.fork_join_s + other.fork_join_s) / 2,
        )

    def to_json(self) -> dict[str, Any]:
        """As `from_json` takes it."""
        products = {name: {str(tokens): rate for tokens, rate in points} for name, points in self.products.items()}
        return {
            "product_ops_per_s": products,
            "float_ops_per_s": self.float_ops_per_s,
            "fork_join_s": self.fork_join_s,
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> KernelRates:
        """Raises KeyError, TypeError or ValueError where it is of another form."""
        products = {
            str(name): tuple(sorted((int(tokens), float(rate)) for tokens, rate in points.items()))
            for name, points in document["product_ops_per_s"].items()
        }
        if "bf16" not in products or not all(products.values()):
            raise ValueError("product_ops_per_s lacks bf16")
        return KernelRates(products, float(document["float_ops_per_s"]), float(document["fork_join_s"]))


def overlapped(reading_s: float, arithmetic_s: float) -> float:
    """Seconds of a phase that reads and multiplies at once: the longer, and what of the shorter is not hidden.

    The more arithmetic there is for a byte, the sooner it has been fetched ahead.
    """
    if arithmetic_s <= reading_s:
        return reading_s + (1 - OVERLAP) * arithmetic_s
    return arithmetic_s + (1 - OVERLAP) * reading_s * reading_s / arithmetic_s
