"""Sizes and counts as people write them: '8GiB', '46.7B'. Owns parsing and printing of units; no policy."""

from __future__ import annotations

import re

from fewfire.errors import ConfigError

_BYTE_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _BYTE_UNITS[f"{_letter}b"] = 1000**_power
    _BYTE_UNITS[f"{_letter}ib"] = 1024**_power
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_bytes(text: str | int, *, name: str = "size") -> int:
    """Bytes of '8GiB', '512 MB' or '1000'. GB is 10^9, GiB is 2^30; a bare letter ('8G') is refused as ambiguous."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _BYTE_UNITS:
        raise ConfigError(f"{name} ({text}) is not a size; write it as 8GiB, 512MB or a number of bytes")
    return int(float(match.group(1)) * _BYTE_UNITS[unit])


def parse_count(text: str | int, *, name: str = "count") -> int:
    """A whole number of '30b', '1.5T', '200k' or '4096' (decimal units, either case)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMbBtT]?)\s*", str(text))
    if match is None:
        raise ConfigError(f"{name} ({text}) is not a count; write it as 4096, 200k, 30b or 1.5t")
    return round(float(match.group(1)) * _COUNT_UNITS[match.group(2).lower()])


def format_bytes(num_bytes: float, *, binary: bool = True) -> str:
    """'87.0 GiB' (or '93.4 GB'): three figures or so, the largest unit that keeps the number at 1 or more."""
    step, suffix = (1024.0, "iB") if binary else (1000.0, "B")
    value, letters = float(num_bytes), ["", "k" if not binary else "K", "M", "G", "T", "P"]
    for letter in letters:
        if abs(value) < step or letter == letters[-1]:
            break
        value /= step
    unit = f"{letter}{suffix}" if letter else "B"
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"


def format_count(count: float) -> str:
    """'46.7B', '134.5M', '1.57T': a parameter count as papers print it."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= scale:
            value = count / scale
            return f"{value:.2f}{unit}" if value < 10 else f"{value:.1f}{unit}"
    return f"{count:g}"
