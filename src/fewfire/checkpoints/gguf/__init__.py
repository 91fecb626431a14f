"""GGUF files in and out: metadata to a hub config and back, tensor names, block types; bytes as headers place them."""

from __future__ import annotations

from fewfire.checkpoints.gguf.read import GgufCheckpoint, open_gguf
from fewfire.checkpoints.gguf.values import GgufValues
from fewfire.checkpoints.gguf.write import save_gguf

__all__ = ["GgufCheckpoint", "GgufValues", "open_gguf", "save_gguf"]
