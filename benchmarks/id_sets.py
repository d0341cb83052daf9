"""Which latents are the k best, by arithmetic: against fp64, on what a language model's layers say of real text.

python benchmarks/id_sets.py MODEL TEXT --sae 8=FOLDER --sae 15=FOLDER --output benchmarks/results/id_sets.csv

MODEL is a folder of transformers', TEXT a file that is read in rows of 256 tokens, each FOLDER a TopK autoencoder of what leaves
that layer (``cu_fast.sae.load_sae``). Per layer, for the raw hidden states and for the states less their mean, and for the first
tokens of each text alone, whose norms are a hundred times the others':

    wrong_sets      share of the rows whose k ids are not those of fp64's scores
    wrong_orders    share of the rows whose ids are not in fp64's order
    rms             error of all scores, over their standard deviation
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import transformers
import typer
from torch import Tensor

from cu_fast import ops
from cu_fast.bench import machine
from cu_fast.sae import SAE, load_sae

ROWS, LENGTH = 2_560, 256
FACTS = ("cpu_name", "simd", "cu_fast_version", "commit", "torch_version")


def rounded_to_tf32(x: Tensor) -> Tensor:
    """10 bits of fraction, ties to even: what a tensor core keeps of fp32."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def exact(x: Tensor, W: Tensor) -> Tensor:
    return (x.double() @ W.double().T).float()


# x [T, D], W [C, D], bias [C] -> scores [T, C]
ARITHMETIC: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cu_fast": lambda x, W, b: ops.sae_encode(x, ops.pack_codes(W, "dot", b, "none"), activation="none"),
    "torch fp32": F.linear,
    "TF32 factors, exact sums": lambda x, W, b: exact(rounded_to_tf32(x), rounded_to_tf32(W)) + b,
    "bf16 factors, exact sums": lambda x, W, b: exact(x.bfloat16(), W.bfloat16()) + b,
    "torch bf16": lambda x, W, b: F.linear(x.bfloat16(), W.bfloat16(), b.bfloat16()).float(),
}


@torch.no_grad()
def hidden_states(model: Path, text: Path, layers: list[int]) -> dict[int, Tensor]:
    """What leaves each layer: fp32 [rows, LENGTH, D]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    ids = ids[: ROWS // LENGTH * LENGTH].view(-1, LENGTH)
    states = [network(row[None], output_hidden_states=True).hidden_states for row in ids]
    return {layer: torch.cat([of_row[layer + 1] for of_row in states]).float() for layer in layers}


def compared(x: Tensor, W: Tensor, bias: Tensor, k: int) -> dict[str, dict[str, float]]:
    """Per arithmetic the three figures."""
    truth = x.double() @ W.double().T + bias.double()
    order = truth.sort(dim=1, descending=True, stable=True).indices[:, :k]
    sets = order.sort(1).values
    found = {}
    for name, score in ARITHMETIC.items():
        scores = score(x, W, bias)
        ids = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        found[name] = {
            "wrong_sets": (ids.sort(1).values != sets).any(1).double().mean().item(),
            "wrong_orders": (ids != order).any(1).double().mean().item(),
            "rms": ((scores.double() - truth).square().mean().sqrt() / truth.std()).item(),
        }
    return found


def main(
    model: Path,
    text: Path,
    sae: Annotated[list[str], typer.Option(help="LAYER=FOLDER of a TopK autoencoder; may be given several times.")],
    output: Annotated[Path, typer.Option(help="The CSV file that is written.")],
) -> None:
    """Compare sets of ids with fp64's."""
    saes: dict[int, SAE] = {int(layer): load_sae(Path(folder)) for layer, folder in (one.split("=", 1) for one in sae)}
    states = hidden_states(model, text, list(saes))
    facts = {name: value for name, value in machine.facts().items() if name in FACTS}
    rows = []
    for layer, fitted in saes.items():
        x, mean = states[layer], states[layer][:, 1:].flatten(0, 1).mean(0)
        rest = x[:, 1:].flatten(0, 1)
        # The same scores of states less their mean: what leaves them goes to the bias.
        shifted = (fitted.bias.double() + fitted.enc.double() @ mean.double()).float()
        for what, given, bias in (
            ("raw", rest, fitted.bias),
            ("less their mean", rest - mean, shifted),
            ("first tokens", x[:, 0], fitted.bias),
        ):
            for name, figures in compared(given, fitted.enc, bias, fitted.k).items():
                row = {"layer": layer, "states": what, "arithmetic": name, "T": len(given), "E": fitted.d_in,
                       "C": fitted.num_latents, "k": fitted.k}  # fmt: skip
                rows.append(row | figures | facts | {"timestamp": time.strftime("%Y-%m-%d %H:%M:%S")})
                print(f"layer {layer}, {what}, {name}:", {key: f"{value:.2g}" for key, value in figures.items()})
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
