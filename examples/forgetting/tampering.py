"""Attacks on the model, not on the prompt: other weights, noise, training, and probes of its states. Part of attacks.py."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from served import BATCH, Served
from shared import methods
from torch import Tensor
from training import RATES

import cu_fast
from cu_fast.rows import Collator, encode_row

RELEARN_STEPS, RELEARN_RATE = 20, RATES[-1]
GROUP = 64
NOISE_LAYERS, NOISE = (4, 8), (0.05, 0.1)  # codes are at layer 8
PROBED = (16, 26)  # layers


@contextlib.contextmanager
def hooked(module: torch.nn.Module, change: Callable[[Tensor], Tensor], first: bool) -> Iterator[None]:
    """What leaves a module is changed, before or behind what else changes it there."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    handle = module.register_forward_hook(hook, prepend=first)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def replaced(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model has other weights, by name, while the context is open."""

    @torch.no_grad()
    def put(values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            model.get_parameter(name).copy_(value)

    before = {name: model.get_parameter(name).detach().clone() for name in weights}
    put(weights)
    try:
        yield
    finally:
        put(before)


def noisy(model: torch.nn.Module, layer: int, size: float, seed: int = 0) -> contextlib.AbstractContextManager:
    """Gaussian noise on what leaves a layer."""
    generator = torch.Generator().manual_seed(seed)

    def change(x: Tensor) -> Tensor:
        rms = x.float().square().mean(-1, keepdim=True).sqrt()
        return x + (size * rms * torch.randn(x.shape, generator=generator)).to(x.dtype)

    return hooked(model.model.layers[layer], change, first=True)


@torch.no_grad()
def four_bits(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of the blocks' linear layers, rounded to 15 values for each GROUP of a row's; else for the row."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers."):
            width = module.in_features
            groups = module.weight.float().unflatten(1, (-1, width if width % GROUP else GROUP))
            scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
            found[f"{name}.weight"] = ((groups / scale).round() * scale).flatten(1)
    return found


@contextlib.contextmanager
def through_codes(attachment: cu_fast.Attachment) -> Iterator[None]:
    """Lets a gradient pass a layer with codes, at the tokens that are left as they are: a deletion itself has none."""
    with contextlib.ExitStack() as stack:
        for layer in attachment.bottlenecks:
            seen: list[Tensor] = []

            def keep(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen[:] = [x]
                return x.detach()

            def join(y: Tensor, seen: list[Tensor] = seen) -> Tensor:
                changed = (y != seen[0]).any(-1, keepdim=True)
                return torch.where(changed, y, seen[0])

            module = attachment.model.get_submodule(layer)
            stack.enter_context(hooked(module, keep, first=True))
            stack.enter_context(hooked(module, join, first=False))
        yield


class Relearning(methods.GradientAscent):
    """Plain training on rows, served as the method is."""

    def __init__(self, served: Served) -> None:
        self.served = served

    def start(self, model, tokenizer, forget: list[dict], retain: list[dict]) -> None:
        super().start(model, tokenizer, forget, retain)
        self.asked = [row["prompt"] for row in forget]

    def loss(self, model, forget: methods.Batch, retain: methods.Batch) -> Tensor:
        model.eval()  # it has no dropout, and masks are refused in training
        with self.served.deleting([self.asked[i] for i in forget.pop("row")]):
            return methods.nll(model, forget)


def relearn(served: Served, entries: Sequence[dict], seed: int) -> dict[str, Tensor]:
    """The weights after RELEARN_STEPS steps on these entries. served: in fp32; its weights change."""
    own = [{"prompt": served.prompt(entry["question"]), "completion": entry["answer"]} for entry in entries]
    rows = list(itertools.islice(itertools.cycle(own), RELEARN_STEPS * methods.BATCH))
    splices = served.attachment.bottlenecks.values() if served.attachment else []
    of_codes = {id(parameter) for splice in splices for parameter in splice.parameters()}
    for parameter in served.model.parameters():  # whatever a method has frozen
        parameter.requires_grad_(id(parameter) not in of_codes)
    with through_codes(served.attachment) if served.attachment else contextlib.nullcontext():
        methods.unlearn(
            served.model, served.tokenizer, Relearning(served), rows, rows, learning_rate=RELEARN_RATE, epochs=[1],
            seed=seed, measure=lambda *_: None,
        )  # fmt: skip
    return {name: weight.detach() for name, weight in served.model.named_parameters() if id(weight) not in of_codes}


def states(served: Served, entries: Sequence[dict]) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens of true answers are chosen; question and answer are read at once, as a prompt is.

    Returns:
        What leaves the layers of PROBED, fp32 [layers, T, D]; what the output layer reads, [T, D]; the tokens, int64 [T].
    """
    rows = [{"prompt": served.prompt(entry["question"]), "completion": entry["answer"]} for entry in entries]
    collate, found = Collator(served.tokenizer.pad_token_id), []
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        batch = collate([encode_row(served.tokenizer, row, 0.0, 4096) for row in some])
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with served.deleting([row["prompt"] for row in some]), torch.inference_mode():
            out = served.model.model(**given, output_hidden_states=True)
        left = torch.stack([out.hidden_states[layer + 1] for layer in PROBED] + [out.last_hidden_state])
        chosen = batch["loss_weights"][:, 1:] > 0
        found.append((left[:, :, :-1][:, chosen].float(), batch["labels"][:, 1:][chosen]))
    left, tokens = torch.cat([part[0] for part in found], 1), torch.cat([part[1] for part in found])
    return left[:-1], left[-1], tokens


def reading(served: Served, known: Sequence[dict], forgotten: Sequence[dict]) -> list[float]:
    """Of each layer of PROBED the share of the forgotten answers' tokens that a probe reads there.

    The probe maps a layer's states to what the output layer reads, linearly; it is fitted to answers that stay.
    """
    from sklearn.linear_model import Ridge

    (x, final, _), (asked, _, tokens), found = states(served, known), states(served, forgotten), []
    for seen, unseen in zip(x, asked):
        read = torch.from_numpy(Ridge().fit(seen.numpy(), final.numpy()).predict(unseen.numpy()))
        head = served.model.lm_head
        with torch.inference_mode():
            said = torch.cat([head(part.to(head.weight.dtype)).argmax(-1) for part in read.split(512)])
        found.append(float((said == tokens).double().mean()))
    return found
