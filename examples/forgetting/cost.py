"""What deleting costs: python cost.py MODEL TOPICS WIKITEXT SAE

Of SmolLM2-135M-Instruct with a splice at one layer, an autoencoder or a codebook (fitted once, if OUTPUT holds none):

unlearn   seconds and peak memory of each step, per topic: count, find_mask, fit_gate
decode    milliseconds of a token, by batch: the model alone, with the splice, with one topic deleted, with many deleted at
          once, and with another topic deleted for each sequence. Models take turns, a token each
held      bytes of a deletion on disk and in memory, by how many are held

codes: those of a mask or a gate; of "decode" how many a mask took away per token of the prompt.

Each job runs in a process of its own, and only if results.csv lacks it: run it again to go on, and delete rows to measure
them again. On a quiet machine; a row says what the load was before, and "decode" how far two copies of the bare model are
apart: differences below that are noise. MODEL, TOPICS and WIKITEXT are what examples/smollm2 has; needs 'cu-fast[gates]'.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import cu_fast
from cu_fast.bench.machine import facts
from cu_fast.masks import Gate
from cu_fast.train.fit import fit_codes
from cu_fast.unlearn import count_codes, fit_gate

sys.path.insert(0, str(Path(__file__).parents[1] / "smollm2"))
from topics import TOPICS, read_neighbours, read_texts, running_text, windows

LAYER = "model.layers.8"
SPLICES = ("sae", "codebook")
BATCHES = (1, 8, 32)
HELD = (1, 10, 100, 1_000)
CODES, FIRING = 32, 8  # of a topic, drawn at random; of these, codes that fire at the prompt
ENRICHMENT, GATE_WINDOWS = 1.5, 100
GATE_CODES = 512  # at most, of a gate
PROMPT = (
    "The Eiffel Tower in Paris was built by Gustave Eiffel for a fair, and Harry Potter never saw the planet Jupiter."
)
MACHINE = ("cpu_name", "simd", "threads", "cu_fast_version", "commit", "torch_version", "transformers_version")
COLUMNS = (
    "what", "splice", "case", "batch", "held", "median", "least", "unit", "repeats", "peak_mb", "added_ms", "codes", "tokens",
    "memory", "disk", "load", *MACHINE,
)  # fmt: skip
Row = dict[str, Any]


# -- what is measured ---------------------------------------------------------------------------------------------


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.padding_side = "left"
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval(), tokenizer


def attached(model: Any, tokenizer: Any, splice: str, options: argparse.Namespace) -> cu_fast.Attachment:
    if splice == "sae":
        sae = cu_fast.load_sae(options.sae)
        if options.threshold is not None:  # in place of a rank
            theta = torch.full_like(sae.theta, options.threshold)
            sae = dataclasses.replace(sae, kind="threshold", k=None, theta=theta)
        return cu_fast.attach(model, {LAYER: sae})
    folder = options.output / "codebook"
    if not folder.exists():
        texts = [tokenizer.decode(ids) for ids in windows(tokenizer, running_text(options.wikitext / "valid.txt"), 760)]
        texts += [text for _, text in read_texts(options.topics, "general")]
        stopped = folder.with_name(f"{folder.name}.run").is_dir()
        fit_codes(model, tokenizer, texts, folder, kind="codebook", layer=LAYER, resume=stopped)
    return cu_fast.attach(model, folder)


def memory(key: str) -> int:
    """Bytes: VmRSS, of this process now; VmHWM, the most since :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def timed(step: Callable[..., Any], *given: Any, **named: Any) -> tuple[Any, float, float]:
    """What a step returns, its seconds, and how much more memory it took at its peak, in MB."""
    forget_peak()
    before, start = memory("VmRSS"), time.perf_counter()
    found = step(*given, **named)
    return found, time.perf_counter() - start, (memory("VmHWM") - before) / 1e6


