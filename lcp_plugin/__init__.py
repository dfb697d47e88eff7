"""Low-rank continual personalization of SDXL (arXiv 2410.04891), in kohya's manner."""

__version__ = "0.1.0"
