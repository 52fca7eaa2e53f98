"""lit_align: align diffusion and flow-matching models with rewards and human preferences."""

__version__ = "0.1.0"