def unlearn(splice: str, options: argparse.Namespace) -> Iterator[Row]:
    """Topics take turns; a median is over the repeats."""
    model, tokenizer = load(options)
    attachment = attached(model, tokenizer, splice, options)
    texts = {name: read_texts(options.topics, name) for name in (*TOPICS, "general")}
    near = read_neighbours(options.topics)
    wikitext = [
        tokenizer.decode(ids) for ids in windows(tokenizer, running_text(options.wikitext / "valid.txt"), GATE_WINDOWS)
    ]

    def both(pairs: Sequence[tuple[str, str]]) -> list[str]:
        return [part for pair in pairs for part in pair]

    spent: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    quiet: Row = {"progress": False}
    for _ in range(options.repeats):
        for topic in options.only or TOPICS:
            others = [name for name in texts if name != topic]
            control, target = [t for name in others for _, t in texts[name]] + wikitext, [t for _, t in texts[topic]]
            elsewhere = [part for name in others for part in both(texts[name])] + wikitext
            neighbours = {"near": both(near[topic])} if topic in near else None
            rest, *figures = timed(count_codes, attachment, tokenizer, control, layer=None, **quiet)
            spent.setdefault(("count the control", topic), []).append((*figures, rest.tokens))
            own, *figures = timed(count_codes, attachment, tokenizer, target, layer=None, **quiet)
            spent.setdefault(("count", topic), []).append((*figures, own.tokens))
            found, *figures = timed(
                cu_fast.find_mask, attachment, tokenizer, own, rest, topic=topic, min_enrichment=ENRICHMENT, **quiet
            )
            spent.setdefault(("find_mask", topic), []).append((*figures, found.mask.num_deleted))
            mask, *figures = timed(
                fit_gate, attachment, tokenizer, found.mask, both(texts[topic]), elsewhere, neighbours, **quiet
            )
            spent.setdefault(("fit_gate", topic), []).append((*figures, len(mask.gate.codes)))
    for (step, topic), runs in spent.items():
        seconds, peaks, sizes = zip(*runs)
        yield {
            "case": f"{step}: {topic}", "median": statistics.median(seconds), "least": min(seconds), "unit": "s",
            "repeats": len(runs), "peak_mb": max(peaks), "tokens" if "count" in step else "codes": sizes[0],
        }  # fmt: skip


def some_masks(attachment: cu_fast.Attachment, firing: Sequence[int], number: int) -> list[cu_fast.Mask]:
    """Masks of topics that do not exist, of random codes; some of each fire at the prompt, so that there is work."""
    (splice,) = attachment.bottlenecks.values()
    draw = np.random.default_rng(0)
    found = []
    for i in range(number):
        own = draw.choice(firing, min(FIRING, len(firing)), replace=False)
        rest = draw.choice(np.setdiff1d(np.arange(splice.num_codes), own), CODES - len(own), replace=False)
        ids = torch.from_numpy(np.concatenate([own, rest]))
        if splice.has_latents:
            found.append(cu_fast.Mask.from_ids(ids, sae=splice.sae, topic=f"topic {i}"))
        else:
            of = {"num_codes": splice.num_codes, "codebook_sha256": splice.codebook_sha256()}
            found.append(cu_fast.Mask.from_ids(ids, topic=f"topic {i}", **of))
    return found


def firing_codes(attachment: cu_fast.Attachment, ids: torch.Tensor) -> np.ndarray:
    (splice,) = attachment.bottlenecks.values()
    seen: list[torch.Tensor] = []
    with attachment.observe(lambda x, _: seen.append(splice.active(x))), torch.inference_mode():
        attachment.model(input_ids=ids)
    return torch.unique(seen[0][seen[0] >= 0]).numpy()


