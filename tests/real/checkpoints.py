"""Read the published GGUF files that `make real` installed into folders that the server loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / ".cache" / "real"
PACKAGES = FOLDER / "packages"
SMOLLM, GEMMA = FOLDER / "smollm2", FOLDER / "gemma3"


def parts(pattern: str) -> list[Path]:
    """Return the installed files that match a pattern, in the order of their names."""
    found = sorted(PACKAGES.glob(pattern))
    if not found:
        raise SystemExit(f"no file {pattern!r} in {PACKAGES}; run make real")
    return found


def converted(target: Path, file: Path) -> None:
    """Write the weights of a GGUF file, dequantised to float32, and its tokenizer to a folder."""
    if (target / "tokenizer.json").exists():
        return
    folder, gguf_file = str(file.parent), file.name
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf_file, dtype=torch.float32
    )
    weights, config = model.state_dict(), model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(weights)
    plain.tie_weights()
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file).save_pretrained(target)


def joined(name: str, pattern: str) -> Path:
    """Join the parts of a file that are in several packages."""
    whole = FOLDER / name
    if not whole.exists():
        partial = whole.with_suffix(".partial")
        with partial.open("wb") as file:
            for part in parts(pattern):
                file.write(part.read_bytes())
        partial.rename(whole)
    return whole


def main() -> None:
    """Prepare both checkpoints; existing ones are kept."""
    (smollm,) = parts("**/SmolLM2-135M-Instruct.Q4_1.gguf")
    converted(SMOLLM, smollm)
    converted(GEMMA, joined("gemma3.gguf", "**/*.gguf.part[0-9]*"))


if __name__ == "__main__":
    main()
