"""Configs that hold a text_config beside a vision tower: the text is read, the rest recorded as it is.

Owns `ModelConfig.vision`: JSON text of the keys that describe the tower, written back unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fewfire.config import ModelConfig
from fewfire.families.reader import Reader, read_format, read_tokens, write_format

ReadText = Callable[[Reader, str, dict[str, Any]], ModelConfig]


def read(hub: Reader, family: str, vision_keys: tuple[str, ...], read_text: ReadText) -> ModelConfig:
    """`text_config` by `read_text`, with the top level's head, tokens and format where it says them."""
    text = hub.section("text_config")
    text.skip("model_type")
    vision = {key: hub.get(key, default=None) for key in vision_keys if hub.has(key)}
    hub.skip(*vision_keys)
    native = read_format(text, default=read_format(hub))
    if hub.has("quantization_config"):
        native = read_format(hub)
    tokens = read_tokens(hub)
    tokens = {key: value for key, value in tokens.items() if value not in (None, ())}
    text.skip("tie_word_embeddings")  # the top level's holds, whose class has the head
    fields = {
        "vision": json.dumps(vision, sort_keys=True),
        "native_format": native,
        "tied_head": hub.boolean("tie_word_embeddings", default=False),
        **tokens,
    }
    hub.expect("is_encoder_decoder", False)
    config = read_text(text, family, fields)
    text.close()
    return config


def write(config: ModelConfig, architecture: str, text: dict[str, Any]) -> dict[str, Any]:
    """The outer object around `text`, with the vision keys as they were read."""
    inner = {key: value for key, value in text.items() if key not in ("architectures", "quantization_config")}
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "text_config": inner,
        "tie_word_embeddings": config.tied_head,
        **write_format(config.native_format),
        **json.loads(config.vision or "{}"),
    }
