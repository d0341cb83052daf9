"""What examples/tofu has and this study needs too: its sets and figures, its trainer, its table."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tofu"))

import methods as methods
import metrics as metrics
import tofu as tofu
from table import Table as Table
