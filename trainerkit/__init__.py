"""A plugin framework on PyTorch Lightning.

`python -m trainerkit task=mae` trains; `from trainerkit.callbacks import EMA` drops one callback into any
Lightning project. Importing this package imports neither torch nor Hydra.
"""

__version__ = "0.1.0"
