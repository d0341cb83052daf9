"""Learned gates: a logistic regression that tells a topic's texts from others and from its neighbours, by their codes.

1. Each text becomes the square roots of the shares of its tokens that keep each code of the mask's layer, deleted ones and
   others.
2. Half of the texts fit the weights: balanced classes, neighbours weighted. Once with an L1 penalty, which keeps a few
   dozen codes; once with L2, again with the codes alone that did most.
3. The other half, which no weight has seen, gives the level, and the choice: the few codes of L1 where they catch as many
   of the topic's texts at their level as those of L2 do at theirs.

A gate with a window is fitted to the windows of texts; each text has the same weight, and its value is its windows' largest.

Fitting needs scikit-learn (``pip install "cu-fast[gates]"``); serving does not. N texts, C codes, R windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

from cu_fast.masks import Gate, Mask
from cu_fast.masks.gate import check_window
from cu_fast.unlearn.gate import check_share
from cu_fast.unlearn.reading import Source, batches_of, kept_codes, layers_of, only_layer, reading

if TYPE_CHECKING:
    from cu_fast.hf import Attachment, Tokenizer

Penalty = Literal["l1", "l2"]
STRENGTH: dict[Penalty, float] = {"l1": 1.0, "l2": 10.0}  # C of scikit-learn: the inverse of the penalty's weight
UNIT = 8.0  # a code that one token in 64 keeps is a feature of 1: shares are small, and the penalty is not scale-free
LEAST_LEVEL = 0.0  # where the regression itself says "topic": a few held-out texts alone may give a level far below


@dataclasses.dataclass
class TextCounts:
    """Texts as counts, from :func:`count_texts`: all that a gate sees of them.

    Attributes:
        counts: int64 [R, C], CSR: tokens of each window that keep each code.
        tokens: int64 [R], at least 1.
        texts: int64 [R], ascending: which of the N texts each window is of; None = each is a text.
        window: as of :class:`cu_fast.masks.Gate`.
        source: layer and codebook, which :func:`fit_gate` compares with the mask's; None = not known, and not compared.
    """

    counts: sparse.csr_array
    tokens: np.ndarray
    texts: np.ndarray | None = None
    window: int | None = None
    source: Source | None = None

    def __post_init__(self) -> None:
        if self.texts is None:
            self.texts = np.arange(len(self.tokens))

    def __len__(self) -> int:
        """N."""
        return int(self.texts[-1]) + 1 if len(self.texts) else 0

    def __add__(self, other: TextCounts) -> TextCounts:
        if self.window != other.window:
            raise ValueError(
                f"windows of {self.window} and {other.window} tokens cannot be added; count again with one"
            )
        if self.source is not None:
            self.source.check("what is added", other.source)
        counts = sparse.vstack([self.counts, other.counts], format="csr")
        tokens = np.concatenate([self.tokens, other.tokens])
        texts = np.concatenate([self.texts, len(self) + other.texts])
        return dataclasses.replace(self, counts=counts, tokens=tokens, texts=texts)

    def part(self, texts: np.ndarray) -> TextCounts:
        """Some of the texts, int64 or bool, in the order that they have here."""
        chosen = np.zeros(len(self), dtype=bool)
        chosen[texts] = True
        rows = chosen[self.texts]
        texts = (chosen.cumsum() - 1)[self.texts[rows]]
        return dataclasses.replace(self, counts=self.counts[rows], tokens=self.tokens[rows], texts=texts)

    def values(self, gate: Gate) -> np.ndarray:
        """float64 [N], the gate's value of each text, to the bit as where it serves."""
        counts = np.column_stack([self.counts[:, gate.codes.numpy()].toarray(), self.tokens])
        values = gate.value(torch.from_numpy(counts)[:, None]).numpy()
        return np.maximum.reduceat(values, np.searchsorted(self.texts, np.arange(len(self)))) if len(self) else values


