"""The hardware catalogue: parts, their prices, and sets of them ('8xH200'). Owns reading the TOML.

The catalogue ships as `hardware.toml`, dated. A file of the same form named by FEWFIRE_HARDWARE, or
`~/.config/fewfire/hardware.toml`, adds parts and overrides those of the same name, field by field.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from fewfire.config import check, environment
from fewfire.errors import ConfigError, FormatError
from fewfire.plan.rates import KernelRates

OWN_YEARS, USD_PER_KWH, HOURS_PER_YEAR = 3.0, 0.15, 8766.0
KINDS = ("gpu", "unified", "cpu", "laptop")


def owned_usd_per_hour(buy_usd: float, years: float, kilowatts: float, usd_per_kwh: float) -> float:
    """What an hour of a bought machine costs: its price over its life, and its power, running all the time."""
    return buy_usd / (years * HOURS_PER_YEAR) + kilowatts * usd_per_kwh


# How a machine is paid for: on demand, or the catalogue's own_usd_per_hour by its place there.
PRICINGS = {"on-demand": None, "own-hyperscaler": 0, "own-smaller-cloud": 1, "rent-3-years": 2}


@dataclass(frozen=True)
class Payment:
    """How device-hours are paid: `usd_per_hour` as given; or bought at `buy_usd` and written off over `years` with
    `kilowatts` (None: the part's) at `usd_per_kwh`; else by `pricing`, one of PRICINGS."""

    usd_per_hour: float | None = None
    buy_usd: float | None = None
    years: float = OWN_YEARS
    kilowatts: float | None = None
    usd_per_kwh: float = USD_PER_KWH
    pricing: str = "on-demand"

    def __post_init__(self) -> None:
        given = self.usd_per_hour
        check(given is None or 0 < given < 1e6, f"price ({given}) must be above 0 and below a million a device-hour")
        check(self.buy_usd is None or 0 < self.buy_usd < 1e9, f"--buy-usd ({self.buy_usd}) must be above 0 dollars")
        check(given is None or self.buy_usd is None, "give either --price (rented) or --buy-usd (bought), not both")
        check(0 < self.years <= 100, f"--years ({self.years}) must be above 0 and at most 100")
        check(self.kilowatts is None or 0 <= self.kilowatts < 1e6, f"--power-kw ({self.kilowatts}) must be 0 or more")
        check(0 <= self.usd_per_kwh < 1e3, f"--usd-per-kwh ({self.usd_per_kwh}) must be 0 or more")
        check(self.pricing in PRICINGS, f"--pricing ({self.pricing}) is unknown; choose one of {', '.join(PRICINGS)}")

    def of(self, part: Part) -> float | None:
        """Dollars an hour of one `part`; None where its price is not known."""
        if self.usd_per_hour is not None:
            return self.usd_per_hour
        if self.buy_usd is not None:
            power = self.kilowatts if self.kilowatts is not None else part.own_kw or (part.tdp_w or 0.0) / 1000
            return owned_usd_per_hour(self.buy_usd, self.years, power, self.usd_per_kwh)
        place = PRICINGS[self.pricing]
        if place is None:
            return part.usd_per_hour
        return part.own_usd_per_hour[place] if len(part.own_usd_per_hour) > place else None


@dataclass(frozen=True)
class Part:
    """One device. Rates are the vendor's peaks (decimal, dense); what a step reaches is `efficiency` and the mfu.

    `kernels`, of this machine only: rates of arithmetic as measured, taken in place of peaks and the mfu.
    """

    name: str
    kind: str
    memory_gb: float
    bandwidth_gbs: float
    efficiency: float = 0.75
    aliases: tuple[str, ...] = ()
    memory_bytes: int | None = None
    reserve_gb: float | None = None
    bf16_tflops: float | None = None
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    int8_tflops: float | None = None
    link_gbs: float | None = None
    link: str = ""
    domain: int = 1
    per_node: int = 1
    node_link_gbs: float | None = None
    disk_gbs: float | None = None
    host_ram_gb: float | None = None
    host_gbs: float | None = None
    tdp_w: float | None = None
    launch_s: float | None = None
    price_usd_per_hour: float | None = None
    price_low: float | None = None
    price_high: float | None = None
    price_date: str = ""
    price_source: str = ""
    own_usd_per_hour: tuple[float, ...] = ()
    own_kw: float | None = None
    buy_usd: float | None = None
    sources: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    note: str = ""
    kernels: KernelRates | None = None

    @property
    def short(self) -> str:
        """The name without what stands in brackets, after a comma, or says how many channels there are."""
        bare = re.sub(r"\s*\([^)]*\)|,.*| dual channel| 1 socket", "", self.name)
        return (
            bare.replace("RTX PRO 6000 Blackwell", "RTX PRO 6000").replace("Ryzen AI Max+ 395", "Ryzen AI Max+").strip()
        )

    @property
    def usd_per_hour(self) -> float | None:
        """The price of an hour: rented, or bought and written off over three years with its power at 0.15 a kWh."""
        if self.price_usd_per_hour is not None:
            return self.price_usd_per_hour
        if self.buy_usd is None:
            return None
        return owned_usd_per_hour(self.buy_usd, OWN_YEARS, (self.tdp_w or 0.0) / 1000, USD_PER_KWH)

    @property
    def usable_bytes(self) -> float:
        """Memory left for weights, cache and activations: a share for the allocator, then the runtime's own.

        GPUs: 0.9 of what the driver reports (the engines' default) less 3.5 GB of context, graphs and collective
        buffers (1 GB on cards below 40 GB, which run lighter runtimes). Unified memory: what the GPU may address
        less 2 GB. Laptops and servers: less 2 GB and 8 GB for the system.
        """
        memory = self.memory_bytes or self.memory_gb * 1e9
        default = {"gpu": 3.5 if self.memory_gb >= 40 else 1.0, "unified": 2.0, "laptop": 2.0, "cpu": 8.0}[self.kind]
        if self.kind == "cpu" and self.memory_gb <= 256:
            default = 2.0
        reserve = (default if self.reserve_gb is None else self.reserve_gb) * 1e9
        return max(0.0, memory * (0.9 if self.kind == "gpu" else 1.0) - reserve)


@dataclass(frozen=True)
class System:
    """`count` devices of one part over `nodes` servers. `label` is what the user wrote, or the part's name."""

    part: Part
    count: int
    asked: bool = False  # the count was written down, not chosen here

    @property
    def nodes(self) -> int:
        return -(-self.count // self.part.per_node)

    @property
    def label(self) -> str:
        return self.part.short if self.count == 1 else f"{self.count}x {self.part.short}"

    @property
    def usable_bytes(self) -> float:
        return self.part.usable_bytes * self.count

    @property
    def usd_per_hour(self) -> float | None:
        price = self.part.usd_per_hour
        return None if price is None else price * self.count


@dataclass(frozen=True)
class Catalogue:
    """All parts by name, with the date of the figures and of the prices."""

    parts: tuple[Part, ...]
    date: str
    prices_date: str
    stale_after_days: int
    sources: dict[str, str]

    def find(self, name: str) -> Part:
        """The part of that name or alias, whatever its case or hyphens. ConfigError offers the nearest names."""
        wanted = _key(name)
        for part in self.parts:
            if wanted == _key(part.name) or wanted in map(_key, part.aliases):
                return part
        known = {_key(alias): alias for part in self.parts for alias in (*part.aliases, part.name)}
        near = get_close_matches(wanted, known, n=3, cutoff=0.5)
        names = ", ".join(known[key] for key in near) or "H100, 8xH200, RTX 4090, laptop-32"
        raise ConfigError(f"hardware ({name}) is not known; nearest: {names}; `fewfire models --hardware` lists all")

    def price_age_days(self, today: datetime.date) -> int | None:
        """Days since the prices were read, None if their date is not one."""
        match = re.fullmatch(r"(\d{4})-(\d{2})(?:-(\d{2}))?", self.prices_date)
        if match is None:
            return None
        return (today - datetime.date(int(match.group(1)), int(match.group(2)), int(match.group(3) or 28))).days


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())


_FIELDS = {field.name: field for field in fields(Part) if field.name != "kernels"}
_NUMBERS = {name for name, field in _FIELDS.items() if "float" in str(field.type) or "int" in str(field.type)}


def _check_field(name: str, key: str, value: Any, path: str) -> None:
    if key not in _FIELDS:
        near = get_close_matches(key, _FIELDS, n=1)
        hint = f"; did you mean {near[0]}" if near else ""
        raise FormatError(f"unknown key {key} of part {name}{hint}", path=path)
    if key not in _NUMBERS or isinstance(value, list):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"{key} of part {name} must be a number, not {value!r}", path=path)
    if not value > 0 and key != "reserve_gb":
        raise FormatError(f"{key} of part {name} must be above zero, not {value!r}", path=path)


