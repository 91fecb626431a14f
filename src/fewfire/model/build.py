"""From a `ModelConfig` to the module that runs it."""

from __future__ import annotations

from fewfire.config import LstmConfig, ModelConfig
from fewfire.model.decoder import Decoder
from fewfire.model.encoder_decoder import EncoderDecoder
from fewfire.model.recurrent import Recurrent


def build_model(config: ModelConfig) -> Decoder | EncoderDecoder | Recurrent:
    """The model of `config`, freshly initialised, on torch's current default device ('meta' counts without memory)."""
    if config.encoder:
        return EncoderDecoder(config)
    if any(isinstance(layer.mixer, LstmConfig) for layer in config.layers):
        return Recurrent(config)
    return Decoder(config)
