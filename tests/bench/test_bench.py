"""The benchmark on tiny cells: what its rows say, that it sees a wrong answer, and that nothing gets lost. No times."""

from __future__ import annotations

import importlib.util
import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from cu_fast import bench
from cu_fast.bench import clock, machine
from cu_fast.bench.cells import CLAMP, DATA, MASKS_OF, OPS, Cell, make_inputs
from cu_fast.bench.job import Job
from cu_fast.bench.plan import make_plan, providers_of
from cu_fast.bench.providers import PROVIDERS
from cu_fast.bench.truth import Answer, Truth
from cu_fast.cli import app

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {"tokens": (3,), "shapes": ((16, 70, 4),), "seconds": 1e-6, "rounds": 1}
MANY = {"delete_latents": {"shapes": ((16, 70, 60),)}}  # so many latents that some fire
EXACT = ("cu_fast", "cu_fast_exact", "reference", "torch_fp32")
FP32 = (*EXACT, "torch_gather", "torch_dense_fp32", "faiss", "codebook_features", "eai_sparsify", "sae_lens")


def run(op, output=None, **options):
    options = TINY | MANY.get(op, {}) | options
    quick = tuple(name for name in providers_of(op) if name != "torch_compile")  # compiling takes seconds
    return bench.run(bench.Plan(op, providers=options.pop("providers", quick), **options), output)


def of(rows, provider):
    return [row for row in rows if row["kernel_provider"] == provider]


@pytest.mark.parametrize("op", OPS)
def test_every_row_is_whole_and_exact_providers_are_right(op):
    rows = run(op, masks=("none", "one", "rows"))
    masks = 1 if op == "sae_encode" else 2
    assert len(rows) == 2 * masks * (len(providers_of(op)) - 1)
    for row in rows:
        assert tuple(row) == bench.COLUMNS
        assert row["kernel_name"] == op and row["x_value"] == 3 and row["threads"] == torch.get_num_threads()
        assert row["status"] in ("ok", "skipped", "not installed"), row["note"]
        assert row["note"] or row["status"] == "ok"
        if row["status"] == "ok":
            assert 0 < row["y_value_20"] <= row["y_value_50"] <= row["y_value_80"] and row["first_call_ms"] > 0
            assert math.isclose(row["ratio"], row["y_value_50"] / ours(rows, row)["y_value_50"], rel_tol=1e-3)
        if row["status"] == "ok" and row["kernel_provider"] in FP32 and '"fp32"' in row["extra_benchmark_config_str"]:
            assert row["match"] == 1.0, row
        if row["kernel_provider"] in EXACT:
            assert row["status"] == "ok" and row["match"] == 1.0, row
    assert {row["identical"] for row in of(rows, "cu_fast") + of(rows, "reference")} == {1.0}


def ours(rows, row):
    (found,) = (r for r in of(rows, "cu_fast") if r["extra_benchmark_config_str"] == row["extra_benchmark_config_str"])
    return found


@pytest.mark.parametrize("op", ["codebook_quantize", "sae_encode_topk", "delete_latents"])
def test_every_kind_of_data_is_right(op):
    rows = run(op, data=DATA, masks=("50%", "one"), dtypes=("fp32",), providers=("cu_fast", "torch_fp32"))
    assert len(rows) == 2 * len(DATA) and all(row["match"] == 1.0 for row in rows)


def test_bf16_products_of_fp32_inputs_are_seen_to_be_wrong():
    cell = {"tokens": (64,), "shapes": ((64, 5000, 100),), "dtypes": ("fp32",), "masks": ("none",)}
    right, wrong = run("codebook_quantize", providers=("torch_fp32", "torch_bf16"), **cell)
    assert right["match"] == 1.0 and wrong["match"] < 0.8


