"""From weights to packs: `pack` quantizes a checkpoint, `initialise` draws random weights. Knows no command line."""

from fewfire.quantize.init import RandomWeights, initialise
from fewfire.quantize.pack import Packed, pack

__all__ = ["Packed", "RandomWeights", "initialise", "pack"]
