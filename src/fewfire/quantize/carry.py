"""A GGUF file's tensors on their way into a pack: blocks as they are, all else in a format that holds its values.

Owns the format that each parameter gets where nobody asked for another, and what the user is told of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from fewfire.checkpoints.gguf import GgufValues
from fewfire.checkpoints.gguf.read import PLAIN
from fewfire.config import ModelConfig
from fewfire.plan.memory import Formats, is_absorbed, matrix_bytes
from fewfire.plan.shapes import TensorSpec, model_tensors

# Without a format of their own here, these would lose too much in four bits.
_FIVE_BITS = frozenset(("q5_0", "q5_1", "q5_k"))


@dataclass(frozen=True)
class Kept:
    """What became of the tensors of one part that the file stores in one type. `exact`: the pack holds their values."""

    part: str
    stored: str
    format: str
    values: int
    exact: bool


def carry_over(values: GgufValues, config: ModelConfig, asked: Formats, named: frozenset[str]) -> Formats:
    """Formats in which a pack of `config` loses nothing of the file, where there are any; parts in `named` as `asked`.

    A part's format is the one that most of its bytes have; other parameters are overrides.
    """
    chosen = {}
    sizes: dict[str, Counter[str]] = {}
    for spec in model_tensors(config):
        part = asked.part(spec)
        if part not in named and spec.kind != "select_bias":
            chosen[spec] = _choose(values, spec, part, asked)
            sizes.setdefault(part, Counter())[chosen[spec]] += matrix_bytes(chosen[spec], spec.shape)
    parts = {part: counts.most_common(1)[0][0] for part, counts in sizes.items()}
    formats = dataclasses.replace(asked, **parts)  # type: ignore[arg-type]
    overrides = {spec.name: name for spec, name in chosen.items() if formats.of(spec) != name}
    return dataclasses.replace(formats, overrides=overrides)


def _choose(values: GgufValues, spec: TensorSpec, part: str, asked: Formats) -> str:
    types, home = values.types(spec.name), values.home(spec.name)
    plain = "bf16" if types == ("bf16",) else "f32"
    if part in ("router", "small"):
        return plain
    if is_absorbed(spec):
        return plain if PLAIN.keys() >= set(types) else "bf16"
    if home is not None:
        return home
    return "q8" if _FIVE_BITS & set(types) else asked.of(spec)


def describe(values: GgufValues, config: ModelConfig, formats: Formats) -> tuple[Kept, ...]:
    """What becomes of the file's tensors in a pack of `formats`, by part, stored type and format."""
    counts: Counter[tuple[str, str, str, bool]] = Counter()
    for spec in model_tensors(config):
        types, name = values.types(spec.name), formats.of(spec)
        exact = name == "f32" or values.home(spec.name) == name or types == (name,)
        counts[formats.part(spec), "+".join(types), name, exact] += spec.size
    return tuple(Kept(part, stored, name, size, exact) for (part, stored, name, exact), size in sorted(counts.items()))
