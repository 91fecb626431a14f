"""What it costs a month: self-hosting against an API against a smaller dense model, at the load that is really reached.

Self-hosting is a fixed bill with a floor (one whole system) and a ceiling (its capacity): use divides it, never
multiplies it. Tokens are counted in and out together; `output_share` of them are generated. All in US dollars.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from fewfire.config import check
from fewfire.plan.api_prices import ApiPrice
from fewfire.plan.machine import Machine
from fewfire.sizes import format_count

HOURS_PER_MONTH = 730.0


@dataclass(frozen=True)
class Demand:
    """What is asked of a service. `burstiness`: the busiest hour over the mean; capacity must cover it."""

    tokens_per_month: float | None = None
    output_share: float = 0.25
    burstiness: float = 1.0
    ops_usd_per_month: float = 0.0

    def __post_init__(self) -> None:
        tokens = self.tokens_per_month
        check(tokens is None or 0 < tokens < 1e18, f"tokens per month ({tokens}) must be above 0 and below 10^18")
        check(0 <= self.output_share <= 1, f"output share ({self.output_share}) must be between 0 and 1")
        check(1 <= self.burstiness <= 1000, f"burstiness ({self.burstiness}) is peak over mean; use 1 to 1000")
        check(self.ops_usd_per_month >= 0, f"ops cost ({self.ops_usd_per_month}) must be 0 or more dollars a month")


@dataclass(frozen=True)
class SelfHost:
    """One machine as a service. `capacity`: tokens a month at full use; `bill`: dollars a month of one system."""

    machine: Machine
    demand: Demand
    capacity: float
    bill: float

    @property
    def useful_capacity(self) -> float:
        """Tokens a month one system serves if its busiest hour is `burstiness` times the mean."""
        return self.capacity / self.demand.burstiness

    @property
    def floor_usd_per_month(self) -> float:
        return self.bill + self.demand.ops_usd_per_month

    def systems(self, tokens: float) -> int:
        """Whole systems that `tokens` a month take."""
        return max(1, ceil(tokens / self.useful_capacity))

    def monthly(self, tokens: float) -> float:
        """Dollars a month for `tokens` a month."""
        return self.systems(tokens) * self.bill + self.demand.ops_usd_per_month

    def per_million(self, tokens: float) -> float:
        """Dollars per million tokens at that volume: the fixed bill divided by what it served."""
        return self.monthly(tokens) / tokens * 1e6

    def break_even(self, api_per_million: float) -> float | None:
        """The volume from which self-hosting is cheaper than the API; None if it never is.

        The first number of systems whose bill the API would exceed within their capacity.
        """
        if self.bill * 1e6 / self.useful_capacity >= api_per_million:
            return None
        systems = 1
        while systems < 1_000_000:
            volume = (systems * self.bill + self.demand.ops_usd_per_month) / api_per_million * 1e6
            if volume <= systems * self.useful_capacity:
                return max(volume, (systems - 1) * self.useful_capacity)
            missing = self.demand.ops_usd_per_month / (self.useful_capacity * api_per_million / 1e6 - self.bill)
            systems = max(systems + 1, ceil(missing))
        return None

    def pays_throughout(self, api_per_million: float) -> float | None:
        """The volume above which self-hosting stays cheaper: below it each further system must be filled first."""
        price, capacity, ops = api_per_million / 1e6, self.useful_capacity, self.demand.ops_usd_per_month
        gain = capacity * price - self.bill
        if gain <= 0:
            return None
        systems = max(1, ceil((self.bill + ops) / gain))
        return max((systems * self.bill + ops) / price, (systems - 1) * capacity)


def self_host(machine: Machine, demand: Demand) -> SelfHost | None:
    """`machine` as a service; None if it does not fit, has no price, or its prefill speed is unknown.

    Time adds up: a token costs (1 - share) / prefill rate + share / decode rate seconds at full load.
    """
    if not machine.fits or machine.usd_per_hour is None or machine.full_load is None or machine.full_prefill is None:
        return None
    rate = machine.full_prefill.tokens_per_s
    if not rate:
        return None
    seconds = (1 - demand.output_share) / rate + demand.output_share / machine.full_load.tokens_per_s
    return SelfHost(machine, demand, HOURS_PER_MONTH * 3600 / seconds, machine.usd_per_hour * HOURS_PER_MONTH)


@dataclass(frozen=True)
class Route:
    """One way to get the tokens: its bill, where the text goes, who offers it, what leaving takes."""

    name: str
    usd_per_month: float | None
    usd_per_million: float | None
    text_goes: str
    providers: str
    leaving: str


@dataclass(frozen=True)
class Costs:
    """The comparison. `dense` is a smaller dense model of about the active size, self-hosted."""

    demand: Demand
    host: SelfHost | None
    api: ApiPrice | None
    dense: SelfHost | None
    dense_name: str
    currency: tuple[str, float] = ("USD", 1.0)

    def money(self, usd: float, digits: int = 0) -> str:
        """Dollars, or the currency that was asked for."""
        code, per_usd = self.currency
        return f"{'$' if code == 'USD' else code + ' '}{usd * per_usd:,.{digits}f}"

    @property
    def api_per_million(self) -> float | None:
        return None if self.api is None else self.api.blended(self.demand.output_share)

    @property
    def break_even(self) -> float | None:
        if self.host is None or self.api_per_million is None:
            return None
        return self.host.break_even(self.api_per_million)

    def routes(self) -> list[Route]:
        """Self-hosting, the API, and a smaller dense model, where each is known."""
        tokens, found = self.demand.tokens_per_month, []
        if self.host is not None:
            found.append(self._hosted("self-host", self.host, tokens))
        if self.api is not None:
            per_million = self.api_per_million or 0.0
            offers = len(self.api.providers)
            others = "another provider takes a new key and base URL" if offers > 1 else "nobody else offers it"
            found.append(
                Route(
                    "managed API",
                    None if tokens is None else per_million * tokens / 1e6,
                    per_million,
                    "to the provider's machines, under its terms",
                    f"{offers} providers ({self.api.offers} offers)",
                    f"{others}; the weights are open",
                )
            )
        if self.dense is not None:
            found.append(self._hosted(f"dense {self.dense_name}", self.dense, tokens))
        return found

    @staticmethod
    def _hosted(name: str, host: SelfHost, tokens: float | None) -> Route:
        rented = host.machine.system.part.price_usd_per_hour is not None
        return Route(
            f"{name}, {host.machine.system.label}",
            host.floor_usd_per_month if tokens is None else host.monthly(tokens),
            None if tokens is None else host.per_million(tokens),
            "to the rented machines" if rented else "to nobody: the machine is your own",
            "whoever rents out the part" if rented else "none needed",
            "ends with the rent; the weights stay" if rented else "sell the machine; the weights stay",
        )

    @property
    def sentence(self) -> str:
        """The answer: self-host, managed API or a smaller dense model, from volume and irregularity."""
        if self.host is None and self.api is None:
            return "No machine of the list can be priced and no API lists this model: give --hardware and --price."
        if self.demand.tokens_per_month is None:
            return self._threshold()
        return self._choice(self.demand.tokens_per_month)

    @staticmethod
    def _systems(host: SelfHost, tokens: float) -> str:
        label, systems = host.machine.system.label, host.systems(tokens)
        return label if systems == 1 else f"{systems} systems of {label}"

    def _threshold(self) -> str:
        if self.host is None:
            return "No machine of the list holds it at a known price: the API is what is left."
        label, floor = self.host.machine.system.label, self.host.floor_usd_per_month
        if self.api is None:
            return f"No API lists this model: self-hosting starts at {self.money(floor)} a month ({label})."
        if self.break_even is None:
            full = self.host.per_million(self.host.useful_capacity)
            api = self.money(self.api_per_million or 0.0, 2)
            return (
                f"The API is cheaper at any volume: {label} costs {self.money(full, 2)} per million tokens "
                f"even at full use, the API {api}."
            )
        return (
            f"Below {_billions(self.break_even)} tokens a month the API is cheaper; above it {label} at "
            f"{self.money(floor)} a month, up to {_billions(self.host.useful_capacity)} tokens on it."
        )

    def _choice(self, tokens: float) -> str:
        volume = f"At {_billions(tokens)} tokens a month"
        if self.demand.burstiness > 1:
            volume += f", peaks of {self.demand.burstiness:g} times the mean,"
        bills: dict[str, float] = {}
        if self.host is not None:
            bills["self-hosting"] = self.host.monthly(tokens)
        if self.api_per_million is not None:
            bills["the managed API"] = self.api_per_million * tokens / 1e6
        best = min(bills, key=lambda name: bills[name])
        others = ", ".join(f"{name} {self.money(bill)}" for name, bill in bills.items() if name != best)
        if others:
            words = f"{volume} {best} is cheaper: {self.money(bills[best])} a month against {others}."
        else:
            words = f"{volume} {best} is the only route with a price: {self.money(bills[best])} a month."
        if self.host is not None:
            used = tokens / (self.host.systems(tokens) * self.host.capacity)
            words += f" {self._systems(self.host, tokens)} would be {used * 100:.0f} % used."
        if self.break_even is not None and self.host is not None:
            words += f" Self-hosting pays from {_billions(self.break_even)} tokens a month"
            throughout = self.host.pays_throughout(self.api_per_million or 0.0)
            if best == "the managed API" and tokens > self.break_even and throughout is not None:
                words += f" while its systems are full, and throughout from {_billions(throughout)}"
            words += "."
        if self.dense is not None:
            small = self.dense.monthly(tokens)
            if small < 0.5 * bills[best]:
                words += (
                    f" A dense model of {self.dense_name} would cost {self.money(small)}, less than half: "
                    "measure whether it is good enough (fewfire eval)."
                )
        return words

    def to_json(self) -> dict[str, Any]:
        """All of it, in dollars and tokens a month."""
        host, tokens = self.host, self.demand.tokens_per_month
        return {
            "tokens_per_month": tokens,
            "output_share": self.demand.output_share,
            "burstiness": self.demand.burstiness,
            "ops_usd_per_month": self.demand.ops_usd_per_month,
            "self_host": None
            if host is None
            else {
                "hardware": host.machine.system.label,
                "usd_per_month_floor": host.floor_usd_per_month,
                "capacity_tokens_per_month": host.capacity,
                "useful_capacity_tokens_per_month": host.useful_capacity,
                "usd_per_million_at_full_use": host.per_million(host.useful_capacity),
                "systems": None if tokens is None else host.systems(tokens),
                "utilization_frac": None if tokens is None else tokens / (host.systems(tokens) * host.capacity),
                "usd_per_month": None if tokens is None else host.monthly(tokens),
                "usd_per_million_tokens": None if tokens is None else host.per_million(tokens),
            },
            "api_usd_per_million_tokens": self.api_per_million,
            "break_even_tokens_per_month": self.break_even,
            "routes": [route.__dict__ for route in self.routes()],
            "sentence": self.sentence,
        }


def _billions(tokens: float) -> str:
    if tokens >= 1e9:
        return f"{tokens / 1e9:,.1f} billion"
    return format_count(tokens) if tokens < 1e6 else f"{tokens / 1e6:,.1f} million"


def choose_host(machines: list[Machine], demand: Demand, api: ApiPrice | None) -> SelfHost | None:
    """The machine to compare by: the cheapest at the volume asked for; without one, the lowest break-even or bill.

    Machines below a readable stream for one user are passed over, and all but GPUs where there are any.
    """
    hosts = [host for host in (self_host(machine, demand) for machine in machines) if host is not None]
    hosts = [host for host in hosts if host.machine.decode is not None and host.machine.decode.tokens_per_s >= 10]
    hosts = [host for host in hosts if host.machine.system.part.kind == "gpu"] or hosts
    if not hosts:
        return None
    tokens = demand.tokens_per_month
    if tokens is not None:
        return min(hosts, key=lambda host: host.monthly(tokens))
    if api is not None:
        price = api.blended(demand.output_share)
        paying = [(host.break_even(price), host) for host in hosts]
        found = [(volume, host) for volume, host in paying if volume is not None]
        if found:
            return min(found, key=lambda pair: pair[0])[1]
        return min(hosts, key=lambda host: host.per_million(host.useful_capacity))
    return min(hosts, key=lambda host: host.floor_usd_per_month)
