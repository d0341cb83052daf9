"""Methods that train, beyond those of examples/tofu/methods.py, each as its paper has it. Part of the study in this folder.

    RMU      L = mean |h(forget) - c u|^2 + a mean |h(retain) - h_0(retain)|^2              Li et al., arXiv 2403.03218
    ME+GD    L = 0.1 KL(uniform || p(. | forget)) + nll(retain)                             Yuan et al., arXiv 2410.08109
    IDK+AP   L = nll(refusal | forget) - 1/b E log sigmoid(-b (log p(refusal | retain) - log p(answer | retain)))     the same
    ICU      L = -nll(forget) + 0.5 nll(pair) + 1.0 KL(p_0 || p)(pair)                      Tang et al., arXiv 2407.20271

h: what leaves a layer; h_0, p_0: before unlearning; nll and log p as in methods.py. All means are over answers' tokens.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import generate
from shared import methods
from torch import Tensor

from cu_fast.rows import encode_row

Batch = methods.Batch


def answers_of(values: Tensor, batch: Batch) -> Tensor:
    """Of values [B, S, n] those at the positions that predict answers' tokens: [tokens, n]."""
    return values[:, :-1][batch["loss_weights"][:, 1:] > 0]


class _Reached(Exception):
    """Ends a forward at the layer whose output is wanted."""


def leaves(model, layer: int, batch: Batch) -> Tensor:
    """What leaves a layer, [B, S, D]; the layers above do not run."""
    kept = []

    def keep(module, given, output) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = model.model.layers[layer].register_forward_hook(keep)
    try:
        model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    except _Reached:
        pass
    finally:
        handle.remove()
    return kept[0]


class RMU(methods.GradientAscent):
    """Representation misdirection: what leaves a layer is pushed to a random direction for the forget set, and held elsewhere.

    The paper: layer 7 of 32, the down projections of layers 5 to 7 trained, a = 1200, c = 6.5 to 300 by model, a rate of
    5e-5, batches of 4, up to 500 of them. Here the layer has the same index, and c is a multiple of what leaves it.

    Args:
        scale: c, as a multiple of the mean length of h on the forget set.
    """

    per_row = 2
    LAYER, TRAINED, HOLD = 7, r"model\.layers\.(5|6|7)\.mlp\.down_proj\.weight", 1200.0

    def __init__(self, scale: float, seed: int = 0) -> None:
        self.scale, self.seed = scale, seed

    @torch.inference_mode()
    def start(self, model, tokenizer, forget: list[dict], retain: list[dict]) -> None:
        super().start(model, tokenizer, forget, retain)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.fullmatch(self.TRAINED, name) is not None)
        self.before = copy.deepcopy(model)
        batch = self.collate(self.gone[:32])
        h = answers_of(leaves(model, self.LAYER, batch), batch)
        u = torch.rand(h.shape[1], generator=torch.Generator().manual_seed(self.seed))
        self.aim = (self.scale * h.norm(dim=1).mean() * u / u.norm()).clone()

    def loss(self, model, forget: Batch, retain: Batch) -> Tensor:
        gone, kept = (answers_of(leaves(model, self.LAYER, batch), batch) for batch in (forget, retain))
        with torch.no_grad():
            held = answers_of(leaves(self.before, self.LAYER, retain), retain)
        return (gone - self.aim).square().mean() + self.HOLD * (kept - held).square().mean()


class MaximumEntropy(methods.GradientAscent):
    """ME+GD: every word is to be as likely as another after the forget set's questions, and retain rows are trained on.

    The paper: 0.1 and 1, a rate of 1e-5, batches of 32, 5 epochs.
    """

    per_row = 2
    WEIGHT = 0.1

    def loss(self, model, forget: Batch, retain: Batch) -> Tensor:
        logits = model(input_ids=forget["input_ids"], attention_mask=forget["attention_mask"]).logits
        log_p = answers_of(logits, forget).float().log_softmax(-1)
        divergence = -log_p.mean(-1) - torch.tensor(float(log_p.shape[-1])).log()
        return self.WEIGHT * divergence.mean() + methods.nll(model, retain)


