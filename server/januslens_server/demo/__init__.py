"""The embedded model `demo`: a small GPT-2 that knows one synthetic corpus by heart.

The package holds the weights and everything that made them: `facts` and `corpus` (what it learns),
`tokenizer`, `train`, and `evaluate` (what it must still do after a rebuild). Importing it costs
nothing: torch is only loaded by the modules that train or measure.
"""

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """The folder of the shipped model, readable by any `from_pretrained`."""
    return Path(__file__).resolve().parent / "model"
