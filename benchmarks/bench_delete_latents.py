"""Measures the deletion of latents from a hidden state that is kept.

The same as `cu-fast bench delete_latents`, with what is done instead of it (rivals.py), and takes the same options, for
example:

python benchmarks/bench_delete_latents.py --tokens 1,64 --shape 2304,16384,20 --mask one --output rows.csv
"""

import sys

import rivals

from cu_fast.cli.app import app

if __name__ == "__main__":
    rivals.register()
    app(["bench", "delete_latents", *sys.argv[1:]])