@pytest.mark.parametrize("op", ["codebook_quantize", "masked_decode", "bottleneck", "sae_encode", "delete_latents"])
def test_a_wrong_provider_is_detected(op, monkeypatch):
    def wrong(inputs):
        job = PROVIDERS["cpu"][op]["torch_fp32"](inputs)

        def answer(output):
            ids, values = job.answer(output)
            if ids is not None:
                ids = ids.clone()
                ids[1, 2] = (ids[1, 2] + 1) % inputs.cell.C
            else:
                values = values.clone()
                values[1, 2] += 1e-3
            return Answer(ids, values)

        return Job(job.call, answer, lambda output: 0.5)

    monkeypatch.setitem(PROVIDERS["cpu"][op], "wrong", wrong)
    (row,) = run(op, providers=("wrong",), dtypes=("fp32",), masks=MASKS_OF[op][:1])
    assert math.isclose(row["match"], 2 / 3) and row["identical"] == 0.5 and row["ratio"] == ""


def test_a_deleted_a_repeated_and_a_missing_id_are_wrong():
    inputs = make_inputs(Cell("codebook_quantize", 1, 16, 70, 4, mask="50%"))
    truth = Truth(inputs)
    best = truth.scores.topk(5).indices
    assert truth.match(Answer(best[:, :4])) == truth.match(Answer(best[:, [3, 1, 0, 2]])) == 1
    deleted = inputs.deleted[0].nonzero()[0]
    for wrong in (deleted[None], best[:, :1], torch.tensor([[-1]]), best[:, 4:], torch.tensor([[10**6]])):
        assert truth.match(Answer(torch.cat([best[:, :3], wrong], 1))) == 0


def test_what_is_tied_may_stand_for_one_another_but_a_lost_best_may_not():
    truth = Truth(make_inputs(Cell("codebook_quantize", 1, 16, 70, 4)))
    truth.scores = torch.zeros(1, 70, dtype=torch.float64)
    assert truth.match(Answer(torch.tensor([[9, 4, 60, 2]]))) == 1
    truth.scores[0, 7] = 10 * truth.tolerance
    assert truth.match(Answer(torch.tensor([[9, 4, 60, 2]]))) == 0