def decode(splice: str, options: argparse.Namespace) -> Iterator[Row]:
    model, tokenizer = load(options)
    plain, _ = load(options)
    attachment = attached(model, tokenizer, splice, options)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for mask in some_masks(attachment, firing_codes(attachment, prompt), max(HELD)):
        attachment.add_mask(mask)
    names = list(attachment.masks)
    for batch in options.batches:
        ids = prompt.repeat(batch, 1)
        cases: dict[tuple[str, int], tuple[Any, Any]] = {
            ("model alone", 0): (plain, None), ("model alone, again", 0): (plain, None), ("nothing deleted", 0): (model, None),
            **{("deleted at once", n): (model, set(names[:n])) for n in HELD},
            ("each its own", batch): (model, names[:batch]),
        }  # fmt: skip
        caches, times, taken_away = {}, {case: [] for case in cases}, {}
        for case, (which, topics) in list(cases.items()):
            attachment.reset_report()
            try:
                with torch.inference_mode(), attachment.unlearn(topics):
                    caches[case] = which(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
                taken_away[case] = attachment.report()[0]["hits"] / ids.numel()
            except ValueError as refused:  # a codebook's union may be more codes than one deletion takes
                del cases[case], times[case]
                name, held = case
                yield {"case": f"{name}: refused, {refused}", "batch": batch, "held": held}
        with torch.inference_mode():
            for number in range(options.rounds + 3):
                for case, (which, topics) in cases.items():
                    with attachment.unlearn(topics):
                        start = time.perf_counter()
                        which(input_ids=ids[:, -1:], past_key_values=caches[case], use_cache=True)
                        if number >= 3:
                            times[case].append(1e3 * (time.perf_counter() - start))
        medians = {case: statistics.median(taken) for case, taken in times.items()}
        for (name, held), median in medians.items():
            taken = times[name, held]
            yield {
                "case": name, "batch": batch, "held": held, "median": median, "least": min(taken), "unit": "ms",
                "repeats": len(taken), "added_ms": median - medians["model alone", 0], "codes": taken_away[name, held],
            }  # fmt: skip


def tensor_bytes() -> int:
    """Of all tensors that there are. A process does not grow by what it finds in memory that it has freed."""
    gc.collect()
    sizes = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor):
            storage = one.untyped_storage()
            with contextlib.suppress(RuntimeError):  # a compiler's tensors have no memory
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def held(splice: str, options: argparse.Namespace) -> Iterator[Row]:
    """Bytes of a deletion, by how many are held; tables of requests have room for 64 at the start, and double."""
    model, tokenizer = load(options)
    attachment = attached(model, tokenizer, splice, options)
    firing = firing_codes(attachment, tokenizer(PROMPT, return_tensors="pt")["input_ids"])
    for number in HELD:
        before = tensor_bytes()
        names = [attachment.add_mask(mask) for mask in some_masks(attachment, firing, number)]
        with_masks = tensor_bytes() - before
        with attachment.unlearn(names):
            with_requests = tensor_bytes() - before - with_masks
        yield {"case": "masks", "held": number, "memory": with_masks / number, "codes": CODES}
        yield {"case": "requests, each its own", "held": number, "memory": with_requests / number, "codes": CODES}
        for name in names:
            attachment.remove_mask(name)
    (mask,) = some_masks(attachment, firing, 1)
    yield {"case": "mask", "held": 1, "disk": disk(mask), "codes": CODES}
    (bottleneck,) = attachment.bottlenecks.values()
    codes = torch.arange(min(GATE_CODES, bottleneck.num_codes), dtype=torch.int32)
    gate = Gate(codes, torch.ones(len(codes)), 0.0, 0.0)
    yield {"case": "mask with a gate", "held": 1, "disk": disk(mask.with_gate(gate)), "codes": CODES}
    if mask.rows is not None:
        yield {"case": "mask with its latents", "held": 1, "disk": disk(mask, rows=True), "codes": CODES}


def disk(mask: cu_fast.Mask, rows: bool = False) -> int:
    with tempfile.TemporaryDirectory() as folder:
        mask.save(Path(folder) / "mask", rows=rows)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


# -- jobs ---------------------------------------------------------------------------------------------------------

JOBS = {"unlearn": unlearn, "decode": decode, "held": held}


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def run(what: str, splice: str, options: argparse.Namespace) -> None:
    """One job, here; its rows are written together, at its end."""
    machine = {name: value for name, value in facts().items() if name in MACHINE}
    machine["load"] = f"{os.getloadavg()[0]:.2f}"
    found = []
    for row in JOBS[what](splice, options):
        short = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in row.items()}
        print(what, splice, short, flush=True)
        found.append({"what": what, "splice": splice, **short, **machine})
    path = options.output / "results.csv"
    rows = rows_of(path) + found
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def alone(arguments: Sequence[str]) -> None:
    subprocess.run([sys.executable, __file__, *arguments], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "topics", "wikitext", "sae"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/cost"))
    parser.add_argument("--rounds", type=int, default=100, help="of decode")
    parser.add_argument("--repeats", type=int, default=3, help="of unlearn")
    parser.add_argument("--splices", nargs="+", choices=SPLICES, default=SPLICES)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--only", nargs="+", choices=TOPICS, help="topics of unlearn")
    parser.add_argument("--threshold", type=float, help="give every latent this threshold in place of a rank")
    parser.add_argument("--job", nargs=2, metavar=("WHAT", "SPLICE"), help="this one alone, in this process")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.job:
        return run(*options.job, options)
    for splice in options.splices:
        if splice == "codebook":
            model, tokenizer = load(options)
            attached(model, tokenizer, splice, options).detach()  # fitted before anything is measured
            del model
        for what in JOBS:
            done = {(row["what"], row["splice"]) for row in rows_of(options.output / "results.csv")}
            if (what, splice) not in done:
                alone([*arguments, "--job", what, splice])
    return None


if __name__ == "__main__":
    main()
