"""`cu-fast tune` with a stand-in clock under Triton's interpreter, the file that it writes, and every way to break it."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cu_fast.bench import tune, tune_grid
from cu_fast.cli.app import app
from cu_fast.cli.terminal import console
from cu_fast.kernels.triton import launch, tiles

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install triton"
)
FACTS = ("card", "date", "cu_fast_version", "torch_version", "triton_version", "commit")


def interpreted(*arguments: str | Path, table: str) -> dict:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1",
        "CU_FAST_TRITON_TABLE": table,
    }  # fmt: skip
    command = [sys.executable, HERE / "tune_interpreted.py", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def runs(folder) -> dict:
    return interpreted("tune", folder, table="shipped")


def favourite(kernel: str, name: str) -> tiles.Config:
    """As in tune_interpreted.py: the last that does not ship."""
    rows, shipped = tune_grid.GRID[kernel][name], tune_grid.shipped_row(kernel, name, "sm_80")
    return [row for row in rows if row != shipped][-1]


def tried(record: dict, kernel: str, name: str) -> list[dict]:
    return record["candidates"][kernel][f"{name} sm_80"]


@needs_triton
class TestRun:
    def test_keeps_the_fastest_and_all_that_was_measured(self, runs):
        record = runs["all"]
        assert record["not_reached"] == record["failures"] == [] and all(name in record for name in FACTS)
        assert record["arch"] == "sm_80" and record["card"] == "Test GPU"
        assert set(record["rows"]) == set(tune_grid.GRID) and len(record["crossover"]) == 2
        for kernel, rows in record["rows"].items():
            for key, row in rows.items():
                name = key.removesuffix(" sm_80")
                best = tune_grid.shipped_row(kernel, name, "sm_80") if kernel == "finish" else favourite(kernel, name)
                candidates = tried(record, kernel, name)
                assert {n: row[n] for n in best.to_dict()} == best.to_dict(), (kernel, name)
                assert row["us"] == min(one["us"] for one in candidates), (kernel, name)
                assert all(one["failure"] is None for one in candidates), (kernel, name)
                assert len(candidates) == 2

    def test_a_new_process_takes_it_with_the_same_bits(self, runs, folder):
        record, used = runs["all"], interpreted("use", table=str(folder / "all.json"))
        assert used["same"] == [True] * 3
        assert used["tuning"] == record["tuning"] != {name: getattr(launch.TUNING, name) for name in launch.MEASURED}
        chosen = {name: row for name, row in used["rows"].items() if name.split()[0] != "score_codes"}
        for name in chosen:
            row = record["rows"][name.split()[0]][f"{name.split()[1]} sm_80"]
            assert chosen[name] == repr(
                tiles.Config(tuple(list(row.items())[:-3]), row["num_warps"], row["num_stages"])
            )
        one = favourite("score_codes", "one")
        with_list = one._replace(blocks=(*one.blocks, ("BLOCK_K", 16)))
        assert used["rows"]["score_codes one"] == repr(with_list)
        for kernel, name in (("scan_codes", "few"), ("scan_codes", "many"), ("narrow", "all"), ("scan_rows", "all")):
            assert [kernel, repr(favourite(kernel, name))] in used["started"]

    def test_what_was_not_reached_is_said(self, runs):
        assert "the budget of 1e-09 seconds was used up" in runs["no time"] and "is not there" in runs["no time"]
        assert runs["little time"]["not_reached"] == ["gather_sum wide", "crossover"]
        assert list(runs["little time"]["rows"]["gather_sum"]) == ["narrow sm_80"]

    def test_goes_through_graphs(self, runs):
        assert runs["graphs"]["card"] == "Test GPU" and runs["graphs"]["failures"] == []
        assert all(one["us"] > 0 and one["failure"] is None for one in tried(runs["graphs"], "encode_tile", "one"))

    def test_what_is_not_captured_is_not_timed(self, runs):
        assert "encode_tile one: RuntimeError: launched eagerly, not captured" in runs["not captured"]
        assert "is not there" in runs["not captured"]

    @pytest.mark.parametrize("name, reason, timed", [
        ("other bits", "ValueError: other bits", False), ("other bits with masks", "k = 16, fp32, 50% masked: ValueErr", True),
        ("too large", "k = 64, fp32, 50% masked: RuntimeError: out of resource: shared memory", True),
    ])  # fmt: skip
    def test_a_row_that_fails_is_not_kept(self, name, reason, timed, runs):
        shipped, fast = tried(runs[name], "score_codes", "one")
        assert fast["failure"].startswith(reason) and "\n" not in fast["failure"]
        assert (fast["us"] is not None) == timed
        row = tune_grid.shipped_row("score_codes", "one", "sm_80")
        assert runs[name]["rows"]["score_codes"]["one sm_80"] == row.to_dict() | {"us": shipped["us"]}


# -- candidates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [*launch.SHARED_MEMORY, "sm_89"])
def test_the_row_that_ships_is_the_first_candidate(arch):
    for kernel, named in tune_grid.GRID.items():
        for name in named:
            rows = tune_grid.candidates(kernel, name, arch)
            (first, fault), *rest = rows.items()
            assert fault is None and first == tune_grid.shipped_row(kernel, name, arch)
            assert len(rest) >= 5 and {row.blocks[0][0] for row in rows} == {first.blocks[0][0]}
            assert all([n for n, _ in row.blocks] == [n for n, _ in first.blocks] for row in rows)
    assert tune_grid.shipped_row("score_codes", "many", "gfx942").block("T") == 16


def test_scenes_take_the_rows_that_they_are_for(monkeypatch):
    assert {kernel: list(named) for kernel, named in tune_grid.SCENES.items()} == {
        kernel: list(named) for kernel, named in tune_grid.GRID.items()
    }
    for kernel, named in tune_grid.SCENES.items():
        for name, scenes in named.items():
            mine = favourite(kernel, name)
            rows = launch.TABLE | {kernel: launch.TABLE[kernel] | {f"{name} sm_80": mine}}
            monkeypatch.setitem(launch.IN_FORCE, "sm_80", tiles.Table(rows))
            for scene in (*scenes, *tune_grid.proofs(kernel, scenes[0])):
                cell = scene.cell
                row = launch.choose(kernel, "sm_80", cell.T, cell.E, cell.C, cell.k)
                assert dict(mine.blocks).items() <= dict(row.blocks).items() | {("BLOCK_T", mine.blocks[0][1])}
                assert row.num_warps == mine.num_warps and row.num_stages == mine.num_stages


def test_proofs_have_every_list_and_more_to_hold():
    first = tune_grid.SCENES["score_codes"]["one"][0]
    proofs = tune_grid.proofs("score_codes", first)
    lists = [launch.choose("score_codes", "sm_80", 1, 512, 25_000, p.cell.k).block("K") for p in proofs]
    assert lists == [*launch.LISTS, 0] and all(
        p.hits and p.cell.mask == "50%" and p.cell.dtype == "fp32" for p in proofs
    )
    (one,) = tune_grid.proofs("scan_codes", tune_grid.SCENES["scan_codes"]["many"][0])
    assert one.scan and one.cell.T == 256


def test_what_exceeds_the_shared_memory_is_not_compiled(monkeypatch):
    large = tiles.config(8, 6, T=128, C=128, E=64)
    monkeypatch.setitem(tune_grid.GRID, "scan_codes", {"many": (large,)})
    assert "122880 B of shared memory; 65536 are there" in tune_grid.candidates("scan_codes", "many", "gfx942")[large]
    assert tune_grid.candidates("scan_codes", "many", "sm_90")[large] is None


# -- from where on the scan is faster ----------------------------------------------------------------------------


def cells_of(tuning: launch.Tuning) -> list[dict]:
    """Times by the model itself."""
    cells = []
    for scene in tune_grid.CROSSING:
        T, entries = scene.cell.T, scene.cell.C * scene.cell.E
        exact = max(3 * entries / tuning.read_rate, T * entries / tuning.exact_rate)
        scan = tuning.scan_start + max(entries / tuning.read_rate, T * entries / tuning.scan_rate)
        cells.append(dataclasses.asdict(scene.cell) | {"exact_us": exact, "scan_us": scan})
    return cells


@pytest.mark.parametrize("rates", [(30.0, 1e6, 5e5, 4e7), (200.0, 8e5, 3e6, 5e7), (5.0, 5e6, 4e6, 9e8)])
def test_the_rates_of_the_model_are_found_again(rates):
    truth = dict(zip(launch.MEASURED, rates))
    cells = cells_of(launch.TUNING._replace(**truth))
    assert tune.lost(cells, truth) == 0
    found = tune.fit(cells)
    assert tune.lost(cells, found) == 0 and found == pytest.approx(truth, rel=0.05)


def test_rates_that_choose_worse_than_those_that_ship_are_not_kept():
    cells = cells_of(launch.TUNING)
    cells[0]["scan_us"] = 1e4  # a hiccup, in the cell that the start comes from
    assert tune.fit(cells) == {name: getattr(launch.TUNING, name) for name in launch.MEASURED}


def test_measured_rates_decide_whether_a_selection_scans(monkeypatch):
    def scans() -> bool:
        return launch.plan(512, 512, 25_000, 8, True, 132, "sm_90").scans

    assert scans()
    for field, value in (("scan_start", 1e6), ("scan_rate", 1e3), ("exact_rate", 1e12)):
        monkeypatch.setitem(launch.IN_FORCE, "sm_90", tiles.Table(launch.TABLE, {field: value, "read_rate": 1e9}))
        assert not scans(), field


# -- the file ----------------------------------------------------------------------------------------------------

ROW = {"BLOCK_T": 32, "BLOCK_C": 128, "BLOCK_E": 64, "num_warps": 4, "num_stages": 3, "us": 8.5}
RECORD = {
    "format": "cu_fast.triton_table", "format_version": 1, "arch": "sm_90", "card": "a card", "date": "2026-01-31",
    "rows": {"scan_codes": {"many sm_90": ROW}}, "tuning": {"scan_start": 33.5},
}  # fmt: skip


def changed(*where, value) -> dict:
    """RECORD with another value at a path of keys."""
    record = json.loads(json.dumps(RECORD))
    functools.reduce(dict.__getitem__, where[:-1], record)[where[-1]] = value
    return record


def without(row: dict, name: str) -> dict:
    return {key: value for key, value in row.items() if key != name}


@pytest.fixture
def user(monkeypatch, tmp_path):
    """A process that has read no table yet, whose user's cache is empty."""
    monkeypatch.setattr(launch, "IN_FORCE", {})
    monkeypatch.delenv("CU_FAST_TRITON_TABLE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cu_fast" / "triton-sm_90.json"


def many(arch: str = "sm_90") -> tiles.Config:
    return launch.choose("scan_codes", arch, 64, 512, 25_000, 8)


def test_a_users_table_is_laid_over_what_ships(user):
    assert many() == launch.TABLE["scan_codes"]["many"]
    launch.IN_FORCE.clear()
    tiles.write(user, RECORD, launch.RULES)
    assert [path.name for path in user.parent.iterdir()] == [user.name]
    assert many() == tiles.config(4, 3, T=32, C=128, E=64)
    assert many("sm_100") == launch.TABLE["scan_codes"]["many sm_100"]
    assert launch.choose("scan_codes", "sm_90", 8, 512, 25_000, 8) == launch.TABLE["scan_codes"]["few"]
    assert launch.tuning_of("sm_90") == launch.TUNING._replace(scan_start=33.5)
    user.unlink()
    assert many() == tiles.config(4, 3, T=32, C=128, E=64), "read once"


def test_an_architecture_without_rows_of_its_own_takes_its_table_before_its_familys(user):
    for arch in ("sm_89", "gfx950"):
        path = user.with_name(f"triton-{arch}.json")
        tiles.write(path, RECORD | {"arch": arch, "rows": {"scan_codes": {f"many {arch}": ROW}}}, launch.RULES)
        assert many(arch) == tiles.config(4, 3, T=32, C=128, E=64)
    assert many("sm_80") == launch.TABLE["scan_codes"]["many"]
    assert many("gfx942") == launch.TABLE["scan_codes"]["many gfx942"]


def test_the_variable_names_another_table_or_none(user, monkeypatch, tmp_path):
    tiles.write(user, RECORD, launch.RULES)
    monkeypatch.setenv("CU_FAST_TRITON_TABLE", "shipped")
    assert many() == launch.TABLE["scan_codes"]["many"] and tiles.home("sm_90") == user
    launch.IN_FORCE.clear()
    other = tmp_path / "other.json"
    monkeypatch.setenv("CU_FAST_TRITON_TABLE", str(other))
    assert tiles.home("sm_90") == other
    with pytest.raises(ValueError, match=r"other\.json: .*No such file.*or unset CU_FAST_TRITON_TABLE"):
        many()
    other.write_text(json.dumps(changed("rows", "scan_codes", "many sm_90", "BLOCK_T", value=16)))
    assert many().block("T") == 16


BROKEN = {
    "no JSON": ("{", "it is not JSON"),
    "not text": (b"\xff\xfe", "it is not JSON"),
    "no object": ("[1]", "the file is .1.; it should be an object"),
    "another file": (changed("format", value="x"), "format is 'x'; it should be 'cu_fast.triton_table'"),
    "another version": (changed("format_version", value=2), "format_version is 2; it should be 1"),
    "another architecture": (changed("arch", value="sm_80"), "arch is 'sm_80'; it should be 'sm_90'"),
    "rows": (changed("rows", value=[]), "rows is ..; it should be an object"),
    "no tuning": (without(RECORD, "tuning"), "tuning is None; it should be an object"),
    "a kernel": (changed("rows", "scan", value={}), "'scan' is no kernel; there are fix_rows, score_codes, "),
    "rows of a kernel": (changed("rows", "narrow", value=3), "narrow is 3; it should be an object"),
    "a name": (changed("rows", "narrow", value={"some sm_90": ROW}), "narrow, row 'some sm_90' .* there are all sm_90"),
    "a row of another architecture": (changed("rows", "narrow", value={"all sm_80": ROW}), "row 'all sm_80' is none"),
    "a row of all architectures": (changed("rows", "narrow", value={"all": ROW}), "row 'all' is none"),
    "no row": (changed("rows", "narrow", value={"all sm_90": 1}), "narrow, row 'all sm_90' is 1; it should be an obj"),
    "other parameters": (changed("rows", "narrow", value={"all sm_90": ROW}), "has BLOCK_T, .* it should have BLOCK_N"),
    "no time": (changed("rows", "scan_codes", "many sm_90", value=without(ROW, "us")), "it should have .*us"),
    "a time": (changed("rows", "scan_codes", "many sm_90", "us", value="1"), "us is '1'; it should be a number"),
    "a text": (changed("rows", "scan_codes", "many sm_90", "BLOCK_T", value="32"), "BLOCK_T is '32'; .* whole number"),
    "a truth": (changed("rows", "scan_codes", "many sm_90", "num_warps", value=True), "num_warps is True; .* whole"),
    "no power of two": (changed("rows", "scan_codes", "many sm_90", "BLOCK_C", value=48), "BLOCK_C is 48; .* power of two"),
    "zero": (changed("rows", "scan_codes", "many sm_90", "BLOCK_C", value=0), "BLOCK_C is 0; .* power of two"),
    "huge": (changed("rows", "scan_codes", "many sm_90", "BLOCK_C", value=1 << 17), "BLOCK_C is 131072; .* at most 65536"),
    "warps": (changed("rows", "scan_codes", "many sm_90", "num_warps", value=3), "num_warps is 3; it should be 1, 2, 4"),
    "stages": (changed("rows", "scan_codes", "many sm_90", "num_stages", value=9), "num_stages is 9; .* between 1 and 8"),
    "too much memory": (
        changed("rows", "scan_codes", "many sm_90", "BLOCK_C", value=2048), "take 270336 B of shared memory; 232448 are there"
    ),
    "entries left out": (
        changed("rows", "scan_codes", "many sm_90", "BLOCK_E", value=128), "BLOCK_E is 128; it should be between 32 and 64"
    ),
    "a field": (changed("tuning", "chunk", value=1), "tuning: 'chunk' is no field; there are scan_start, "),
    "a rate": (changed("tuning", "scan_start", value=0), "scan_start is 0; it should be a number above 0"),
    "no number": (changed("tuning", "scan_start", value="Infinity"), "scan_start is 'Infinity'; it should be a number"),
    "infinite": (json.dumps(RECORD).replace("33.5", "Infinity"), "scan_start is inf; it should be a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_an_error_each_time(name, user):
    content, words = BROKEN[name]
    user.parent.mkdir()
    user.write_bytes(content if isinstance(content, bytes) else
                     (content if isinstance(content, str) else json.dumps(content)).encode())  # fmt: skip
    for _ in range(2):
        with pytest.raises(ValueError, match=words) as error:
            many()
        assert str(user) in str(error.value) and "delete it or run `cu-fast tune` again" in str(error.value)
    many("sm_100")


def test_a_table_that_would_be_refused_is_not_written(user):
    tiles.write(user, RECORD, launch.RULES)
    with pytest.raises(ValueError, match="BLOCK_C is 48"):
        tiles.write(user, changed("rows", "scan_codes", "many sm_90", "BLOCK_C", value=48), launch.RULES)
    with pytest.raises(ValueError, match="not JSON compliant"):
        tiles.write(user, RECORD | {"crossover": [float("nan")]}, launch.RULES)
    assert json.loads(user.read_text()) == RECORD and [path.name for path in user.parent.iterdir()] == [user.name]


# -- the command -------------------------------------------------------------------------------------------------


def command(*arguments: str):
    return CliRunner().invoke(app, ["tune", *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_tuned(user, tmp_path, monkeypatch):
    result = command("--output", str(tmp_path / "table.json"))
    assert result.exit_code == 1 and "error: nothing can be tuned here: " in result.stderr
    assert "nvidia-smi" in result.stderr or "pip install" in result.stderr
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "kernels are interpreted; unset it" in command().stderr
    assert not list(tmp_path.rglob("*.json"))


def test_wrong_options_are_named():
    result = command("--budget", "0")
    assert result.exit_code == 1 and "budget is 0 seconds; it should be above 0" in result.stderr


def test_show_and_env_say_which_table_is_in_force(user, monkeypatch):
    monkeypatch.setattr(tune, "arch_here", lambda: "sm_90")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(console, "width", 200)

    def env() -> str:
        return json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)["triton table"]

    assert "as shipped, not measured" in command("--show").stdout and env() == "as shipped, not measured"
    assert "8.5" not in command("--show").stdout
    launch.IN_FORCE.clear()
    tiles.write(user, RECORD, launch.RULES)
    found = json.loads(command("--show", "--json").stdout)
    measured = [row for row in found["rows"] if row["measured"]]
    assert [(row["kernel"], row["for"], row["us"]) for row in measured] == [("scan_codes", "many", 8.5)]
    assert measured[0]["tiles"] == without(ROW, "us")
    assert {row["kernel"] for row in found["rows"]} == set(launch.TABLE)
    assert found["tuning"]["scan_start"] == {"value": 33.5, "measured": True}
    assert found["tuning"]["scan_rate"] == {"value": launch.TUNING.scan_rate, "measured": False}
    assert env() == f"{user}, a card, 2026-01-31"
    assert "T 32, C 128, E 64, num_warps 4, num_stages 3" in command("--show").stdout
    launch.IN_FORCE.clear()
    user.write_text("{")
    assert env().startswith(f"error: the table of Triton tiles {user}: it is not JSON")
    assert command("--show").exit_code == 1


def test_what_was_tuned_is_printed(monkeypatch):
    row = {**ROW, "failure": None}
    found = RECORD | {
        "candidates": {"scan_codes": {"many sm_90": [row | {"us": 9.25}, row, row | {"us": None, "failure": "why"}]}},
        "not_reached": ["narrow all"], "failures": ["crossover: it broke"], "path": "/a/[file]",
    }  # fmt: skip
    asked = []
    monkeypatch.setattr(tune, "run", lambda *given, **options: asked.append((given, options)) or found)
    text = command("--budget", "7", "--output", "/a/[file]").stdout
    assert asked == [((Path("/a/[file]"), 7.0), {"progress": True})]
    assert all(
        words in text for words in (" 8.5 ", " 9.2 ", "not reached: narrow all", "failed: crossover", "/a/[file]")
    )
    assert json.loads(command("--json").stdout) == found
