"""Splices in a live ``transformers`` model, and which masks hold.

    attachment = cu_fast.attach(model, {"model.layers.8": sae})
    with attachment.unlearn("topic"):
        model.generate(...)

A hook on each named layer changes the hidden state that leaves the layer, after the residual connection: through the
layer's splice, which replaces it, or takes out of it what deleted codes wrote. The splice is a child module of the layer,
so that a bottleneck moves, trains and is saved with the model. The model keeps its class, its parameters and their
names, and ``detach()`` takes everything out again.

Which masks hold is a context variable, so threads and tasks do not disturb one another. Once there is a mask, a
forward raises where nothing was said in its context, or where masks cannot be applied: the model never quietly runs
without a mask.

The private halves, in reading order: ``attach`` (puts splices in), ``places`` (where), ``check`` (do they fit there),
``topics`` (from names to rows of a mask table) and ``request`` (what one block deletes), ``active`` (what holds now) and
``compiled`` (what a compiled model calls), ``context`` (the block that ``unlearn`` opens), ``gating`` (gates that are judged in
it), ``hooks`` (what runs in a forward), ``states`` (caches), ``positions`` (the first tokens, which masks leave alone),
``generating`` and ``batching`` (``generate``, and transformers' continuous batching), ``sites`` (what attaching needs to know
of a model), ``files`` (an attachment on disk).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cu_fast.hf import files
from cu_fast.hf.active import Active, Silent
from cu_fast.hf.batching import wrap_batching
from cu_fast.hf.capture import CapturedForward
from cu_fast.hf.check import check
from cu_fast.hf.context import Unlearning
from cu_fast.hf.forwards import GRAPHS_ON
from cu_fast.hf.generating import wrap_generate
from cu_fast.hf.guarded import Guarded
from cu_fast.hf.hooks import CHILD, LayerHook, ModelHook
from cu_fast.hf.sites import is_in, model_type, part, prefixes, sequences, submodule
from cu_fast.hf.topics import Entry, Layer, Topics
from cu_fast.masks import Mask
from cu_fast.nn import Splice
from cu_fast.ops import MASK_MODES, MaskMode
from cu_fast.ops.checks import check_choice

if TYPE_CHECKING:
    from cu_fast.hf.checkpoint import Tokenizer


class Attachment:
    """The splices of one model, its masks, and what holds now. Made by :func:`cu_fast.attach`.

    Attributes:
        model: the model.
        bottlenecks: layer name -> its splice, a CodebookBottleneck or an SAESplice; read-only.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], silent: Silent) -> None:
        self.model = model
        self.bottlenecks: Mapping[str, Splice] = MappingProxyType({layer.name: layer.bottleneck for layer in layers})
        self._layers = layers
        self._modules = [model.get_submodule(layer.writes.module) for layer in layers]
        self._topics = Topics(self._layers)
        self._active = Active(self._layers, self._topics, silent)
        self._undo: list[Callable[[], None]] | None = None

    # -- masks -----------------------------------------------------------------------------------------------

    @property
    def masks(self) -> Mapping[str, tuple[Mask, ...]]:
        """Name -> its masks, one per layer that it deletes codes of; a read-only view."""
        return MappingProxyType(self._topics.masks)

    def add_mask(self, mask: Mask | Iterable[Mask], name: str | None = None, *, elsewhere: bool = False) -> str:
        """Make masks known under one name, each for the layer whose codebook it was made for.

        Args:
            mask: one, or one per layer. Copied: writing to it later changes nothing here.
            name: None = their topic. Names are compared in Unicode's form NFC.
            elsewhere: take a mask that was found at another place, whose codebook or autoencoder is the same.

        Returns:
            The name, in form NFC.

        Raises:
            ValueError: a mask made for another codebook or found at another place, one that deletes no code, several
                topics and no name, or a name that is taken or looks like one that is.
        """
        self._check_usable()
        return self._topics.add(mask, name, elsewhere)

    def load_mask(self, path: str | Path, name: str | None = None, *, elsewhere: bool = False) -> str:
        """:meth:`add_mask` from a folder written by ``Mask.save``, or from one that holds several, one per layer.

        Args:
            path: the folder.
            name: as for :meth:`add_mask`, and so is the next.
            elsewhere: take a mask that was found at another place.

        Returns:
            The name, in form NFC.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or as :meth:`add_mask` raises.
        """
        self._check_usable()
        return self._topics.load(path, name, elsewhere)

    def remove_mask(self, name: str) -> None:
        """Forget a name. A context that uses it goes on.

        Raises:
            ValueError: an unknown name, or one that always holds.
        """
        self._check_usable()
        self._topics.remove(name)

    def erase(self, name: str) -> None:
        """Remove a mask's codes from the weights for good, and the mask with them; other masks stay usable.

        The live bottlenecks change, in place; call :meth:`save` to keep the change. Copies saved before still hold the
        codes. The next best codes take the places of the erased, as mask_mode "reselect" does: measure in that mode
        first.

        Raises:
            ValueError: an unknown name, or fewer than k codes would remain.
            RuntimeError: an unlearn context is open, or a generate under masks has not ended.
        """
        self._check_usable()
        self._active.check_nothing_open("erase()")
        self._topics.erase(name)
        self._hold_always()

    # -- what holds ------------------------------------------------------------------------------------------

    @property
    def always(self) -> frozenset[str]:
        """Names of masks that hold in every forward, in addition to those that ``unlearn`` names.

        Set it to a collection of names while no ``unlearn`` context is open. It is a setting of this process, which
        ``save`` leaves out.

        Raises:
            ValueError: when set, an unknown name.
            TypeError: when set, one text instead of a collection.
            RuntimeError: when set, an unlearn context is open, or a generate under masks has not ended.
        """
        return self._topics.always

    @always.setter
    def always(self, names: Collection[str]) -> None:
        self._check_usable()
        if isinstance(names, str):
            raise TypeError(f"always is {names!r}; it should be a set of names")
        known = frozenset(map(self._topics.known, names))
        self._active.check_nothing_open("always cannot change")
        self._topics.always = known
        self._hold_always()

    def _hold_always(self) -> None:
        self._active.standing = self._topics.request(None) if self.always else None

    def unlearn(self, topics: Entry | list[Entry], *, gated: bool = False) -> Unlearning:
        """Delete topics while the context is open, in this thread (or task) only: ``with attachment.unlearn("a"):``.

        An inner context replaces the outer one, whatever either deletes. Another thread starts with none. A copy of the
        context (``contextvars.copy_context``, a task) holds what it was copied with until the block is left; after that
        a forward raises, as where nothing was said. In ``generate`` there is one entry per sequence of its input, which
        holds for all beams and return sequences made of it. Work given to transformers' continuous batching inside the
        block keeps its masks until it ends.

        Args:
            topics: a mask's name; a set of names = their union; None = nothing, said explicitly; or a list with one
                entry per sequence of the batch, each a name, a collection of names (their union) or None. The masks of
                :attr:`always` hold too.
            gated: masks that carry a learned gate (``cu_fast.unlearn.fit_gate``) delete in a sequence only from the
                forward on in which the gate fires, over all of its tokens so far, the prompt first; other masks hold
                throughout. Without a cache each forward is judged by itself. In eager mode, neither under continuous
                batching nor with assisted decoding. On a GPU each forward then waits for the device.

        Returns:
            A context manager, which gives this attachment. It can be entered once.

        Raises:
            ValueError: where the block is entered, an unknown name, or an empty list or collection.
            TypeError: where the block is entered, topics that are not names.
            RuntimeError: where the block is entered, the model is in training mode, a swapped layer is no longer in the
                model, or a codebook is not the one that a mask was made for. Where the block is left, other contexts of
                this thread were entered or left in between, as generators in turns do.
        """
        self._check_usable()
        return Unlearning(self, self._active, topics, gated, self._check_model)

    def _check_model(self) -> None:
        self._check_usable()
        if self.model.training or any(module.training for module in self._modules):
            raise RuntimeError("the model is in training mode; call model.eval() before unlearn()")
        for layer, module in zip(self._layers, self._modules):
            if submodule(self.model, layer.writes.module) is not module or CHILD not in module._modules:
                raise RuntimeError(f"layer {layer.name!r} was replaced since attach(); masks would not reach it")

    @contextlib.contextmanager
    def observe(self, fn: Callable[[Tensor, Splice], None]) -> Iterator[Attachment]:
        """Call a function with what every splice reads, before anything is deleted there, while the context is open.

        In this thread (or task) only.

        Args:
            fn: called as ``fn(x, bottleneck)``, x [B, S, D] for a batch of B sequences of S tokens. x is the model's
                own tensor: do not write to it.
        """
        self._check_usable()
        token = self._active.observer.set(fn)
        try:
            yield self
        finally:
            self._active.observer.reset(token)

    def capture(self, call: Callable[[], Any], batch: int) -> CapturedForward:
        """Capture a call of the model in a CUDA graph, which is replayed under whatever masks hold then.

        ``captured = attachment.capture(lambda: model(**given).logits, batch=8)``, then
        ``with attachment.unlearn("a"): logits = captured.replay()``. A graph that is captured in another way is refused;
        one that is replayed in another way computes NaN. Masks may be added between replays. A replay raises where it must
        be captured again: a table of masks has grown, weights were written to, ``mask_mode`` was changed. A table grows for
        a request that changes more codes than all masks together that were known here, or beyond 64 requests at a time.

        Args:
            call: calls the model, in eager mode and as often as it likes, on tensors that replays find at the same
                addresses. It is run once, without masks and gradients, before it is captured: a cache that it fills is to
                be reset then.
            batch: sequences in each call of the model.

        Returns:
            The captured call: ``replay()`` runs it and returns what it returned.

        Raises:
            RuntimeError: a swapped layer is not on the CUDA device of the others, or did not run; the model is in training
                mode.
        """
        self._check_model()
        device, *others = sorted({layer.table.tensors[0].device for layer in self._layers}, key=str)
        if others or device.type not in GRAPHS_ON:
            found = ", ".join(map(str, [device, *others]))
            raise RuntimeError(f"the swapped layers are on {found}; a CUDA graph needs them on one CUDA device")
        for topics in self.masks, *self.masks:  # room in the tables for their union, or at least for each
            with contextlib.suppress(ValueError), self._active.under(topics or None):
                pass
        return CapturedForward(self._active, self._check_usable, call, batch, device)

    # -- figures ---------------------------------------------------------------------------------------------

    @property
    def mask_mode(self) -> MaskMode | Literal["mixed"]:
        """What a mask does, "ablate" or "reselect"; "mixed" where layers differ. Set it for every layer at once.

        Raises:
            ValueError: when set, another value, or "reselect" where a splice keeps the hidden state.
            RuntimeError: when set, masks hold in any thread, or a generate under masks has not ended.
        """
        modes = {bottleneck.mask_mode for bottleneck in self.bottlenecks.values()}
        return modes.pop() if len(modes) == 1 else "mixed"

    @mask_mode.setter
    def mask_mode(self, mode: MaskMode) -> None:
        self._check_usable()
        check_choice("mask_mode", mode, MASK_MODES)
        if mode == "reselect" and (kept := [v.name for v in self._layers if v.bottleneck.splice == "delta"]):
            raise ValueError(
                f"mask_mode is 'reselect'; layers {kept} keep the hidden state, and select nothing instead"
            )
        self._active.check_idle("mask_mode cannot change")
        for bottleneck in self.bottlenecks.values():
            bottleneck.mask_mode = mode
        self._hold_always()

    def report(self) -> list[dict[str, Any]]:
        """What ran since :meth:`reset_report`, one dict per layer.

        Returns:
            layer: its name.
            splice: "replace" or "delta".
            codes: C.
            k: codes kept per token; None for latents with a threshold.
            mask_mode: "ablate" or "reselect".
            impl: "reference", "cpu", "cuda" or "triton".
            scan: "int8", or "none": every code is scored.
            tokens: how many passed; of a "delta" splice those of requests that delete.
            hits: how many kept codes masks took away.
            changed, dose, max_dose: of a "delta" splice the tokens that masks changed, and the mean and the largest
                ||y - x|| / ||x|| of those.
            masks: those known for this layer, each with name, digest and deleted, its number of codes.
        """
        self._check_usable()
        return [
            {
                "layer": layer.name,
                "splice": layer.bottleneck.splice,
                "codes": layer.bottleneck.num_codes,
                "k": layer.bottleneck.k,
                "mask_mode": layer.bottleneck.mask_mode,
                **layer.bottleneck.receipt(),
                **layer.bottleneck.doses(),
                "masks": self._topics.known_for(layer),
            }
            for layer in self._layers
        ]

    def reset_report(self) -> None:
        """Set the counts of :meth:`report` to 0."""
        self._check_usable()
        for bottleneck in self.bottlenecks.values():
            bottleneck.reset_receipt()

    def check(
        self, tokenizer: Tokenizer, texts: Iterable[str], *, batch_size: int = 8, max_length: int = 512
    ) -> list[dict[str, Any]]:
        """Does each splice fit its place? Figures of texts; for causal models.

        Args:
            tokenizer: the model's.
            texts: a few hundred sentences like those that the autoencoder was made from, iterated once.
            batch_size: texts per forward pass.
            max_length: tokens that a text is cut to.

        Returns:
            One dict per layer. layer: its name. tokens: how many were looked at; the first of each text is not, as masks
            leave it alone. l0: codes kept per token. stated_l0: what the release says; None = nothing. dead_share: of the
            codes, those that no token kept. explained_variance: the share that the reconstruction explains; None where
            the release's biases are not known. loss: of the model as it is, with "delta" splices and nothing deleted, in
            nats per token. loss_replaced: with this layer's output replaced by its reconstruction; None likewise.

        Raises:
            ValueError: l0 is not what the release says, by more than a factor of two; the reconstruction explains less
                than a fifth of the variance; or no texts.
            RuntimeError: masks of texts cannot be matched to what a layer reads.
        """
        self._check_usable()
        return check(self, tokenizer, texts, batch_size=batch_size, max_length=max_length)

    def auxiliary_loss(self) -> Tensor:
        """The sum of the bottlenecks' losses of the last training forward: a scalar, on the first one's device.

        Raises:
            RuntimeError: no training forward has run.
        """
        self._check_usable()
        losses = [bottleneck.auxiliary_loss() for bottleneck in self.bottlenecks.values()]
        return sum(loss.to(losses[0].device) for loss in losses)

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the bottlenecks and masks, not the model, to a folder that :func:`attach` reads, whole or not at all.

        Raises:
            FileExistsError: ``path`` is there and is no attachment, which would be lost.
            ValueError: a mask's name that no file can have.
            RuntimeError: the masks brought their rows, and there is no autoencoder to write.
        """
        self._check_usable()
        files.write(Path(path), self._layers, self.masks, type(self.model).__name__, model_type(self.model))

    # -- hooks -----------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Take the bottlenecks out; the model is as before ``attach``, bit for bit. The attachment is of no more use.

        Raises:
            RuntimeError: masks hold in any thread, or a generate under masks has not ended.
        """
        self._check_usable()
        self._active.check_idle("detach()")
        for undo in reversed(self._undo):
            undo()
        self._undo = None
        _forget_compiled()

    def _check_usable(self) -> None:
        if self._undo is None:
            raise RuntimeError("the attachment was detached; attach() again")

    def _install(self) -> None:
        # First all that may fail. Models that hold swapped layers may be nested; the innermost is a layer's runner.
        owners: list[nn.Module] = []
        for layer, module in zip(self._layers, self._modules):
            around = [self.model.get_submodule(prefix) for prefix in prefixes(layer.writes.module)]
            around = [m for m in around if m is self.model or isinstance(m, PreTrainedModel)]
            owners += [m for m in around if not any(m is owner for owner in owners)]
            layer.runner = next(i for i, owner in enumerate(owners) if owner is around[-1])
            layer.in_encoder = is_in(module, part(self.model, "encoder"))
            layer.in_decoder = is_in(module, part(self.model, "decoder"))
        guards = [
            ModelHook(
                self._active, owner, runner,
                encoder_is_swapped=any(is_in(module, part(owner, "encoder")) for module in self._modules),
                tower_is_swapped=owner is self.model
                and any(not (layer.in_encoder or layer.in_decoder) for layer in self._layers),
                sequences=sequences(self.model, owner),
                skip_first=max(layer.skip_first for layer in self._layers if layer.runner == runner)
                if any(layer.runner == runner for layer in self._layers) else 0,
            )
            for runner, owner in enumerate(owners)
        ]  # fmt: skip
        undo = self._undo = []
        # Code that torch.compile makes for a plain model of the same class would fit this one: its guards do not notice
        # hooks. They notice a forward of its own.
        numbers = {id(owner): runner for runner, owner in enumerate(owners)}
        names = {id(module): name for name, module in self.model.named_modules(remove_duplicate=False)}
        reads = [self.model.get_submodule(layer.reads.module) for layer in self._layers]
        guarded: dict[int, Guarded] = {}
        for module in dict.fromkeys((*owners, *self._modules, *reads)):
            one = guarded[id(module)] = Guarded(module, names[id(module)], self._active, numbers.get(id(module)))
            if "forward" not in vars(module):
                undo.append(one.install())
        for index, (layer, module) in enumerate(zip(self._layers, self._modules)):
            module.add_module(CHILD, layer.bottleneck)
            undo.append(functools.partial(module._modules.pop, CHILD))
            hook, own = LayerHook(self._active, index), guarded[id(module)]
            # Prepended, so hooks registered by others see the splice's output; before a module they run last.
            if layer.writes.side == "out":
                undo.append(own.add(module.register_forward_hook(hook.after, prepend=True)))
            else:
                undo.append(own.add(module.register_forward_pre_hook(hook.before, with_kwargs=True)))
            if layer.reads != layer.writes:
                read = self.model.get_submodule(layer.reads.module)
                own = guarded[id(read)]
                if layer.reads.side == "out":
                    undo.append(own.add(read.register_forward_hook(hook.read_after, prepend=True)))
                else:
                    undo.append(own.add(read.register_forward_pre_hook(hook.read_before, with_kwargs=True)))
        for owner, guard in zip(owners, guards):
            own = guarded[id(owner)]
            undo.append(own.add(owner.register_forward_pre_hook(guard.before, with_kwargs=True)))
            undo.append(own.add(owner.register_forward_hook(guard.after, with_kwargs=True)))
            undo.append(own.add(owner.register_forward_hook(guard.ended, with_kwargs=True, always_call=True)))
        if hasattr(self.model, "generate"):
            undo.append(wrap_generate(self.model, self._active))
        if hasattr(self.model, "init_continuous_batching"):
            undo.append(wrap_batching(self.model, self._active))
        _forget_compiled()


def _forget_compiled() -> None:
    """Let torch.compile compile again: its guards do not notice hooks that came or went since."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
