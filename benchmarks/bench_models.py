"""Measures whole models with and without a bottleneck. The same as `cu-fast bench models`, and takes the same options, for example:

python benchmarks/bench_models.py --data gpt2 --output rows.csv
"""

import sys

from cu_fast.cli.app import app

if __name__ == "__main__":
    app(["bench", "models", *sys.argv[1:]])
