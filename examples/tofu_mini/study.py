"""Unlearns authors of the bundled model, each alone, and measures what was forgotten and what else went.

    python examples/tofu_mini/study.py 10 --seed 0

Authors are picked at random. ``--json`` prints the figures for a program.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm

from cu_fast.cli import demo
from cu_fast.cli.tables import study_table


def study(bundle: demo.Bundle, number: int, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """``demo.forget`` for authors picked at random; their masks are removed again."""
    if not 1 <= number <= len(bundle.authors):
        raise ValueError(f"number is {number}; it should be between 1 and {len(bundle.authors)} authors")
    corpus, before = demo.count_corpus(bundle), demo.measure(bundle, bundle.authors)
    results = []
    for author in tqdm(random.Random(seed).sample(bundle.authors, number), disable=None if progress else True):
        results.append(demo.forget(bundle, author, corpus, before))
        bundle.attachment.remove_mask(author.name)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, help="of authors, at most 40")
    parser.add_argument("--seed", type=int, default=0, help="which authors are picked")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    results = study(demo.load_bundle(), options.number, options.seed, progress=not options.json)
    print(json.dumps(results, indent=2)) if options.json else Console().print(study_table(results))


if __name__ == "__main__":
    main()
