"""Commands on released sparse autoencoders: bring one into the package's own files, and say what a folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cu_fast.cli.options import Json
from cu_fast.cli.tables import pairs
from cu_fast.cli.terminal import console, errors_are_messages

if TYPE_CHECKING:  # loads torch
    from cu_fast.sae import SAE

app = typer.Typer(no_args_is_help=True, help="Sparse autoencoders that others released.")


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Folder of the release, or its file of tensors: .pt, .pth, .npz, .safetensors."
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write, in SAELens' format.")],
    k: Annotated[
        int | None, typer.Option(help="Latents kept per token, where neither the files nor their names say it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a released autoencoder as cfg.json and sae_weights.safetensors; of a pickle only tensors are read."""
    with errors_are_messages():
        from cu_fast.sae import convert_sae

        _print(convert_sae(source, folder, k), as_json)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of the autoencoder, or its file of tensors.")],
    as_json: Json = False,
) -> None:
    """Print what a released autoencoder is: its family, kind, sizes, sites and identity."""
    with errors_are_messages():
        from cu_fast.sae import load_sae

        _print(load_sae(folder), as_json)


def _print(sae: SAE, as_json: bool) -> None:
    facts = facts_of(sae)
    print(json.dumps(facts, indent=2)) if as_json else console.print(pairs(facts, "sparse autoencoder"))


def facts_of(sae: SAE) -> dict[str, Any]:
    said = sae.provenance
    return {
        "family": sae.family,
        "kind": sae.kind,
        "C": sae.num_latents,
        "Din": sae.d_in,
        "Dout": sae.d_out,
        "k": sae.k,
        "scale": sae.scale,
        "site": sae.site,
        "site_out": sae.site_out,
        "model": said.model,
        "l0": said.l0,
        "dtype": said.dtype,
        "b_dec": sae.b_dec is not None,
        "sha256": sae.sha256(),
    }