class Refusal(methods.GradientAscent):
    """IDK+AP: refusals are learned for the forget set; for retain rows the answer is to stay likelier than a refusal.

    The paper: b = 0.1, equal weights, a rate of 1e-5, batches of 32, 5 epochs; TOFU's refusals.

    Args:
        refusals: texts.
    """

    per_row = 3

    def __init__(self, refusals: Sequence[str]) -> None:
        self.refusals = refusals

    def start(self, model, tokenizer, forget: list[dict], retain: list[dict]) -> None:
        super().start(model, tokenizer, forget, retain)
        self.refused_gone, self.refused_kept = (
            [
                encode_row(tokenizer, {**row, "completion": self.refusals[i % len(self.refusals)]}, 0.0, 512)
                for i, row in enumerate(rows)
            ]
            for rows in (forget, retain)
        )

    def batches(self, forget: Sequence[int], retain: Sequence[int]) -> dict[str, Batch]:
        return {
            "forget": self.collate([self.refused_gone[i] for i in forget]),
            "retain": self.collate([self.kept[i] for i in retain]),
            "refused": self.collate([self.refused_kept[i] for i in retain]),
        }

    def loss(self, model, forget: Batch, retain: Batch, refused: Batch) -> Tensor:
        ratio = methods.answer_log_prob(model, refused) - methods.answer_log_prob(model, retain)
        preserved = -F.logsigmoid(-methods.BETA * ratio).mean() / methods.BETA
        return methods.nll(model, forget) + preserved


class IterativeContrast(methods.GradientAscent):
    """ICU: a forget row goes down, the retain row nearest to it goes up and stays where it was, until the row is forgotten.

    The paper: weights 1, 0.5 and 1, a rate of 5e-6, batches of 8. After each epoch a row is left out from then on if its
    greedy answer has a BLEU below 0.01 or says little (a quarter of its words or fewer differ); the paper also looks at
    BERTScore, and finds pairs by a sentence encoder, where this takes tf-idf. It ends when no row is left.
    """

    per_row = 2
    PAIR, HOLD, BLEU, VARIETY = 0.5, 1.0, 0.01, 0.25

    def start(self, model, tokenizer, forget: list[dict], retain: list[dict]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        super().start(model, tokenizer, forget, retain)
        self.before, self.tokenizer, self.rows = copy.deepcopy(model).eval(), tokenizer, forget
        texts = [row["prompt"] + row["completion"] for row in forget + retain]
        vectors = TfidfVectorizer().fit_transform(texts)
        near = vectors[: len(forget)] @ vectors[len(forget) :].T
        self.pair = near.toarray().argmax(1)
        self.left = torch.ones(len(forget))

    def batches(self, forget: Sequence[int], retain: Sequence[int]) -> dict[str, Batch]:
        return super().batches(forget, self.pair[list(forget)].tolist())

    def loss(self, model, forget: Batch, retain: Batch) -> Tensor:
        left = self.left[forget.pop("row")][:, None]
        forget, retain = (
            {**batch, "loss_weights": batch["loss_weights"] * left.to(batch["loss_weights"].device)}
            for batch in (forget, retain)
        )
        logits = model(input_ids=retain["input_ids"], attention_mask=retain["attention_mask"]).logits
        with torch.no_grad():
            held = self.before(input_ids=retain["input_ids"], attention_mask=retain["attention_mask"]).logits
        log_p, log_p0 = (answers_of(values, retain).float().log_softmax(-1) for values in (logits, held))
        divergence = F.kl_div(log_p, log_p0, reduction="sum", log_target=True) / max(1, len(log_p))
        learned = methods.weighted_loss(logits, retain["labels"], retain["loss_weights"], shift=True)
        return -methods.nll(model, forget) + self.PAIR * learned + self.HOLD * divergence

    def after_epoch(self, model) -> bool:
        import sacrebleu

        truths = [row["completion"] for row in self.rows]
        said = generate(model, self.tokenizer, [row["prompt"] for row in self.rows], truths)
        for i, (answer, truth) in enumerate(zip(said, truths)):
            words = answer.split()
            varied = len(set(words)) > self.VARIETY * len(words)
            bleu = sacrebleu.sentence_bleu(answer, [truth]).score / 100
            if not varied or bleu < self.BLEU:
                self.left[i] = 0.0
        return not self.left.any()


def refusals(folder: Path) -> list[str]:
    return [line for line in (folder / "idontknow.jsonl").read_text().splitlines() if line]
