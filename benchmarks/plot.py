"""Draws a benchmark's CSV: time against T for each provider, a panel for each shape.

python benchmarks/plot.py rows.csv picture.png --op codebook_quantize --dtype fp32 --mask none --data gaussian
"""

from pathlib import Path
from typing import Annotated

import typer

from cu_fast import bench


def plot(
    rows: Annotated[Path, typer.Argument(help="A CSV file written by `cu-fast bench --output`.")],
    picture: Annotated[Path, typer.Argument(help="The PNG to write.")],
    op: str = "codebook_quantize",
    dtype: str = "fp32",
    mask: str = "none",
    data: str = "gaussian",
) -> None:
    """Points are medians, bars reach from the 20th to the 80th percentile; a cross is wrong in some rows, by fp64."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wanted = {"dtype": dtype, "mask": mask, "data": data}
    panels: dict[tuple, dict[str, dict[int, dict]]] = {}
    for row in bench.read_rows(rows):
        config = bench.config(row)
        if row["kernel_name"] == op and row["status"] == "ok" and wanted.items() <= config.items():
            lines = panels.setdefault((config["E"], config["C"], config["k"]), {})
            lines.setdefault(row["kernel_provider"], {})[int(row["x_value"])] = row
    if not panels:
        raise SystemExit(f"error: {rows} has no row of {op!r} that was measured with {wanted}")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False, layout="constrained")
    names = dict.fromkeys(name for lines in panels.values() for name in lines)
    colour = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for axis, ((E, C, k), lines) in zip(axes[0], panels.items()):
        for name, points in lines.items():
            T = sorted(points)
            p20, p50, p80 = ([float(points[t][f"y_value_{p}"]) for t in T] for p in (20, 50, 80))
            right = all(points[t]["match"] in ("", "1.0") for t in T)
            style = {"color": colour[name], "marker": "o" if right else "x", "ls": "-" if right else "--"}
            axis.plot(T, p50, label=name, linewidth=2.5 if name == "cu_fast" else 1.2, **style)
            axis.vlines(T, p20, p80, color=colour[name])
        axis.set(xscale="log", yscale="log", xlabel="T, tokens", title=f"E={E}, C={C}, k={k}")
        axis.grid(True, which="both", alpha=0.2)
    axes[0][0].set_ylabel("ms")
    axes[0][0].legend(fontsize="small")
    figure.suptitle(f"{op}, {dtype}, mask {mask}, {data}")
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(plot)
