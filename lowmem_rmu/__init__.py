"""lowmem-rmu: make a chat model forget hazardous knowledge on the GPU you already own, and prove it."""

__version__ = "0.1.0"
