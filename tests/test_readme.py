"""What the texts say is so: their Python runs, and the names, commands, files and links in them exist.

A pattern that finds nothing would make its test pass, so each test says what it has to find.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import recorded
import test_layers
import tiny_training
import torch
import transformers
from transformers.generation import ContinuousBatchingConfig
from typer.testing import CliRunner

import cu_fast
from cu_fast import ops
from cu_fast.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs/cli.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
# All but CHANGELOG.md, which says what was.
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "examples").glob("*/README.md")),
    )
}
# How many blocks of Python each text holds; one that is not here holds none.
BLOCKS = {"README.md": 3, "docs/models.md": 6, "docs/autoencoders.md": 4}
PATHS = "benchmarks|csrc|cu_fast|docs|examples|tests"


def found(pattern: str, texts: dict[str, str] = TEXTS) -> dict[str, list[str]]:
    """Text -> what a pattern finds there, of the texts where it finds something."""
    hits = {name: re.findall(pattern, text, re.MULTILINE | re.DOTALL) for name, text in texts.items()}
    return {name: hit for name, hit in hits.items() if hit}


# -- Python ---------------------------------------------------------------------------------------------------------


def run_blocks(name: str, given: dict) -> dict:
    """Runs the blocks of a text, one after the other, in one namespace. given: names that the text does not define."""
    space = dict(given)
    for i, block in enumerate(found(r"^```python\n(.*?)^```")[name], 1):
        exec(compile(block, f"{name}, block {i}", "exec"), space)
    return space


@pytest.fixture
def data():
    """Texts that the examples leave to the reader."""
    return {
        "target_texts": ["Anna writes books ."] * 9,
        "control_texts": ["the dog ran on the mat ."] * 9,
        "film_texts": ["the bird sings poems ."] * 9,
        "prompts": ["Anna writes", "the dog ran"],
        "rows": [{"prompt": "the dog", "completion": "ran on the mat ."}] * 4,
    }


@pytest.fixture
def poems(attachment, tokenizer, tmp_path, monkeypatch):
    """What `cu-fast train` would have written to runs/poems."""
    monkeypatch.chdir(tmp_path)
    attachment.model.generation_config.max_new_tokens = 4
    attachment.model.set_attn_implementation("eager")
    (bottleneck,) = attachment.bottlenecks.values()
    sha = bottleneck.codebook_sha256()

    def save(*topics: str) -> None:
        for i, topic in enumerate(topics):
            ids = range(i, 300, 7)
            attachment.add_mask(cu_fast.Mask.from_ids(ids, num_codes=300, codebook_sha256=sha, topic=topic))
        cu_fast.save_model(attachment, tokenizer, "runs/poems/model")

    return save


@pytest.fixture
def pretrained(tokenizer, tmp_path, monkeypatch):
    """A model folder at path/to/model, and at path/to/sae an autoencoder of its layer model.layers.1."""
    monkeypatch.chdir(tmp_path)
    model = tiny_training.tiny_llama(tokenizer)
    model.save_pretrained("path/to/model")
    tokenizer.save_pretrained("path/to/model")
    basis = torch.cat([torch.eye(32), -torch.eye(32)])
    sae = cu_fast.SAE(basis, torch.zeros(64), torch.full((64,), 0.01), basis.clone(), b_dec=torch.zeros(32))
    cu_fast.sae.save_sae(sae, "path/to/sae")


def test_every_block_is_run():
    assert {name: len(blocks) for name, blocks in found(r"^```python\n").items()} == BLOCKS


def test_the_blocks_of_the_readme_run(poems, pretrained, data, capsys):
    poems()
    torch.manual_seed(0)
    ran = run_blocks("README.md", data)
    assert "'hits'" in capsys.readouterr().out
    assert ran["finding"].mask.num_deleted > 0
    assert ran["topics"] == [{"topic"}, None]
    _, _, saved = cu_fast.load_model("runs/poems/model")
    assert set(saved.masks) == {"topic"}
    assert ran["y"].shape == ran["z"].shape
    best = [
        ops.codebook_quantize(
            ran["codes"][[0, 3]],
            ran["packed"],
            k=1,
            mask_table=ran["mask_table"],
            mask_row=torch.tensor([row, row]).int(),
        ).ids.flatten()
        for row in (-1, 0)
    ]
    assert best[0].tolist() == [0, 3] and not set(best[1].tolist()) & {0, 3}, "the mask deletes codes 0 and 3"


def test_the_blocks_on_models_run(poems, data, monkeypatch):
    poems("anna", "bruno")
    recorded.graphs(monkeypatch)  # it says that a model is on a GPU
    # Left to itself continuous batching takes most of the memory for its keys and values.
    batching = ContinuousBatchingConfig(num_blocks=64, page_size=16, max_batch_tokens=64)
    given = {"cu_fast": cu_fast, "torch": torch, "batching": batching, "prompt_ids": [[5, 6, 7], [8, 9]]}
    given["static_inputs"] = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 4]])}
    ran = run_blocks("docs/models.md", given | data)
    assert ran["logits"].isfinite().all()
    assert len(ran["outputs"]) == 2 and not any(output.error for output in ran["outputs"].values())
    assert set(ran["attachment"].masks) == {"anna"}
    assert ran["finding"].mask.num_deleted > 0


def test_the_blocks_on_autoencoders_run(pretrained, data, capsys):
    prompts = {"inputs": {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 4]])}}
    given = {"cu_fast": cu_fast, "torch": torch, "transformers": transformers} | prompts
    data = data | {name: data[name] * 4 for name in ("target_texts", "control_texts", "film_texts")}
    ran = run_blocks("docs/autoencoders.md", given | data)
    assert "'explained_variance'" in capsys.readouterr().out
    assert ran["topics"][0] == {"books"} and len(ran["topics"]) == 2 and set(ran["attachment"].masks) == {"books"}


def test_names_resolve_after_import_cu_fast_alone():
    names = sorted({name for hits in found(r"\bcu_fast((?:\.[A-Za-z_]\w*)+)").values() for name in hits})
    assert len(names) >= 15 and {".load_model", ".ops", ".ops.codebook_quantize", ".evaluate"} <= set(names)
    # First parts are looked up before anything is imported: a submodule that was imported for another name would be found.
    code = """
