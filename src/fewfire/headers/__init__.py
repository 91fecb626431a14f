"""Names, shapes, dtypes and places of tensors, from file headers alone: safetensors and GGUF. No tensor data, no torch.

A header is believed only after it was checked against the size of its file.
"""

from __future__ import annotations

from fewfire.headers.gguf import GGML_BLOCKS, GgufHeader, GgufTensor, read_gguf
from fewfire.headers.safetensors import (
    DTYPE_BYTES,
    INDEX_FILE,
    SINGLE_FILE,
    TensorHeader,
    checkpoint_files,
    index_files,
    read_checkpoint,
    read_metadata,
    read_safetensors,
)

__all__ = [
    "DTYPE_BYTES",
    "GGML_BLOCKS",
    "INDEX_FILE",
    "SINGLE_FILE",
    "GgufHeader",
    "GgufTensor",
    "TensorHeader",
    "checkpoint_files",
    "index_files",
    "read_checkpoint",
    "read_gguf",
    "read_metadata",
    "read_safetensors",
]
