"""Put splices into a live ``transformers`` model, in place: the door of ``cu_fast.hf``."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from cu_fast.hf import files
from cu_fast.hf.active import Silent
from cu_fast.hf.attachment import Attachment
from cu_fast.hf.hooks import CHILD
from cu_fast.hf.places import Place, name_of, places_of
from cu_fast.hf.sites import device_of, has_sink, hidden_size, model_type
from cu_fast.hf.topics import Layer
from cu_fast.masks import Mask, load_masks
from cu_fast.nn import SPLICES, BottleneckConfig, CodebookBottleneck, Splice, SpliceKind
from cu_fast.ops import Impl
from cu_fast.ops.checks import check_choice
from cu_fast.sae import SAE, SAESplice, load_sae

# Models that keep their recurrent state in their own modules, where it cannot carry a stamp.
KEEP_THEIR_STATE = ("recurrent_gemma",)

Source = SAE | BottleneckConfig | str | Path  # a released autoencoder, a fresh bottleneck, or an autoencoder's folder


def attach(
    model: nn.Module,
    source: str | Path | SAE | Mapping[str, Source],
    *,
    splice: SpliceKind | None = None,
    skip_first: int | None = None,
    impl: Impl = "auto",
    silent: Silent = "refuse",
) -> Attachment:
    """Put sparse autoencoders or codebook bottlenecks at layers of a live model, in place.

    Code that ``torch.compile`` made in this process before would not run them; it is compiled again at its next call.

    Args:
        model: a ``transformers`` model, dispatched over devices or not. Give the outermost model that is called: caches
            and encoder outputs that are given to a model around it are not checked.
        source: layer name -> a released autoencoder (:func:`cu_fast.load_sae`), its folder, or the config of a fresh
            bottleneck. Names are as in ``model.named_modules()``, or the end of one; "name:in" is what the module is
            given, "a:in -> b" is read at one place and changed at another, as a transcoder's. Or an autoencoder alone,
            which goes where its release says. Or a folder written by :meth:`Attachment.save`, its masks included.
        splice: "replace" = the hidden state becomes what the kept codes decode to; for bottlenecks that the model was
            trained with. "delta" = it stays as it is, but for what deleted codes wrote: without a mask the model is as it
            was, bit for bit. None = what a config or folder says; "delta" for autoencoders, which can do nothing else.
        skip_first: positions at the start of each sequence that masks of a "delta" splice leave alone: the first is an
            attention sink, which no autoencoder was fitted to. None = what a folder says, unless splice is given; else 1
            in a model that attends to what came before alone and has no encoder, and 0 in others.
        impl: of every operator: "auto", "reference", "cpu", "cuda" or "triton".
        silent: what happens in a forward outside every :meth:`Attachment.unlearn`, once there is a mask that does not
            always hold. "refuse" = it raises. "plain" = it deletes :attr:`Attachment.always` alone; work that is handed
            to a thread then runs without its request's masks.

    Returns:
        The Attachment. Each splice is on its layer's device, in its own dtype, in the model's mode. The global random
        state is left as it was.

    Raises:
        ValueError: no such layer (near names are listed); a width that is not the model's; a model that already
            has splices, or keeps its state where masks cannot be checked; a damaged folder, or one made for another
            model; splice "replace" for an autoencoder.
        TypeError: not a model, or one whose code is fixed (torch.jit, or the wrapper of torch.compile).
        RuntimeError: ``impl`` cannot run here.
        After an error the model is as before.
    """
    _check_model(model, silent)
    if splice is not None:
        check_choice("splice", splice, SPLICES)
    if skip_first is not None:
        _check_skip(skip_first)
    with torch.inference_mode(False):
        masks: Mapping[str, list[Mask]] = {}
        if isinstance(source, SAE):
            source = {_site_of(source.site, source.site_out): source}
        if isinstance(source, Mapping):
            parts = {name: _fresh(name, value, splice) for name, value in source.items()}
        else:
            record = _record_for(model, Path(source))
            parts, masks = files.read_splices(Path(source), record, splice), files.read_masks(Path(source), record)
            if skip_first is None and splice is None:
                skip_first = record.skip_first
        return _attached(model, parts, masks, skip_first, impl, silent)


def attach_masks(
    model: nn.Module,
    masks: Iterable[str | Path | Mask],
    *,
    layer: str | None = None,
    skip_first: int | None = None,
    impl: Impl = "auto",
    silent: Silent = "refuse",
) -> Attachment:
    """Serve masks that carry their rows (``Mask.save(path, rows=True)``), without the autoencoder that they are of.

    Args:
        model: as for :func:`attach`.
        masks: masks, or folders of masks; each is known under its topic.
        layer: the place of all of them, as for :func:`attach`; None = where each mask was found, or else where its
            autoencoder's release says.
        skip_first: as for :func:`attach`, as are the next two.
        impl: of every operator.
        silent: what happens in a forward outside every ``unlearn``.

    Returns:
        The Attachment, with the masks. Finding, counting and saving need the autoencoder, and raise.

    Raises:
        ValueError: a mask without rows, or of an autoencoder that ranks its latents (kind "topk"); no place, or none
            such; one topic twice; as :func:`attach`.
        FileNotFoundError, TypeError, RuntimeError: as :func:`attach` and ``Mask.load``.
    """
    _check_model(model, silent)
    if skip_first is not None:
        _check_skip(skip_first)
    if isinstance(masks, (str, Path, Mask)):
        raise TypeError(f"masks is {masks!r}; it should be a list of masks, or of their folders")
    loaded = [mask for one in masks for mask in ([one] if isinstance(one, Mask) else load_masks(one))]
    if not loaded:
        raise ValueError("masks is empty; give at least one mask, or the folder of one")
    with torch.inference_mode(False):
        parts: dict[str, Splice] = {}
        by_topic: dict[str, list[Mask]] = {}
        places: set[tuple[str, str]] = set()
        for mask in loaded:
            if mask.rows is None:
                raise ValueError(
                    f"mask {mask.topic!r} carries no rows; save it with rows=True where the autoencoder is at hand"
                )
            settings = mask.rows.settings()
            name = layer or mask.layer or _site_of(settings["site"], settings["site_out"])
            made = parts.setdefault(name, SAESplice(mask.rows, mask.num_codes, mask.codebook_sha256))
            if made.codebook_sha256() != mask.codebook_sha256:
                raise ValueError(f"masks of several autoencoders are for layer {name!r}; attach them one by one")
            if (mask.topic, name) in places:
                raise ValueError(f"there are several masks {mask.topic!r} for layer {name!r}; give one, or their union")
            places.add((mask.topic, name))
            by_topic.setdefault(mask.topic, []).append(mask)
        return _attached(model, parts, by_topic, skip_first, impl, silent)


def _check_model(model: nn.Module, silent: Silent) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it should be a transformers model")
    check_choice("silent", silent, typing.get_args(Silent))
    if hasattr(model, "_orig_mod"):
        raise TypeError("model is compiled; attach to the model itself, then call torch.compile")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError(
            "model holds torch.jit code, which would not run bottlenecks; attach before scripting or tracing"
        )
    if model_type(model) in KEEP_THEIR_STATE:
        raise ValueError(
            f"a {model_type(model)} model keeps its recurrent state in its modules, where it cannot be told which masks "
            f"it was computed under"
        )
    if getattr(model, "_cached_continuous_batching_manager", None) is not None:
        raise ValueError("model holds a batching manager; call destroy_cached_continuous_batching_manager() first")
    taken = [name for name, module in model.named_modules() if CHILD in module._modules]
    if taken:
        raise ValueError(f"layers {taken} already have bottlenecks; detach() them, or name all layers in one call")


def _check_skip(skip_first: int) -> None:
    if type(skip_first) is not int or skip_first < 0:
        raise ValueError(f"skip_first is {skip_first!r}; it should be an int, at least 0")


def _fresh(name: str, value: Source, splice: SpliceKind | None) -> Splice:
    if isinstance(value, (str, Path)):
        value = load_sae(value)
    if isinstance(value, SAE):
        if splice == "replace":
            raise ValueError(
                f"splice is 'replace', and layer {name!r} has an autoencoder that the model was not trained with; its "
                f"reconstruction in place of the hidden state costs a model much of what it knows. Take 'delta'"
            )
        return SAESplice(value)
    if not isinstance(value, BottleneckConfig):
        raise TypeError(
            f"layer {name!r} has {type(value).__name__}; it should be a BottleneckConfig, an SAE, or the folder of one"
        )
    config = value if splice is None else dataclasses.replace(value, splice=splice)
    with torch.random.fork_rng(devices=[]):
        return CodebookBottleneck(config)


def _record_for(model: nn.Module, path: Path) -> files.Record:
    record = files.read_record(path)
    if record.model_type != model_type(model):
        raise ValueError(
            f"{path} was made for a model of type {record.model_type!r} ({record.model_class}), and this one is "
            f"{model_type(model)!r} ({type(model).__name__})"
        )
    return record


def _site_of(site: str | None, site_out: str | None) -> str:
    if site is None:
        raise ValueError("the autoencoder does not say where it belongs; give {layer name: autoencoder}")
    return site if site_out is None else f"{site} -> {site_out}"


def _attached(
    model: nn.Module,
    parts: Mapping[str, Splice],
    masks: Mapping[str, list[Mask]],
    skip_first: int | None,
    impl: Impl,
    silent: Silent,
) -> Attachment:
    if not parts:
        raise ValueError("no layer is named; give {layer name: autoencoder or BottleneckConfig}")
    layers: list[Layer] = []
    for name, part in parts.items():
        reads, writes = places_of(model, name)
        module = model.get_submodule(writes.module)
        for place, width, which in ((reads, part.d_in, "d_in"), (writes, part.d_out, "d_out")):
            known = _width(model, place)
            if known is not None and width != known:
                which = "d_model" if isinstance(part, CodebookBottleneck) else which
                raise ValueError(
                    f"{which} of layer {name!r} is {width}; the model's width at {str(place)!r} is {known}"
                )
        if any(layer.writes.module == writes.module for layer in layers):
            raise ValueError(
                f"layer {name!r} and another one change module {writes.module!r}; give one for each module"
            )
        part.impl = impl
        device = device_of(module)
        if device.type == "meta":
            raise ValueError(f"layer {name!r} is on the meta device; load the model's weights first")
        part.to(device).train(module.training)
        part.receipt()  # an impl that cannot run raises here, not in the first forward
        skip = int(has_sink(model, writes.module)) if skip_first is None else skip_first
        skip = skip if part.splice == "delta" else 0
        layers.append(Layer(name_of(reads, writes), part, part.new_table(device), reads, writes, skip))
    attachment = Attachment(model, layers, silent)
    for name, some in masks.items():
        attachment._topics.add(some, name, elsewhere=True)
    attachment._install()
    return attachment


def _width(model: nn.Module, place: Place) -> int | None:
    """The width of a place, None where the model does not say."""
    module = model.get_submodule(place.module)
    linear = getattr(module, f"{place.side}_features", None)
    if linear is None and type(module).__name__ == "Conv1D":  # GPT-2's, [in, out]
        linear = module.weight.shape[0 if place.side == "in" else 1]
    return hidden_size(model, place.module) if linear is None else linear
