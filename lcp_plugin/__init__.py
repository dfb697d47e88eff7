"""Low-rank continual personalization of SDXL (arXiv 2410.04891) as a plugin in the manner of
kohya's scripts.
"""

__version__ = "0.1.0"
