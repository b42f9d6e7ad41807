"""The embedded model `demo`: the weights and tokenizer of a small GPT-2.

The code that trained it is in `server/demo_training`, outside the installed package.
"""

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """The folder of the model, which `from_pretrained` can read."""
    return Path(__file__).resolve().parent / "model"
