"""The REST service: images in; scores, heatmaps and decisions out."""

from importlib.metadata import version

__version__ = version("skrd4ad")