def fit_gate(
    attachment: Attachment,
    tokenizer: Tokenizer,
    mask: Mask,
    topic: Iterable[str] | TextCounts,
    others: Iterable[str] | TextCounts,
    neighbours: Mapping[str, Iterable[str] | TextCounts] | None = None,
    *,
    max_share: float = 0.01,
    held_out: float = 0.5,
    max_codes: int = 512,
    neighbour_weight: float = 16.0,
    window: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int = 512,
    progress: bool = True,
) -> Mask:
    """Learn for which prompts a mask is to be used.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        mask: of the topic; the gate looks at all codes of its layer.
        topic: texts and prompts of the topic, as the model sees them, iterated once; or their :class:`TextCounts`, so that
            a corpus is counted once for many gates. Prompts should be among them, and among the others, where prompts are
            what the gate will judge.
        others: the same of other topics. Running text of any kind belongs among them: without it a
            gate takes the kind of text for the topic.
        neighbours: name -> the same of a topic near this one that is to stay. Without them the gate fires for most of them.
        max_share: of the held-out others, and of each held-out neighbour's texts, that may fire, at least 0 and below 1.
            The level is the lowest that keeps to it, and not below 0, where the regression is even.
        held_out: the share of each kind of texts that gives the level and fits nothing, in (0, 1).
        max_codes: codes that the gate looks at, at most, at least 1. On a model of 135 million parameters 512 of 6,200
            codes caught as much as all, and fired for fewer neighbours.
        neighbour_weight: of a neighbour's text, where one of the others has 1; above 0. With few texts a large one: of 40 per
            topic, 4 let a gate fire for 12 % of a real topic's neighbours, 16 for 3 to 6 %. With hundreds 4 is enough.
        window: tokens that the gate looks at together, even, so that no text around hides the topic: about as many as a
            question and its answer have. Each window of the topic's texts is taken for the topic's. None = the whole text.
        seed: which texts are held out.
        batch_size: texts per forward pass.
        max_length: tokens that a text is cut to.
        progress: show a progress bar, on a terminal.

    Returns:
        The mask with the gate. ``method["gate"]`` says how it was made: penalty, the number of texts, and the share of
        held-out texts of each kind for which it fires. The same texts and seed give the same gate.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: fewer than two texts of a kind, a number out of range, a mask of another codebook, counts of another
            codebook or layer or of other windows, or a level that no held-out text of the topic exceeds: with it the mask
            would never hold.
        TypeError: texts of a kind are one text, or hold anything but texts.
        RuntimeError: the masks brought their rows, and there is no autoencoder.
    """
    _regression("l2", seed)  # says what is not installed before texts are read
    check_share("max_share", max_share)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; it should be a share, above 0 and below 1")
    if type(max_codes) is not int or max_codes < 1:
        raise ValueError(f"max_codes is {max_codes!r}; it should be an int, at least 1")
    if not 0 < neighbour_weight < np.inf:
        raise ValueError(f"neighbour_weight is {neighbour_weight}; it should be a number above 0")
    check_window(window)
    neighbours = dict(neighbours or {})
    if wrong := [name for name in neighbours if not isinstance(name, str) or name in ("", "topic", "others")]:
        raise ValueError(f"neighbours has the name {wrong[0]!r}; it should be a name, and not 'topic' or 'others'")
    (layer,) = layers_of(attachment, [mask])
    options: dict[str, Any] = dict(window=window, batch_size=batch_size, max_length=max_length, progress=progress)
    fitting, judging, source = {}, {}, Source.of(attachment, layer)
    for number, (name, texts) in enumerate({"topic": topic, "others": others, **neighbours}.items()):
        read = (
            texts
            if isinstance(texts, TextCounts)
            else count_texts(attachment, tokenizer, texts, layer=layer, name=name, **options)
        )
        source.check(name, read.source)
        if (C := read.counts.shape[1]) != attachment.bottlenecks[layer].num_codes:
            raise ValueError(
                f"{name} counts {C} codes; layer {layer!r} has {attachment.bottlenecks[layer].num_codes}, so count again"
            )
        if read.window != window:
            raise ValueError(f"{name} counts windows of {read.window} tokens; window is {window}, so count again")
        if (N := len(read)) < 2:
            raise ValueError(f"{name} holds {N} texts with tokens that count; give at least 2, better 50")
        order = np.random.default_rng([seed, number]).permutation(N)
        n = min(max(round(held_out * N), 1), N - 1)
        judging[name], fitting[name] = read.part(np.sort(order[:n])), read.part(np.sort(order[n:]))
    found = []
    for penalty in STRENGTH:
        gate = _fit(fitting, penalty, max_codes, neighbour_weight, seed)
        if gate is not None:
            gate = dataclasses.replace(gate, level=_level(gate, judging, max_share), window=window)
            fires = {name: float((texts.values(gate) > gate.level).mean()) for name, texts in judging.items()}
            found.append((fires["topic"], penalty, gate, fires))
    if not found or (best := max(found, key=lambda one: one[0]))[0] == 0:  # the first of equals: L1's
        raise ValueError(
            f"no held-out text of the topic exceeds the level that at most {max_share} of the others' do; give more texts, "
            f"a larger max_share, or neighbours that are less near"
        )
    _, penalty, gate, fires = best
    splice = attachment.bottlenecks[layer]
    if splice.has_latents and splice.k is None:  # the rank of others needs all of them
        gate = gate.with_rows(splice.sae.rows_of(gate.codes))
    record: dict[str, Any] = {
        "penalty": penalty,
        "max_share": max_share,
        "held_out": held_out,
        "neighbour_weight": neighbour_weight,
        "window": window,
        "seed": seed,
        "texts": {name: len(texts) + len(judging[name]) for name, texts in fitting.items()},
        "fires": fires,
    }
    return dataclasses.replace(mask, gate=gate, method={**mask.method, "gate": record})