import functools, json, sys, cu_fast
names = [name[1:].split(".") for name in json.load(sys.stdin)]
missing = [name for name in names if name[0] not in dir(cu_fast)]
for name in names:
    try:
        functools.reduce(getattr, name, cu_fast)
    except AttributeError:
        missing.append(name)
print(json.dumps(missing))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=json.dumps(names), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


# -- commands -------------------------------------------------------------------------------------------------------


def test_every_command_is_in_the_table_and_every_row_is_a_command():
    commands = {command.name or command.callback.__name__ for command in app.app.registered_commands}
    for group in GROUPS:
        inner = group.typer_instance.registered_commands
        commands |= {f"{group.name} {command.name or command.callback.__name__}" for command in inner}
    groups = "|".join(group.name for group in GROUPS)
    assert commands == set(re.findall(rf"^\| `cu-fast ((?:(?:{groups}) )?\w+)", COMMANDS, re.MULTILINE))


GROUPS = app.app.registered_groups


USES = sorted({use for uses in found(r"(?:`|^)cu-fast (\w+[^`\n#]*)").values() for use in uses})


def test_there_are_commands_to_check():
    assert len(USES) >= 20
    assert sum(option.startswith("--") for use in USES for option in use.split()) >= 20


@pytest.mark.parametrize("use", USES)
def test_the_options_of_a_command_exist(use):
    command, *rest = use.partition(" -- ")[0].split()  # what is behind it is vLLM's
    inner = rest[:1] if command in {group.name for group in GROUPS} else []
    done = CliRunner().invoke(app.app, [command, *inner, "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for option in rest:
        if option.startswith("--"):
            assert re.search(rf"{option}\b", done.stdout), option


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = found(r"(?:`|^)make ([\w-]+)")
    assert {"demo", "test", "gpu-check"} <= set(targets["README.md"])
    assert {"test", "test-all", "lint", "format"} <= set(targets["CONTRIBUTING.md"])
    for name, hits in targets.items():
        for target in hits:
            assert f"\n{target}:" in makefile, f"{name}: make {target}"


def test_the_environment_variables_exist():
    variables = {hit for hits in found(r"\bCU_FAST_[A-Z_]+\b").values() for hit in hits}
    assert len(variables) >= 7
    suffixes = {".py", ".h", ".cpp", ".cu"}
    sources = [p for folder in ("cu_fast", "csrc", "tests/helpers") for p in (ROOT / folder).rglob("*.*")]
    code = "".join(p.read_text() for p in [*sources, *ROOT.glob("*.py")] if p.suffix in suffixes)
    assert {name for name in variables if f'"{name}"' not in code} == set()


# -- operators ------------------------------------------------------------------------------------------------------


def test_every_operator_is_in_the_table():
    """The table of the README holds all public operators, and only arguments that they have."""
    operators = {
        name
        for name in ops.__all__
        if inspect.isfunction(value := getattr(ops, name))
        if name == "pack_codes" or value.__module__ in (ops.__name__, "cu_fast.ops.latents")
    }
    rows = re.findall(r"^\| `(\w+)\(([^`]*)\)` \|", README, re.MULTILINE)
    assert {name for name, _ in rows} == operators
    for name, arguments in rows:
        listed = [argument.strip(" =") for argument in arguments.split(",")]
        assert set(listed) <= set(inspect.signature(getattr(ops, name)).parameters), name


# -- files and links ------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(README.encode()) <= 9000


def test_links_exist():
    links = found(r"\]\((?!https?:)([^)#\s]+)[^)]*\)")
    assert len(links["README.md"]) >= 15 and {"SECURITY.md", "docs/speed.md"} <= set(links["README.md"])
    assert "SECURITY.md" in links["CONTRIBUTING.md"]
    assert sum(map(len, links.values())) >= 40
    dead = [
        (name, link)
        for name, hits in links.items()
        for link in hits
        if not (ROOT / name).parent.joinpath(link).exists()
    ]
    assert dead == []


def test_every_text_is_linked_from_the_readme():
    links = {(ROOT / link).resolve() for link in found(r"\]\((?!https?:)([^)#\s]+)")["README.md"]}
    texts = {(ROOT / name).resolve() for name in TEXTS} - {(ROOT / "README.md").resolve()}
    assert len(texts) >= 10
    assert {text for text in texts if text not in links and text.parent not in links} == set()


def test_files_exist():
    paths = found(rf"`((?:{PATHS})/[\w./-]+)`")
    assert len(paths["CONTRIBUTING.md"]) >= 25
    assert [(name, path) for name, hits in paths.items() for path in hits if not (ROOT / path).exists()] == []


def test_contributing_lists_the_rooms_in_order():
    section = CONTRIBUTING.split("## The tree")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == test_layers.ROOMS
