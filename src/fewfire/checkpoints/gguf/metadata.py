"""A GGUF file's metadata under one architecture: typed values, and every key accounted for.

Floats come back as the shortest decimal that float32 cannot tell from them: 1e-05, not 9.99999974e-06.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fewfire.errors import FormatError
from fewfire.headers import GgufHeader

# Keys that tensors or the family's own rule say again, or that only concern how llama.cpp runs.
_WITHOUT_EFFECT = frozenset(
    "vocab_size attention.value_length attention.value_length_mla attention.causal rope.scaling.finetuned "
    "tensor_data_layout use_parallel_residual nextn_predict_layers leading_dense_block_count "
    "expert_shared_count rope.dimension_sections".split()
)


class Metadata:
    """What a GGUF file says of its model. `tensor(name)` gives the values of a small tensor as a list."""

    def __init__(self, header: GgufHeader, small_tensor: Callable[[str], list[float]]):
        self.header, self.prefix = header, f"{header.architecture}."
        self.path = str(header.path)
        self.small_tensor = small_tensor
        self._used: set[str] = set()

    def wrong(self, key: str, message: str) -> FormatError:
        return FormatError(message, path=self.path, record=self.prefix + key)

    def _get(self, key: str, default: Any) -> Any:
        self._used.add(key)
        return self.header.metadata.get(self.prefix + key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; where the file gives one a layer, all the same one."""
        value = self._get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if type(value) is not int or value < 0:
            raise self.wrong(key, f"is {value!r}, expected a whole number; download the file again")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, f"is {value!r}, expected a number; download the file again")
        return float(f"{value:.7g}")

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, f"is {value!r}, expected true or false; download the file again")
        return value

    def string(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, f"is {value!r}, expected a text; download the file again")
        return value

    def given(self, key: str) -> bool:
        self._used.add(key)
        return self.prefix + key in self.header.metadata

    def has_tensor(self, name: str) -> bool:
        return name in self.header.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        tensor = self.header.tensors.get(name)
        if tensor is None:
            raise FormatError("is missing; download the file again", path=self.path, record=name)
        return tensor.shape

    def token_id(self, name: str) -> int | None:
        value = self.header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and value >= 0 else None

    def close(self, ignore: frozenset[str]) -> None:
        """Raise FormatError for the first key of the architecture that nothing asked for: it might change the model."""
        for name in self.header.metadata:
            key = name.removeprefix(self.prefix)
            if key == name or key in self._used or key in _WITHOUT_EFFECT or name in ignore:
                continue
            raise FormatError(
                "is a key that fewfire does not know; if it does not change the mathematics, --ignore-key it",
                path=self.path,
                record=name,
            )
