"""Knowledge circuits: where a transformer keeps a piece of knowledge, and how it gets to the answer."""

__version__ = "0.2.0"
