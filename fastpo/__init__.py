"""fastpo: preference alignment for video and multi-image language models."""

__version__ = "0.1.0"
