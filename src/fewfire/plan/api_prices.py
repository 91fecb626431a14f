"""What managed APIs charge for a model: the dated list that ships. Owns reading it; knows no self-hosting."""

from __future__ import annotations

import datetime
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class ApiPrice:
    """US dollars per million tokens, median over `offers`, with the range and who offers the model."""

    input: float
    output: float
    input_range: tuple[float, float]
    output_range: tuple[float, float]
    offers: int
    providers: tuple[str, ...]
    date: str
    source: str

    def blended(self, output_share: float) -> float:
        """Dollars per million tokens of a workload of which `output_share` is generated."""
        return (1 - output_share) * self.input + output_share * self.output


@dataclass(frozen=True)
class ApiPrices:
    """All models' prices by published name."""

    models: dict[str, ApiPrice]
    date: str
    stale_after_days: int

    def age_days(self, today: datetime.date) -> int:
        """Days since the end of the month in which the prices were read."""
        year, month = map(int, self.date.split("-")[:2])
        return (today - datetime.date(year, month, 28)).days


@lru_cache(maxsize=1)
def load_api_prices() -> ApiPrices:
    """The list that ships with fewfire."""
    document = tomllib.loads(Path(__file__).with_name("api_prices.toml").read_text(encoding="utf-8"))
    models = {
        name: ApiPrice(
            input=float(row["input"]),
            output=float(row["output"]),
            input_range=tuple(row["input_range"]),
            output_range=tuple(row["output_range"]),
            offers=int(row["offers"]),
            providers=tuple(row["providers"]),
            date=document["date"],
            source=document["source"],
        )
        for name, row in document["models"].items()
    }
    return ApiPrices(models, document["date"], int(document["stale_after_days"]))
