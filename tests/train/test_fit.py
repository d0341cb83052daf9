"""Fitting codes to a frozen model: gradients, what is written, resuming, wrong input, two processes, the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from command_line import run
from tiers import heavy
from tiny_fit import LAYER, sentences, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cu_fast.train.fit as fit
from cu_fast import attach
from cu_fast.hf.files import read_record
from cu_fast.nn import BottleneckConfig
from cu_fast.sae import load_sae
from cu_fast.train import topk
from cu_fast.train.book import Book
from cu_fast.train.fit import fit_codes
from cu_fast.train.states import Reader
from cu_fast.train.topk import AUX_SHARE, AUX_TIMES, TILE, TopK

TEXTS = sentences(160)


def planted(n, width=32, directions=60, active=3, seed=0):
    """Rows that are sums of a few of some directions, with a mean: what sparse codes can say."""
    g = torch.Generator().manual_seed(seed)
    words = F.normalize(torch.randn(directions, width, generator=g), dim=1)
    kept = torch.rand(n, directions, generator=g).topk(active).indices
    sizes = torch.rand(n, directions, generator=g) + 0.5
    x = torch.zeros(n, directions).scatter_(1, kept, sizes.gather(1, kept)) @ words
    return (5 * x + torch.linspace(-2, 2, width)).bfloat16()


def trained(module, rows, steps, batch=256, rate=5e-3):
    """Without the trainer: Adam, and what the trainer calls around a step."""
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    for step in range(steps):
        some = torch.arange(step * batch, (step + 1) * batch) % len(rows)
        optimizer.zero_grad()
        module(rows[some])["loss"].backward()
        module.before_step()
        optimizer.step()
        module.after_step()
    return module


# -- the TopK autoencoder --------------------------------------------------------------------------------------------


def dense_loss(module, rows):
    """The same loss by dense PyTorch."""
    n = (rows.float() - module.mean) / module.scale
    pre = n @ module.W_enc.T + module.b_enc

    def acts(pre, k):
        return torch.zeros_like(pre).scatter(1, pre.topk(k).indices, pre.topk(k).values).relu()

    error = n - (acts(pre, module.k) @ module.W_dec + module.b_dec)
    dead = module.idle >= module.dead_after
    loss = error.square().mean()
    if dead.any():
        among = pre.masked_fill(~dead, -math.inf)
        kept = torch.where(dead, acts(among, min(AUX_TIMES * module.k, int(dead.sum()))), 0)
        rest = kept @ module.W_dec - error.detach()
        loss = loss + AUX_SHARE * rest.square().mean() / error.detach().square().mean()
    return loss


@pytest.mark.parametrize("dead", [0, 5, 40])
@pytest.mark.parametrize("bf16", [False, True])
def test_loss_and_gradients_are_those_of_dense_products(dead, bf16):
    """fp32: sums in another order. bf16: 8 bits a factor, over 32 products, and other latents at near ties."""
    rows = planted(300)
    module = TopK(32, 80, 4, dead_after=100)
    module.start(rows, torch.Generator())
    with torch.no_grad():
        module.b_enc.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
        module.b_dec.fill_(0.1)
    module.idle[:dead] = 100
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = module(rows)["loss"]
    loss.backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module.idle.zero_()
    module.idle[:dead] = 100
    wanted = dense_loss(module, rows)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=2e-2 if bf16 else 1e-5, atol=0)
    for grad, parameter in zip(found, module.parameters()):
        error = (grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < (0.15 if bf16 else 1e-4)


def test_dead_latents_come_back(monkeypatch):
    def dead_after_training():
        rows = planted(4096)
        module = TopK(32, 64, 3, dead_after=1024)
        module.start(rows, torch.Generator())
        with torch.no_grad():
            module.W_enc[:20] *= 0.01  # they never are among the best
        dead = []
        for _ in range(2):
            trained(module, rows, 60)
            dead.append(module.figures(rows)["dead_share"])
        return dead

    assert dead_after_training()[-1] < 0.1
    monkeypatch.setattr(topk, "AUX_SHARE", 0.0)
    assert dead_after_training()[-1] > 0.25


def test_rows_of_the_decoder_keep_length_one_and_start_at_data():
    rows = planted(512)
    module = TopK(32, 64, 3, dead_after=10**6)
    module.start(rows, torch.Generator())
    n = (rows.float() - module.mean) / module.scale
    torch.testing.assert_close(module.W_dec.data, F.normalize(n[:64], dim=1))
    torch.testing.assert_close(F.normalize(module.W_enc, dim=1), module.W_dec.data)
    y, kept = module.reconstruct(rows)
    assert kept.max() <= 3 and y.float().var() < 1.5 * rows.float().var()
    module(rows)["loss"].backward()
    module.before_step()
    along = (module.W_dec.grad * module.W_dec).sum(1)
    assert along.abs().max() < 1e-6 < module.W_dec.grad.abs().max()
    trained(module, rows, 5)
    torch.testing.assert_close(module.W_dec.norm(dim=1), torch.ones(64))


def test_no_matrix_of_a_batch_by_all_latents_is_made():
    C, n = 700, 2 * TILE + 100
    module = TopK(32, C, 4, dead_after=100)
    rows = planted(n)
    module.start(rows, torch.Generator())
    module.idle[:50] = 100
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        module(rows)["loss"].backward()
    assert max(sizes) == TILE * C < n * C


def test_the_folded_autoencoder_computes_the_same_on_plain_inputs():
    rows = planted(1024)
    module = TopK(32, 64, 3, dead_after=10**6)
    module.start(rows, torch.Generator())
    trained(module, rows, 150)
    assert module.figures(rows)["explained_variance"] > 0.8
    sae = module.to_sae(LAYER, "m")
    assert (sae.kind, sae.k, sae.scale, sae.site, sae.provenance.model) == ("topk", 3, "none", LAYER, "m")
    torch.testing.assert_close(sae.dec.norm(dim=1), torch.ones(64))
    x = rows.float()
    y, kept = module.reconstruct(rows)
    acts = sae.activations(x)
    constant = module.b_dec * module.scale + module.mean
    torch.testing.assert_close(sae.decode(acts) + constant, y, rtol=1e-4, atol=1e-3)
    assert torch.equal((acts > 0).sum(1), kept)


# -- whole runs ------------------------------------------------------------------------------------------------------


def fitted(model, tokenizer, output, data=TEXTS, **changes):
    return fit_codes(model, tokenizer, data, output, **settings(**changes))


def held_out(model, tokenizer):
    """The held-out windows' rows, by the module's own rule: every 20th window."""
    some = [tokenizer(t)["input_ids"] for t in TEXTS[::20]]
    return Reader(model, LAYER, 0)(some).float()


def test_a_topk_folder_is_read_and_explains_what_was_said(model, tokenizer, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    figures = fitted(model, tokenizer, tmp_path / "sae", epochs=8.0)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [entry.name for entry in tmp_path.iterdir()] == ["sae"]
    sae = load_sae(tmp_path / "sae")
    assert (sae.kind, sae.k, sae.num_latents, sae.d_in, sae.site) == ("topk", 4, 64, 32, LAYER)
    x = held_out(model, tokenizer)
    y = sae.decode(sae.activations(x))
    y = y + (x - y).mean(0)  # what is added whatever fires is not in the folder
    explained = float(1 - (x - y).square().sum() / (x - x.mean(0)).square().sum())
    assert 0.5 < figures["explained_variance"] <= explained < figures["explained_variance"] + 0.05
    assert 3 < figures["l0"] <= 4 and 0 <= figures["dead_share"] < 0.5
    assert figures["tokens"] == sum(len(tokenizer(t)["input_ids"]) for t in TEXTS)
    parts = figures["seconds_counting"] + figures["seconds_model"] + figures["seconds_training"]
    assert parts == pytest.approx(figures["seconds"]) and figures["seconds_model"] > 0


def test_a_codebook_folder_is_attached_and_explains_what_was_said(model, tokenizer, tmp_path):
    figures = fitted(model, tokenizer, tmp_path / "book", kind="codebook", epochs=8.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["book"]
    x = held_out(model, tokenizer)
    attachment = attach(model, tmp_path / "book")
    (bottleneck,) = attachment.bottlenecks.values()
    config = bottleneck.config
    assert (config.weight, config.activation, config.code_dim, config.num_codes, config.k) == ("one", "none", 24, 64, 4)
    assert getattr(config, "splice", "delta") == "delta"
    assert list(read_record(tmp_path / "book").configs) == [LAYER]
    plain = BottleneckConfig(32, 24, 64, 4, activation="none")
    alone = Book(plain, 1).bottleneck
    alone.load_state_dict(bottleneck.state_dict())
    y = alone.eval()(x)
    explained = float(1 - (x - y).square().sum() / (x - x.mean(0)).square().sum())
    assert explained == pytest.approx(figures["explained_variance"], abs=1e-4) and explained > 0.4
    assert figures["l0"] == 4


def test_the_model_runs_once_per_token_without_a_gradient_and_no_further_than_the_layer(model, tokenizer, tmp_path):
    read, above = [], []

    def look(module, given, output):
        read.append(int((given[0] != tokenizer.pad_token_id).sum()))
        assert not torch.is_grad_enabled() and torch.is_inference_mode_enabled()

    model.model.embed_tokens.register_forward_hook(look)
    model.model.layers[2].register_forward_hook(lambda *_: above.append(1))
    rows = (2 * 32 + 4) * 400
    figures = fitted(model, tokenizer, tmp_path / "sae", epochs=5.0, buffer_bytes=rows)
    assert sum(read[1:]) == figures["tokens"] > 1000 and not above  # the first is the probe of the layer's width
    assert figures["rows"] > 2 * 400


def test_the_log_holds_the_figures(model, tokenizer, tmp_path, monkeypatch):
    logs = []
    monkeypatch.setattr(fit.CodebookTrainer, "log", lambda self, logs_, *_, **__: logs.append(dict(logs_)))
    for kind in ("topk", "codebook"):
        logs.clear()
        figures = fitted(model, tokenizer, tmp_path / kind, kind=kind, epochs=6.0)
        during = [entry for entry in logs if "loss" in entry]
        assert len(during) == figures["steps"] // 5 > 4
        assert all({"explained_variance", "dead_share", "l0"} <= set(entry) for entry in during)
        assert during[-1]["explained_variance"] > during[0]["explained_variance"]


def test_dead_codes_are_moved(model, tokenizer, tmp_path, monkeypatch):
    def moved(every):
        monkeypatch.setattr(fit, "RESEED_EVERY", every)
        made = []
        monkeypatch.setattr(fit.CodebookBottleneck, "reseed_dead", lambda self, g: made.append(1))
        fitted(model, tokenizer, tmp_path / f"book{every}", kind="codebook")
        return len(made)

    assert moved(10) == 2  # of about 42 steps: 10 and 20, as 30 is beyond 0.7 of them


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("kind", "at"), [("topk", 23), ("codebook", 23), ("topk", 3)])
def test_a_stopped_run_goes_on_to_the_same_bytes(model, tokenizer, tmp_path, monkeypatch, kind, at):
    """In several rounds. Stopped before the first checkpoint nothing is left; a killed process leaves a folder."""
    monkeypatch.setattr(fit, "RESEED_EVERY", 3)  # the checkpoint after step 20 is between two
    monkeypatch.setattr(fit, "DEAD_ROWS", 640)
    saving = {"disable_tqdm": True, "save_steps": 5}
    options = dict(kind=kind, num_codes=200, buffer_bytes=(2 * 32 + 4) * 400, arguments=saving)
    figures = fitted(model, tokenizer, tmp_path / "whole", **options)
    assert figures["steps"] > 30

    def stop(self, args, state, control, **_):
        if state.global_step == at:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(fit.StepCallback, "on_step_end", stop, raising=False)
        with pytest.raises(Stopped):
            fitted(model, tokenizer, tmp_path / "stopped", **options)
    assert not (tmp_path / "stopped").exists()
    if at == 3:
        assert not (tmp_path / "stopped.run").exists()
        with pytest.raises(ValueError, match="resume is set, and there is no stopped run"):
            fitted(model, tokenizer, tmp_path / "stopped", resume=True, **options)
        (tmp_path / "stopped.run").mkdir()  # as of a process that was killed
        (tmp_path / "stopped.run" / "rows.bf16").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="holds a run that was stopped; go on with it with resume, or delete it"):
        fitted(model, tokenizer, tmp_path / "stopped", **options)
    if at == 23:
        with pytest.raises(ValueError, match=r"epochs was 3\.0 and is 4\.0"):
            fitted(model, tokenizer, tmp_path / "stopped", resume=True, **options, epochs=4.0)
    again = fitted(model, tokenizer, tmp_path / "stopped", resume=True, **options)
    name = "bottleneck.safetensors" if kind == "codebook" else "sae_weights.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert again["explained_variance"] == figures["explained_variance"]
    assert again["dead_share"] == figures["dead_share"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["stopped", "whole"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(layer="model.layer.1"), ValueError, r"no layer 'model.layer.1'; near names: model\.layers\.1"),
        (dict(data=[]), ValueError, "data is data, which holds no text"),
        (dict(data=["the"]), ValueError, "holds no text; give at least one of several tokens"),
        (dict(data=["the cat sat"]), ValueError, "num_codes is 64, and data, data, gives 0 rows"),
        (dict(num_codes=5000), ValueError, r"num_codes is 5000, .* rows to train on; .* at most \d+ codes"),
        (dict(buffer_bytes=1000), ValueError, r"buffer_bytes is 1000; it should be at least \d+: \d+ rows .* 68 bytes"),
        (dict(kind="jumprelu"), ValueError, "kind is 'jumprelu'; it should be 'topk' or 'codebook'"),
        (dict(k=65), ValueError, "k is 65; it should be at most num_codes, 64"),
        (dict(k=-1), ValueError, "k is -1; it should be an int, at least 1"),
        (dict(num_codes=0), ValueError, "num_codes is 0; it should be an int, at least 1"),
        (dict(tokens=1), ValueError, "tokens is 1; it should be an int, at least 2"),
        (dict(max_length=65), ValueError, "max_length is 65; it should be at most the model's longest text, 64"),
        (dict(epochs=0.0), ValueError, "epochs is 0.0; it should be finite and above 0"),
        (dict(learning_rate=math.nan), ValueError, "learning_rate is nan; it should be finite"),
        (dict(data="none.txt"), FileNotFoundError, "data is none.txt, which does not exist"),
    ],
)
def test_wrong_arguments_are_named_and_leave_nothing(model, tokenizer, tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        fitted(model, tokenizer, tmp_path / "out", **change)
    assert list(tmp_path.iterdir()) == []


def test_the_size_that_a_message_asks_for_is_enough_and_a_byte_less_is_not(model, tokenizer, tmp_path):
    def needed(size):
        with pytest.raises(ValueError, match="buffer_bytes is") as caught:
            fitted(model, tokenizer, tmp_path / "out", buffer_bytes=size)
        return int(str(caught.value).partition("at least ")[2].partition(":")[0])

    size = needed(1000)
    assert needed(size - 1) == size
    assert fitted(model, tokenizer, tmp_path / "out", buffer_bytes=size, epochs=0.5)["rows"] > 10 * 64


@pytest.mark.parametrize("kind", ["topk", "codebook"])
def test_an_output_that_is_there_is_not_touched(model, tokenizer, tmp_path, kind):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"output is .*out, which is there already; give the name of a new folder"
    ):
        fitted(model, tokenizer, tmp_path / "out", kind=kind)
    with pytest.raises(FileExistsError, match="thesis is a file"):
        fitted(model, tokenizer, tmp_path / "out" / "thesis", kind=kind)
    assert [(p.name, p.read_text()) for p in (tmp_path / "out").iterdir()] == [("thesis", "mine")]


def test_a_model_with_bottlenecks_is_refused_before_the_work(attachment, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="already have bottlenecks"):
        fitted(attachment.model, tokenizer, tmp_path / "out", kind="codebook")
    assert list(tmp_path.iterdir()) == []


@heavy
@pytest.mark.parametrize("kind", ["topk", "codebook"])
def test_two_processes_give_the_result_of_one(tmp_path, kind):
    """torchrun, gloo. The rows are the same bits. topk: gradients are added in another order, which Adam's first steps,
    whatever a gradient's size, make larger. codebook: its losses are relative to the variance of a process' own rows, and
    dead codes move to rows of the first process: so its figures are compared, to 2 % of the variance."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json, os, sys, tiny_fit, tiny_training, torch
            torch.set_num_threads(1)
            from cu_fast.train import states
            from cu_fast.train.fit import fit_codes

            read, call = [], states.Reader.__call__
            states.Reader.__call__ = lambda self, some: read.append(sum(map(len, some))) or call(self, some)
            tokenizer = tiny_training.word_tokenizer()
            model = tiny_training.tiny_llama(tokenizer)
            options = tiny_fit.settings(kind={kind!r}, buffer_bytes=(2 * 32 + 4) * 500)
            figures = fit_codes(model, tokenizer, tiny_fit.sentences(160), sys.argv[1], **options)
            rank = os.environ.get("RANK", "0")
            with open(sys.argv[1] + "." + rank, "w") as file:
                json.dump(figures | {{"read": sum(read[1:])}}, file)
            """
        )
    )
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, how in (("one", []), ("two", two)):
        done = subprocess.run(
            [sys.executable, *how, str(script), str(tmp_path / name)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
    one = json.loads((tmp_path / "one.0").read_text())
    ranks = [json.loads((tmp_path / f"two.{rank}").read_text()) for rank in (0, 1)]
    assert one["read"] == one["tokens"] == sum(rank["read"] for rank in ranks)
    assert all(0.4 < rank["read"] / one["read"] < 0.6 for rank in ranks)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "one.0", "run.py", "two", "two.0", "two.1"]
    for rank in ranks:
        assert rank["steps"] == one["steps"]
        for name in ("explained_variance", "dead_share", "l0"):
            assert rank[name] == pytest.approx(one[name], abs=2e-2), name
            assert rank[name] == ranks[0][name]
    if kind == "topk":
        wanted, found = load_sae(tmp_path / "one"), load_sae(tmp_path / "two")
        for name in ("enc", "bias", "dec"):
            a, b = getattr(wanted, name), getattr(found, name)
            assert (a - b).norm() / a.norm() < 1e-2, name


def test_a_batch_that_does_not_divide_is_named(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(fit.TrainingArguments, "world_size", 3)
    with pytest.raises(ValueError, match="batch_size is 64; it should be a multiple of the 3 processes"):
        fitted(model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return tmp_path


def test_the_command_fits_both_kinds(plain, model):
    usual = ("train", plain / "plain", plain / "texts.txt", "--splice", "delta", "--codes", 64, "--k", 4,
             "--max-length", 16, "--batch-size", 64, "--epochs", 2, "--buffer", 1)  # fmt: skip
    result = run(*usual, "--output", plain / "sae", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout[result.stdout.rindex("{\n") :])
    assert figures["tokens"] > 1000 and load_sae(plain / "sae").site == LAYER
    result = run(*usual, "--output", plain / "book", "--kind", "codebook", "--code-dim", 24, "--dtype", "fp32")
    assert result.exit_code == 0 and "explained_variance" in result.stdout, result.output
    assert list(attach(model, plain / "book").bottlenecks) == [LAYER]

    for given, words in (
        ((*usual, "--output", plain / "sae"), "which is there already; give the name of a new folder"),
        ((*usual, "--output", plain / "new", "--recipe", "joint"), "--recipe is joint, and has no meaning with --splice delta"),
        ((*usual, "--output", plain / "new", "--resume"), "there is no stopped run"),
        ((*usual[:3], "--output", plain / "new", "--kind", "topk"), "--kind is topk, and has no meaning with --splice replace"),
        ((*usual[:3], "--output", plain / "new"), "there is no --layer; name the layer"),
    ):  # fmt: skip
        result = run(*given)
        assert result.exit_code == 1 and words in result.stderr and "Traceback" not in result.output, result.output
    assert not (plain / "new").exists()