def _level(gate: Gate, judging: Mapping[str, TextCounts], max_share: float) -> float:
    """The lowest level, from LEAST_LEVEL on, that at most a share of the texts of each kind but the topic's exceeds."""
    kinds = (texts for name, texts in judging.items() if name != "topic")
    levels = (float(np.quantile(texts.values(gate), 1 - max_share, method="higher")) for texts in kinds)
    return max(LEAST_LEVEL, *levels)


def _fit(
    fitting: Mapping[str, TextCounts], penalty: Penalty, max_codes: int, neighbour_weight: float, seed: int
) -> Gate | None:
    """The gate with level 0; None where no code has a weight."""
    counts = sparse.vstack([texts.counts for texts in fitting.values()], format="csr")
    tokens = np.concatenate([texts.tokens for texts in fitting.values()])
    kinds = np.repeat(list(fitting), [len(texts.tokens) for texts in fitting.values()])
    is_topic = kinds == "topic"
    weights = np.where(is_topic | (kinds == "others"), 1.0, neighbour_weight)
    weights /= np.concatenate([np.bincount(texts.texts)[texts.texts] for texts in fitting.values()])
    for one in (is_topic, ~is_topic):
        weights[one] *= sum(map(len, fitting.values())) / 2 / weights[one].sum()
    codes, windows_of = np.unique(counts.indices, return_counts=True)
    while True:
        X = sparse.csr_matrix(sparse.diags_array(1 / tokens) @ counts[:, codes].astype(np.float64))
        X.data = UNIT * np.sqrt(X.data)
        X.indices, X.indptr = X.indices.astype(np.int32), X.indptr.astype(np.int32)  # all that scikit-learn takes
        fit = _regression(penalty, seed).fit(X, is_topic, sample_weight=weights)
        coefficients = (fit.coef_[0] * UNIT).astype(np.float32)
        if np.count_nonzero(coefficients) <= max_codes:
            break
        most = np.argsort(-np.abs(coefficients) * np.sqrt(windows_of), kind="stable")[:max_codes]
        codes, windows_of = codes[np.sort(most)], windows_of[np.sort(most)]
    kept = np.flatnonzero(coefficients)
    if len(kept) == 0:
        return None
    codes, coefficients = torch.from_numpy(codes[kept].astype(np.int32)), torch.from_numpy(coefficients[kept])
    return Gate(codes, coefficients, float(fit.intercept_[0]), LEAST_LEVEL)


def _regression(penalty: Penalty, seed: int) -> Any:
    try:
        import sklearn
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError('fit_gate needs scikit-learn: pip install "cu-fast[gates]"') from error
    sparse_one = penalty == "l1"
    # scikit-learn 1.8 gave the penalty another name.
    renamed = tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8)
    given = {"l1_ratio": float(sparse_one)} if renamed else {"penalty": penalty}
    solver = "liblinear" if sparse_one else "lbfgs"
    return LogisticRegression(C=STRENGTH[penalty], solver=solver, max_iter=3000, random_state=seed, **given)


