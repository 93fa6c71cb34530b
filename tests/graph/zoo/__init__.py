"""Small architectures that cover what the analyser understands, each with its own independent narrow construction."""

from . import (  # noqa: F401
    attention,
    attention_maps,
    branches,
    cnn,
    diffusion,
    fusion,
    language,
    mobile,
    norms,
    resampling,
    sharing,
    token_maps,
    transformers,
    windows,
)
from .architecture import ZOO, Architecture, make

#: Convolutional networks in which all that costs is convolutions and linear layers.
CLASSIC = [name for name, entry in ZOO.items() if entry.build.__module__ == cnn.__name__]

__all__ = ["CLASSIC", "ZOO", "Architecture", "make"]
