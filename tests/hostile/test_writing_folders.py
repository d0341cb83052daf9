"""Folders are written whole or not at all: killed, interrupted, disk full, several writers, other people's files."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
import threading

import pytest
import torch
from tiny_models import add_masks, attach_to, build, inputs

import cu_fast
from cu_fast.hf.checkpoint import load_model, save_model
from cu_fast.masks import Mask

SHA = "a" * 64


def mask(ids, topic="topic"):
    return Mask.from_ids(ids, num_codes=70, codebook_sha256=SHA, topic=topic)


def ids_at(path) -> list[int]:
    return Mask.load(path).ids().tolist()


@pytest.fixture
def attachment2():
    made = attach_to(build("llama"), "model.layers.0", "model.layers.1")
    add_masks(made, inputs("llama"), "ab")
    return made


@pytest.fixture(params=["exchanged", "renamed"])
def way(request, monkeypatch):
    """Both ways of putting a folder in place of another."""
    if request.param == "renamed":
        monkeypatch.setattr("cu_fast.files._exchange", lambda a, b: False, raising=False)
    return request.param


# -- an error, or a kill, at any step ----------------------------------------------------------------------------

# What Python announces before it asks the system for anything that a save does.
EVENTS = ("open", "os.", "shutil.", "tempfile.", "fcntl.", "ctypes.dlsym")
watching: list = []


@pytest.fixture(scope="module")
def announced():
    """The list of functions that are called at each event; a hook cannot be taken out again."""

    def hook(event, _):
        if watching and event.startswith(EVENTS):
            watching[0]()

    sys.addaudithook(hook)
    return watching


def at_step(step: int, act):
    """A function that acts when it is called for the ``step``th time."""
    count = iter(range(10_000))

    def called():
        if next(count) == step:
            watching.clear()
            act()

    return called


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise OSError(errno.EIO, "Input/output error")


def save_until(announced, step, act, made, path) -> bool:
    """Save, and act at a step. Whether the save went through because there were not so many steps."""
    announced.append(at_step(step, act))
    try:
        made.save(path)
        return bool(announced)
    finally:
        announced.clear()


@pytest.mark.parametrize("act", [interrupt, fail])
def test_an_error_at_any_step_leaves_the_old_folder_or_the_new_one_whole(tmp_path, announced, way, act):
    left = set()
    for step in range(500):
        mask([3]).save(tmp_path / "m")
        try:
            if save_until(announced, step, act, mask([4]), tmp_path / "m"):
                break
        except (KeyboardInterrupt, OSError):
            pass
        left.add(*ids_at(tmp_path / "m"))
    mask([5]).save(tmp_path / "m")
    assert 15 < step < 499 and left == {3, 4} and os.listdir(tmp_path) == ["m"], (step, left)


@pytest.mark.parametrize("act", [interrupt, fail])
def test_an_error_at_any_step_of_a_first_save_leaves_all_or_nothing(tmp_path, announced, way, act):
    for step in range(500):
        try:
            if save_until(announced, step, act, mask([4]), tmp_path / "m"):
                break
        except (KeyboardInterrupt, OSError):
            pass
        if (tmp_path / "m").exists():
            assert ids_at(tmp_path / "m") == [4], step
            shutil.rmtree(tmp_path / "m")
    assert 5 < step < 499


@pytest.mark.parametrize("number", range(8))
def test_a_sync_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch, way, number):
    mask([3]).save(tmp_path / "m")
    original, count = os.fsync, iter(range(99))
    monkeypatch.setattr(os, "fsync", lambda file: fail() if next(count) == number else original(file))
    if number < 4:  # two files, their folder, and the folder that it is in
        with pytest.raises(OSError, match="Input/output"):
            mask([4]).save(tmp_path / "m")
        assert ids_at(tmp_path / "m") == [3]
    else:
        mask([4]).save(tmp_path / "m")
        assert next(count) == 4
    assert os.listdir(tmp_path) == ["m"]


def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one_whole(tmp_path, announced):
    left, litter, new = set(), 0, mask([4])
    for step in range(500):
        mask([3]).save(tmp_path / "m")
        assert os.listdir(tmp_path) == ["m"], "the litter of the killed save stays"
        child = os.fork()
        if child == 0:
            try:
                save_until(announced, step, lambda: os.kill(os.getpid(), 9), new, tmp_path / "m")
            finally:
                os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        left.add(*ids_at(tmp_path / "m"))
        litter += len(os.listdir(tmp_path)) > 1
        if not killed:
            break
    assert 15 < step < 499 and left == {3, 4} and litter > 5, (step, left, litter)


def test_a_full_disk_leaves_the_old_folder_and_no_litter(attachment2, tmp_path):
    attachment2.save(tmp_path / "saved")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    attachment2.remove_mask("a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # the tensors' file ends in the middle
    try:
        with pytest.raises(OSError, match="File too large"):
            attachment2.save(tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


# -- several writers ---------------------------------------------------------------------------------------------


def test_writers_and_readers_of_one_folder_see_it_whole(tmp_path):
    """In threads; each writer takes the others' folders for litter only once they are dead."""
    mask([0]).save(tmp_path / "m")
    errors, read = [], set()

    def write(number):
        try:
            for _ in range(30):
                mask([number]).save(tmp_path / "m")
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(1, 5)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        try:
            read.add(*ids_at(tmp_path / "m"))
        except (FileNotFoundError, ValueError):
            pass  # two files are read one after the other, and may be of two folders: that is noticed
    assert not errors and read <= set(range(5)) and len(read) > 1
    assert os.listdir(tmp_path) == ["m"] and ids_at(tmp_path / "m")[0] > 0