@pytest.mark.parametrize("data", ["gaussian", "outliers"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_2_percent_of_the_latents_fire(data, dtype):
    inputs = make_inputs(Cell("delete_latents", 64, 256, 2000, 20, dtype, "one", data))
    fires = inputs.x.double() @ inputs.codes.double().T + inputs.bias.double() > inputs.theta.double()
    assert 0.015 < fires.double().mean() < 0.025


def test_masks_of_a_deletion_are_of_all_tokens_of_sequences_or_of_tokens():
    def masks(mask: str, T: int):
        inputs = make_inputs(Cell("delete_latents", T, 16, 70, 60, mask=mask))
        assert inputs.latents.dtype == torch.int32 and (inputs.latents.diff(dim=1) > 0).all()
        return len(inputs.latents), inputs.mask_row.tolist()

    assert masks("one", 20) == (1, 20 * [0])
    assert masks("rows", 16) == (16, list(range(16)))
    assert masks("rows", 20) == (16, 8 * [0] + 8 * [1] + 4 * [2])
    assert masks("rows", 136)[1][-9:] == [15] + 8 * [0]


@pytest.mark.parametrize("mask", ["one", "rows"])
def test_a_deletion_that_is_left_out_or_too_much_is_wrong_and_near_the_threshold_both_are_right(mask):
    inputs = make_inputs(Cell("delete_latents", 12, 16, 70, 60, mask=mask))
    truth = Truth(inputs)
    held = inputs.latents[inputs.mask_row.long()].long()
    pre = truth.scores.gather(1, held)
    change = torch.where(pre > inputs.theta[held], CLAMP - pre, 0.0)
    fired = int((change != 0).any(1).sum())
    right = truth.x + torch.einsum("tk,tkd->td", change, inputs.dec[held].double())

    def rows_right(values) -> int:
        return round(12 * truth.match(Answer(values=values)))

    assert 0 < fired < 12 and rows_right(right) == 12
    assert rows_right(truth.x) == 12 - fired
    assert rows_right(right + 1e-9) == fired, "where nothing fires the bits are kept"
    t, m = change.nonzero()[0]
    without = right.clone()
    without[t] -= change[t, m] * inputs.dec[held[t, m]].double()
    assert rows_right(without) == 11
    others = torch.arange(12) != t
    assert not (inputs.theta[held[t, m]] < truth.scores[others, held[t, m]]).any(), "another seed is needed"
    inputs.theta[held[t, m]] = pre[t, m].float()
    assert rows_right(without) == rows_right(right) == 12


def test_what_does_not_fit_or_cannot_be_done_is_recorded_with_its_reason():
    rows = run("codebook_quantize", memory=100, masks=("none",))
    assert {row["status"] for row in rows} == {"skipped"}
    assert all("the cell's own tensors would take" in row["note"] and row["y_value_50"] == "" for row in rows)

    cell = {"tokens": (4000,), "masks": ("none",), "dtypes": ("fp32",)}
    small, large = run("codebook_quantize", memory=10**6, providers=("cu_fast", "torch_fp32"), **cell)
    assert small["status"] == "ok" and large["status"] == "skipped" and "scores [T, C]" in large["note"]

    cell = {"tokens": (500,), "shapes": ((512, 2000, 4),), "masks": ("none",), "dtypes": ("fp32",)}
    (slow,) = run("codebook_quantize", providers=("reference",), **cell)
    assert slow["status"] == "skipped" and "multiply-adds" in slow["note"]


def test_a_provider_that_raises_does_not_cost_the_others(monkeypatch):
    def broken(inputs):
        raise ZeroDivisionError("what happened")

    monkeypatch.setitem(PROVIDERS["cpu"]["masked_decode"], "cu_fast", broken)
    failed, fine = run("masked_decode", providers=("cu_fast", "torch_fp32"), masks=("none",), dtypes=("fp32",))
    assert failed["status"] == "failed" and "what happened" in failed["note"]
    assert fine["status"] == "ok" and fine["ratio"] == ""


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch):
    build = PROVIDERS["cpu"]["masked_decode"]["torch_fp32"]

    def interrupted(inputs):
        if inputs.cell.T == 2:
            raise KeyboardInterrupt
        return build(inputs)

    monkeypatch.setitem(PROVIDERS["cpu"]["masked_decode"], "torch_fp32", interrupted)
    path = tmp_path / "made" / "rows.csv"
    options = {"providers": ("torch_fp32",), "masks": ("none",), "dtypes": ("fp32",)}
    with pytest.raises(KeyboardInterrupt):
        run("masked_decode", path, tokens=(1, 2, 3), **options)
    assert [row["x_value"] for row in bench.read_rows(path)] == ["1"]
    assert list(path.parent.iterdir()) == [path]

    new = run("masked_decode", path, tokens=(3,), **options)
    rows = bench.read_rows(path)
    assert [row["x_value"] for row in rows] == ["1", "3"]
    assert rows[1] == {name: str(value) for name, value in new[0].items()}


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "rows.csv"
    bench.write_rows(path, [dict.fromkeys(bench.COLUMNS, "a")])
    with pytest.raises(ValueError):
        bench.write_rows(path, [dict.fromkeys(bench.COLUMNS, "b"), {"unknown": 1}])
    assert len(bench.read_rows(path)) == 1 and list(tmp_path.iterdir()) == [path]


def test_a_slow_provider_is_called_once_and_the_rest_in_rounds():
    fast, slow = Job(lambda: None), Job(lambda: None)
    times = {"fast": [0.001], "slow": [2.0]}
    bench.take_turns({"fast": fast, "slow": slow}, times, bench.Plan(seconds=0.01, rounds=3), clock.HostClock())
    assert times["slow"] == [2.0] and len(times["fast"]) >= 3 and 0.001 not in times["fast"]


@pytest.mark.parametrize("cache, first", [("warm", "call"), ("cold", "read")])
def test_cache_decides_whether_an_untimed_call_or_other_memory_comes_first(cache, first, monkeypatch):
    monkeypatch.setattr(clock, "WARM", 0.0)  # one untimed call, however short
    made = []
    times, plan = {"one": [0.0]}, bench.Plan(seconds=1e-9, rounds=3, cache=cache)
    bench.take_turns({"one": Job(lambda: made.append("call"))}, times, plan, recorded(made, monkeypatch))
    assert made == 3 * [first, "call"] and len(times["one"]) == 3


def test_a_slow_provider_is_cold_too(monkeypatch):
    made = []
    calls = {"one": lambda inputs: Job(lambda: made.append("call"))}
    work = bench.Work(Cell("masked_decode", 3, 16, 70, 4), calls, lambda *_: (None, None))
    plan = bench.Plan(seconds=1e-9, cache="cold")
    (row,) = bench.measure_cell(work, plan, {"int8_gops": ""}, recorded(made, monkeypatch))
    assert made == ["call", "read", "call"] and row["rounds"] == 1 and bench.config(row)["cache"] == "cold"


def recorded(made, monkeypatch):
    """A clock that says when it reads what empties the caches."""
    memory = SimpleNamespace(amax=lambda: made.append("read"))
    monkeypatch.setattr(clock.HostClock, "_displacing", memory)
    return clock.HostClock()


def test_more_than_the_last_level_cache_holds_is_read(monkeypatch, tmp_path):
    monkeypatch.undo()  # conftest's cache
    monkeypatch.setattr(machine, "CACHES", tmp_path)
    assert machine.largest_cache() == 64 * 2**20
    for index, size in enumerate(("48K", "32K", "32768K", "1024K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert machine.largest_cache() == 32 * 2**20 and clock.HostClock()._displacing.nbytes == 64 * 2**20


def test_ceilings_are_measured_where_they_can_be():
    facts = machine.facts()
    assert all(facts[name] > 0 for name in machine.CEILINGS)
    facts |= {"int8_gops": 1000.0, "l3_gb_per_s": 200.0, "memory_gb_per_s": 50.0}
    share = machine.of_ceiling
    cell = Cell("codebook_quantize", 1, 512, 25_000, 8)
    assert math.isclose(share(cell, 1.0, facts), 12.8e6 / 200e9 * 1e3)
    assert math.isclose(share(cell, 1.0, facts, "cold"), 12.8e6 / 50e9 * 1e3)
    assert math.isclose(share(Cell("codebook_quantize", 1, 2048, 65_536, 8), 10.0, facts), 2048 * 65536 / 50e9 * 1e2)
    cell = Cell("codebook_quantize", 512, 512, 25_000, 8)
    assert math.isclose(share(cell, 20.0, facts), 2 * 512 * 12.8e6 / 1e12 * 1e3 / 20)
    assert share(Cell("masked_decode", 1, 512, 25_000, 8), 1.0, facts) == ""
    assert share(cell, 1.0, facts | {"int8_gops": ""}) == ""


# -- the command line --------------------------------------------------------------------------------------------

TINY_OPTIONS = ["--tokens", "3", "--shape", "16,70,4", "--seconds", "1e-6", "--rounds", "1", "--dtype", "fp32"]


def command(*arguments):
    return CliRunner().invoke(app.app, ["bench", *map(str, arguments)])


def test_the_command_prints_tables_and_writes_rows_that_it_can_show(tmp_path):
    path = tmp_path / "rows.csv"
    options = [*TINY_OPTIONS, "--mask", "none,1%", "--provider", "cu_fast,torch_fp32"]
    result = command("codebook_quantize,masked_decode", *options, "--output", path)
    assert result.exit_code == 0, result.output
    assert "codebook_quantize" in result.stdout and "torch_fp32" in result.stdout
    shown = command("--show", path, "--markdown")
    assert shown.exit_code == 0 and shown.stdout.count("| 16, 70, 4 | 1% | 3 |") == 2
    as_json = json.loads(command("--show", path, "--json").stdout)
    assert as_json == bench.read_rows(path) and len(as_json) == 8


def test_a_wrong_answer_and_a_missing_one_show_in_the_tables():
    rows = run("codebook_quantize", providers=("cu_fast", "torch_fp32"), masks=("none",), dtypes=("fp32",))
    rows[1]["match"] = 0.5
    assert "x* |" in bench.markdown(rows)
    rows[0] |= {"status": "skipped", "y_value_50": ""}
    rows[1]["ratio"] = ""
    assert "| - |" in bench.markdown(rows) and "* ms |" in bench.markdown(rows)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tokens", "1,x"], "tokens is '1,x'; it should be whole numbers"),
        (["--tokens", "0"], "tokens is 0; it should be at least 1"),
        (["--shape", "16,70"], "shape is 16,70; it should be E,C,k"),
        (["--shape", "16,4,70"], "shape is 16,4,70; it should be E,C,k with k <= C"),
        (["sae_encode", "--mask", "1%"], "no cell of 'sae_encode' has mask ('1%',); sae_encode has none"),
        (["delete_latents", "--mask", "1%"], "no cell of 'delete_latents' has mask ('1%',); delete_latents has one, "),
        (["masked_decode", "--mask", "one"], "no cell of 'masked_decode' has mask ('one',); masked_decode has none, "),
        (["--provider", "numpy"], "provider is 'numpy'; it should be one of "),
        (["--seconds", "0"], "seconds is 0.0; it should be greater than 0"),
        (["--rounds", "0"], "rounds is 0; it should be at least 1"),
        (["--threads", "0"], "threads is 0; it should be at least 1"),
        (["--device", "cuda", "--provider", "faiss"], "provider is 'faiss'; it should be one of cu_fast, "),
    ],
)
def test_a_wrong_option_is_named(arguments, words):
    result = command(*arguments)
    assert result.exit_code == 1 and f"error: {words}" in result.stderr, result.output


@pytest.mark.parametrize(
    "options, words",
    [
        ({"op": "models"}, "OP is 'models'; it should be one of sae_encode, "),  # benchmarks/bench_models.py
        ({"op": "bogus"}, "OP is 'bogus'; it should be one of sae_encode, "),
        ({"dtype": "fp8"}, "dtype is 'fp8'; it should be one of fp32, bf16"),
        ({"mask": "2%"}, "mask is '2%'; it should be one of none, 1%, 50%, rows"),
        ({"data": "moons"}, "data is 'moons'; it should be one of gaussian, "),
        ({"cache": "hot"}, "cache is 'hot'; it should be one of warm, cold"),
        ({"device": "tpu"}, "device is 'tpu'; it should be one of cpu, cuda"),
    ],
)
def test_a_wrong_choice_in_a_plan_is_named(options, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        make_plan(**{"op": "codebook_quantize"} | options)


def test_a_file_of_something_else_is_not_touched(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    result = command(*TINY_OPTIONS, "--output", path)
    assert result.exit_code == 1 and "not of this benchmark" in result.stderr
    assert path.read_text() == "a,b\n1,2\n"


def test_a_deletion_has_tokens_shapes_and_masks_of_its_own():
    cells = bench.Plan("delete_latents").cells()
    assert {cell.T for cell in cells} == {1, 8, 64, 512} and {cell.mask for cell in cells} == {"one", "rows"}
    assert {(cell.E, cell.C, cell.k) for cell in cells} == {(2304, 16_384, 20), (2304, 16_384, 345)}
    assert len(cells) == 32 == len(set(cells))


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_plot_is_drawn(tmp_path):
    plot = runpy.run_path(str(BENCHMARKS / "plot.py"))["plot"]
    rows = tmp_path / "rows.csv"
    run("masked_decode", rows, tokens=(1, 3), masks=("none",), dtypes=("fp32",))
    plot(rows, tmp_path / "picture.png", op="masked_decode")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no row of 'bottleneck'"):
        plot(rows, tmp_path / "none.png", op="bottleneck")