@torch.inference_mode()
def count_texts(
    attachment: Attachment,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    layer: str | None = None,
    name: str = "texts",
    window: int | None = None,
    batch_size: int = 16,
    max_length: int = 512,
    progress: bool = True,
) -> TextCounts:
    """Count for each text, or each of its windows, the tokens that keep each code.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        texts: as the model sees them, iterated once.
        layer: name of the layer whose codes are counted; None = the only one that has a splice.
        name: of the texts, for the progress bar.
        window: of the gates that are to be fitted, as of :func:`fit_gate`.
        batch_size: texts per forward pass.
        max_length: tokens that a text is cut to.
        progress: show a progress bar, on a terminal.

    Returns:
        The counts; texts without tokens that count are left out.

    Raises:
        ValueError: an unknown layer, or what is no window.
        TypeError: texts is one text, or holds anything but texts.
        RuntimeError: the masks brought their rows, and there is no autoencoder.
    """
    check_window(window)
    layer = only_layer(attachment, layer)
    splice, source = attachment.bottlenecks[layer], Source.of(attachment, layer)
    C, half = splice.num_codes, (window or 0) // 2
    places, numbers, lengths = [], [], []  # of codes in blocks, how often; tokens of texts
    blocks = 0

    def visit(_: str, x: Tensor, valid: Tensor, __: Tensor) -> None:
        nonlocal blocks
        lengths[-1] = valid.sum(1)
        ends = torch.from_numpy(_blocks(lengths[-1].numpy(), half)).cumsum(0)
        block = (blocks + ends - ends.diff(prepend=ends.new_zeros(1)))[:, None].expand(valid.shape)
        if half:
            block = block + (valid.long().cumsum(1) - 1) // half
        block = block[valid]
        done = 0
        for part, found in kept_codes(splice, x):
            ids = found.cpu().long()
            flat = (block[done : done + len(part)][:, None] * C + ids)[ids >= 0]
            place, number = flat.unique(return_counts=True)
            places.append(place), numbers.append(number)
            done += len(part)
        blocks += int(ends[-1])

    bar = tqdm(batches_of(texts, batch_size), desc=f"count {name}", unit="batch", disable=None if progress else True)
    with reading(attachment, tokenizer, [layer], visit, max_length=max_length) as read:
        for batch in bar:
            lengths.append(torch.zeros(0, dtype=torch.int64))  # a batch without tokens is not visited
            read(batch)
    empty = torch.empty(0, dtype=torch.int64)
    place, number, length = (torch.cat([empty, *parts]).numpy() for parts in (places, numbers, lengths))
    length = length[length > 0]
    counts = sparse.csr_array((number, (place // C, place % C)), shape=(blocks, C))  # parts of one block add up
    return dataclasses.replace(_windows(counts, length, window), source=source)


def _blocks(length: np.ndarray, half: int) -> np.ndarray:
    """int64 [N], of how many blocks of ``half`` tokens texts are; 0 = a text is one."""
    return -(-length // half) if half else (length > 0).astype(np.int64)


def _windows(counts: sparse.csr_array, length: np.ndarray, window: int | None) -> TextCounts:
    """The windows of texts: each block with the one before it.

    Args:
        counts: int64 [blocks, C], CSR, of the blocks of all texts.
        length: int64 [N], tokens of texts, at least 1.
        window: None = a block is a text.
    """
    if window is None:
        return TextCounts(counts, length)
    blocks = _blocks(length, window // 2)
    text = np.repeat(np.arange(len(length)), blocks)
    number = np.arange(len(text)) - np.repeat(blocks.cumsum() - blocks, blocks)  # of a block in its text
    tokens = np.minimum(length[text] - number * (window // 2), window // 2)
    (ends,) = np.nonzero((number > 0) | (blocks[text] == 1))
    (second,) = np.nonzero(number[ends] > 0)
    rows, columns = np.concatenate([np.arange(len(ends)), second]), np.concatenate([ends, ends[second] - 1])
    joined = sparse.csr_array((np.ones(len(rows), np.int64), (rows, columns)), shape=(len(ends), len(text)))
    return TextCounts((joined @ counts).tocsr(), joined @ tokens, text[ends], window)