def test_a_live_writers_folder_is_no_litter(tmp_path):
    from cu_fast.files import replacing

    with replacing(tmp_path / "m") as new:
        (new / "mine").write_text("x")
        mask([3]).save(tmp_path / "m")
        assert (new / "mine").read_text() == "x"
    assert os.listdir(tmp_path / "m") == ["mine"] and os.listdir(tmp_path) == ["m"]


# -- what else lies there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["my_notes.txt", ".git/config", "masks/a/notes.txt", "masks/a/0/notes.txt", "masks/read me", ".hidden"]
)
def test_foreign_files_in_an_attachment_are_not_deleted(attachment2, tmp_path, name):
    attachment2.save(tmp_path / "saved")
    file = tmp_path / "saved" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=f"holds other files, which are not replaced: {name}"):
        attachment2.save(tmp_path / "saved")
    assert file.read_text() == "mine" and os.listdir(tmp_path) == ["saved"]


def test_a_link_to_a_foreign_folder_in_an_attachment_is_not_deleted(attachment2, tmp_path):
    attachment2.save(tmp_path / "saved")
    (tmp_path / "saved" / "more").symlink_to(tmp_path)
    with pytest.raises(FileExistsError, match="not replaced: more"):
        attachment2.save(tmp_path / "saved")


def test_foreign_files_in_a_masks_folder_are_not_deleted(tmp_path):
    mask([3]).save(tmp_path / "m")
    (tmp_path / "m" / "why.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not replaced: why\.txt"):
        mask([4]).save(tmp_path / "m")
    assert ids_at(tmp_path / "m") == [3]


def test_a_link_stays_and_its_folder_is_written(tmp_path):
    mask([3]).save(tmp_path / "elsewhere" / "m")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "m")
    mask([4]).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and ids_at(tmp_path / "elsewhere" / "m") == [4]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_reads_whatever_the_umask(attachment2, tmp_path, umask):
    before = os.umask(umask)
    try:
        attachment2.save(tmp_path / "saved")
        attachment2.masks["a"][0].save(tmp_path / "mask")
    finally:
        os.umask(before)
    for top in (tmp_path / "saved", tmp_path / "mask"):
        for entry in (top, *top.rglob("*")):
            assert entry.stat().st_mode & 0o777 == (0o700 if entry.is_dir() else 0o600), entry


# -- model folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["save_pretrained", "codebook"])
def test_a_model_folder_half_written_is_the_old_one(folder, attachment, tokenizer, monkeypatch, where):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with torch.no_grad():
        attachment.model.lm_head.weight.mul_(2)
    with monkeypatch.context() as patched:
        if where == "codebook":
            patched.setattr(cu_fast.hf.files, "write", lambda *args: interrupt())
        else:
            patched.setattr(tokenizer, "save_pretrained", lambda *args: interrupt())
        with pytest.raises(KeyboardInterrupt):
            save_model(attachment, tokenizer, folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert os.listdir(folder.parent) == ["model"]
    save_model(attachment, tokenizer, folder)
    model, _, read = load_model(folder)
    assert torch.equal(model.lm_head.weight, attachment.model.lm_head.weight) and read.masks


def test_what_else_lies_in_a_model_folder_stays(folder, attachment, tokenizer):
    (folder / "checkpoint-1" / "deep").mkdir(parents=True)
    for name in ("notes.txt", "checkpoint-1/deep/state.bin", "model.txt"):
        (folder / name).write_text(name)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (folder / name).write_text("an earlier model's")
    save_model(attachment, tokenizer, folder)
    assert all(
        (folder / name).read_text() == name for name in ("notes.txt", "checkpoint-1/deep/state.bin", "model.txt")
    )
    assert not list(folder.glob("model*-of-*")) and not (folder / "model.safetensors.index.json").exists()
    (folder / "codebook" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not replaced: notes\.txt"):
        save_model(attachment, tokenizer, folder)
    assert (folder / "codebook" / "notes.txt").read_text() == "mine"
