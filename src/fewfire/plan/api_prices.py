"""What managed APIs charge for a model: the dated list that ships. Owns reading it; knows no self-hosting."""

from __future__ import annotations

import datetime
import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fewfire.errors import ConfigError


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


def installed_price(model: str) -> ApiPrice | None:
    """Median price of `model` over the offers that the installed genai-prices package lists; offline, no network.

    Offers are matched by the model's published name within their ids; free ones are left out. None without a match.
    Raises ConfigError if the package is not there.
    """
    try:
        from genai_prices import __version__ as version
        from genai_prices.data import providers
    except ImportError as error:
        raise ConfigError("--api-prices needs the genai-prices package; pip install genai-prices") from error
    offers: list[tuple[str, float, float]] = []
    wanted = re.compile(rf"(^|[/._:-]){re.escape(model.lower())}($|[:@-](instruct|chat|maas|v\d|\d)|[:@])")
    for provider in providers:
        for entry in provider.models:
            price = entry.prices if not isinstance(entry.prices, list) else entry.prices[-1].prices
            into, out = getattr(price, "input_mtok", None), getattr(price, "output_mtok", None)
            if wanted.search(entry.id.lower()) and into and out:
                offers.append((provider.id, _flat(into), _flat(out)))
    if not offers:
        return None
    ins, outs = sorted(offer[1] for offer in offers), sorted(offer[2] for offer in offers)
    return ApiPrice(
        input=median(ins),
        output=median(outs),
        input_range=(ins[0], ins[-1]),
        output_range=(outs[0], outs[-1]),
        offers=len(offers),
        providers=tuple(sorted({offer[0] for offer in offers})),
        date=datetime.date.today().isoformat()[:7],
        source=f"genai-prices {version}, installed here",
    )


def median(values: list[float]) -> float:
    """The middle of sorted values."""
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def _flat(price: object) -> float:
    """A price, or the first tier of one."""
    return float(getattr(price, "base", price))  # type: ignore[arg-type]
