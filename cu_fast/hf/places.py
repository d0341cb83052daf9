"""Places of a model: what leaves a module, or what it is given. Part of ``cu_fast.hf.attachment``.

    model.layers.8                                           the output of that module
    model.layers.8.self_attn.o_proj:in                       its first argument
    model.layers.8.mlp:in -> model.layers.8.mlp              read at one place, changed at another (a transcoder)

Releases name their place in words of their own: hooks of TransformerLens (blocks.8.hook_resid_post), modules with
.output or .input behind them (Gemma Scope 2), modules below the base model (layers.8, of sparsify), or folders (Gemma
Scope, OpenAI).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from torch import nn

from cu_fast.hf.sites import part

BLOCKS = ("layers", "h", "block", "blocks")  # what models call the list of their layers
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn")
GEMMA_SCOPE = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
OPENAI = {
    "resid_post_mlp": "hook_resid_post",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
}
BEFORE_MLP = ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm")  # the norm, the first that there is
BEHIND_MLP = "post_feedforward_layernorm"
OUTPUT_OF_HEADS = ("o_proj", "c_proj", "out_proj", "dense")


class Place(NamedTuple):
    """What leaves a module ("out"), or what it is given ("in")."""

    module: str
    side: Literal["in", "out"] = "out"

    def __str__(self) -> str:
        return self.module if self.side == "out" else f"{self.module}:in"


def places_of(model: nn.Module, name: str) -> tuple[Place, Place]:
    """Where a layer reads and what it changes.

    Args:
        model: that holds it.
        name: as in the module's docstring. A module's name may leave out what comes before, if one module ends in it.

    Raises:
        ValueError: no such place, or several; near names are listed.
    """
    reads, arrow, writes = (part.strip() for part in name.partition("->"))
    reads = _place(model, reads)
    return reads, _place(model, writes) if arrow else reads


def name_of(reads: Place, writes: Place) -> str:
    """The name that :func:`places_of` takes."""
    return str(writes) if reads == writes else f"{reads} -> {writes}"


def _place(model: nn.Module, text: str) -> Place:
    text = re.sub(r"\.(in|out)put$", r":\1", text)
    module, colon, side = text.partition(":")
    if hook := re.search(r"(?:^|/)blocks\.(\d+)\.(\S+)$", module):
        return _hook(model, int(hook[1]), hook[2])
    if scope := re.search(r"gemma-scope-[^/]*-(res|mlp|att)(?=/|$).*layer_(\d+)", module):
        return _hook(model, int(scope[2]), GEMMA_SCOPE[scope[1]])
    if openai := re.match(r"(resid_post_mlp|resid_delta_mlp|resid_delta_attn)_.*/(\d+)$", module):
        return _hook(model, int(openai[2]), OPENAI[openai[1]])
    if module == "hook_embed":
        embedding = model.get_input_embeddings()
        return Place(next(name for name, other in model.named_modules() if other is embedding))
    if colon and side not in ("in", "out"):
        raise ValueError(f"the layer {text!r} ends in {side!r}; it should end in :in or :out, or in the module's name")
    return Place(_resolved(model, module), side or "out")


def _resolved(model: nn.Module, name: str) -> str:
    names = [known for known, _ in model.named_modules() if known]
    if name in names:
        return name
    ends = [known for known in names if known.endswith(f".{name}")]
    decoder = part(model, "decoder")
    if decoder is not None and part(model, "encoder") is None:
        # Of a model for images and text those of its text. A numbered layer is the text's, or none: that for images may
        # have more, and as wide.
        inside = [m for m in ends if _is_part_of(model, m, decoder)]
        if len(inside) == 1 or re.match(rf"({'|'.join(BLOCKS)})\.\d+", name):
            ends = inside
    if name and len(ends) == 1:
        return ends[0]
    if ends:
        raise ValueError(f"the model has several layers {name!r}: {', '.join(ends)}; give one of these names")
    raise ValueError(f"the model has no layer {name!r}; {near(name, names)}")


def _is_part_of(model: nn.Module, name: str, owner: nn.Module) -> bool:
    module = model.get_submodule(name)
    return any(module is other for other in owner.modules())


def _hook(model: nn.Module, number: int, hook: str) -> Place:
    """The place of a hook of TransformerLens, "hook_resid_post" say, of a numbered layer."""
    names = [f"{blocks}.{number}" for blocks in BLOCKS]
    known = [name for name, _ in model.named_modules()]
    name = next((name for name in names if any(f".{module}".endswith(f".{name}") for module in known)), None)
    if name is None:
        raise ValueError(f"the model has no layer number {number} under {', '.join(BLOCKS)}; name the module instead")
    layer = _resolved(model, name)
    children = dict(model.get_submodule(layer).named_children())
    has_norms_behind = BEHIND_MLP in children and "pre_feedforward_layernorm" in children  # Gemma 2, 3
    unknown = ValueError(
        f"the place {hook!r} of layer {layer!r} is no module's input or output that is known; name the module instead"
    )

    def child(names: tuple[str, ...]) -> str:
        found = next((name for name in names if name in children), None)
        if found is None:
            raise ValueError(
                f"layer {layer!r} has none of {', '.join(names)} for hook {hook!r}; name the module instead"
            )
        return f"{layer}.{found}"

    if hook in ("hook_resid_post", "hook_resid_pre"):
        return Place(layer, "out" if hook == "hook_resid_post" else "in")
    if hook == "mlp.hook_in":
        return Place(child(MLP), "in")
    if BEHIND_MLP in children and not has_norms_behind and hook != "attn.hook_z":  # OLMo 2
        raise unknown
    if hook == "hook_mlp_in":  # TransformerLens' is before the norm
        return Place(child(BEFORE_MLP), "in")
    if hook == "hook_mlp_out":
        return Place(f"{layer}.{BEHIND_MLP}" if has_norms_behind else child(MLP))
    if hook == "hook_attn_out":
        return Place(f"{layer}.post_attention_layernorm" if has_norms_behind else child(ATTENTION))
    if hook == "attn.hook_z":
        attention = child(ATTENTION)
        inner = dict(model.get_submodule(attention).named_children())
        projection = next((name for name in OUTPUT_OF_HEADS if name in inner), None)
        if projection is not None:
            return Place(f"{attention}.{projection}", "in")
    raise unknown


def same_place(one: str, other: str) -> bool:
    """Whether two names are of one place, in a model and in the same one inside another: "layers.1", "model.layers.1"."""
    pairs = list(zip(one.split(" -> "), other.split(" -> ")))
    same = all(a == b or a.endswith(f".{b}") or b.endswith(f".{a}") for a, b in pairs)
    return same and one.count(" -> ") == other.count(" -> ")


def near(name: str, names: Iterable[str]) -> str:
    """For a message about an unknown name: which known names are like it."""
    names = list(names)
    if close := difflib.get_close_matches(name, names, n=5, cutoff=0.5):
        return f"near names: {', '.join(close)}"
    return f"there are: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else "there are none"