def _read_part(entry: dict[str, Any], known: dict[str, Part], path: str) -> Part:
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise FormatError("a [[part]] has no name; give it one", path=path)
    for key, value in entry.items():
        _check_field(name, key, value, path)
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    if name in known:
        return replace(known[name], **values)
    missing = [key for key in ("kind", "memory_gb", "bandwidth_gbs") if key not in entry]
    if missing:
        raise FormatError(f"part {name} lacks {', '.join(missing)}; a new part needs them", path=path)
    if entry["kind"] not in KINDS:
        raise FormatError(f"kind of part {name} is {entry['kind']!r}; use one of {', '.join(KINDS)}", path=path)
    return Part(**values)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"hardware catalogue {path} cannot be read ({error.strerror}); check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"not a TOML file ({error}); fix the line it names", path=str(path)) from error


def user_catalogue() -> Path | None:
    """The user's own file: FEWFIRE_HARDWARE, or ~/.config/fewfire/hardware.toml if it is there."""
    named = environment("FEWFIRE_HARDWARE")
    if named:
        return Path(named)
    home = environment("HOME")
    default = Path(home) / ".config" / "fewfire" / "hardware.toml" if home else None
    return default if default is not None and default.is_file() else None


@lru_cache(maxsize=4)
def load_catalogue(user: Path | None = None) -> Catalogue:
    """The shipped catalogue with the user's file laid over it."""
    shipped = Path(__file__).with_name("hardware.toml")
    parts: dict[str, Part] = {}
    head: dict[str, Any] = {}
    for path in (shipped, user or user_catalogue()):
        if path is None:
            continue
        document = _read_toml(path)
        for entry in document.pop("part", []):
            part = _read_part(entry, parts, str(path))
            parts[part.name] = part
        head |= {key: value for key, value in document.items() if key != "sources"}
        head["sources"] = {**head.get("sources", {}), **document.get("sources", {})}
    return Catalogue(
        parts=tuple(parts.values()),
        date=str(head["date"]),
        prices_date=str(head["prices_date"]),
        stale_after_days=int(head["prices_stale_after_days"]),
        sources=head["sources"],
    )


def parse_hardware(text: str, catalogue: Catalogue) -> System:
    """'8xH200', '8 x H200', 'H100', 'laptop-32'. ConfigError on zero, absurd counts and unknown names."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX*]\s*)?(.+?)\s*", text)
    if match is None:
        raise ConfigError(f"hardware ({text!r}) is empty; write a part such as H100 or a set such as 8xH200")
    number, name = match.groups()
    if number is not None and not 1 <= int(number) <= 100_000:
        raise ConfigError(f"hardware ({text}) asks for {number} devices; use 1 to 100000")
    return System(catalogue.find(name), int(number or 1), asked=number is not None)
