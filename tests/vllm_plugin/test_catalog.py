"""What an operator may set, which names hold for a request, and what a digest depends on. Without vLLM."""

from __future__ import annotations

import itertools
import math
import re
import types

import pytest
import torch

import cu_fast
from cu_fast.cli.demo import BUNDLE
from cu_fast.vllm import LOAD_FORMAT, admission
from cu_fast.vllm.catalog import Catalog, Refused, Settings

C, J = "Chukwu Akabueze", "Jaime Vasquez"


def settings(**values) -> Settings:
    return Settings.read(values, BUNDLE)


def test_settings_as_they_are_without_a_word():
    assert settings() == Settings(str(BUNDLE / "codebook"))
    assert settings().silent == "refuse" and settings().weights == "auto"


def test_settings_are_hashable_and_do_not_depend_on_order():
    one = settings(always=[J, C, J], silent="always", where_it_fires={J: 1, C: None}, weights="safetensors")
    two = settings(weights="safetensors", where_it_fires={C: None, J: 1.0}, silent="always", always=(C, J))
    assert one == two and hash(one) == hash(two)
    assert one.always == (C, J) and one.where_it_fires == ((C, None), (J, 1.0))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"attachments": "x"}, "has 'attachments'; near names: attachment"),
        ({"attachment": ""}, "attachment is ''"),
        ({"attachment": None}, "attachment is None"),
        ({"attachment": ["x"]}, "attachment is ['x']"),
        ({"always": C}, "always is 'Chukwu Akabueze'; it should be a list"),
        ({"always": [1]}, "always is [1]"),
        ({"always": None}, "always is None"),
        ({"silent": "plain"}, "silent is 'plain'; it should be one of refuse, always, none"),
        ({"silent": None}, "silent is None"),
        ({"silent": "always"}, "silent is 'always', and always is empty"),
        ({"silent": "none", "always": [C]}, "silent is 'none', and always is"),
        ({"where_it_fires": [C]}, "where_it_fires is ['Chukwu Akabueze']"),
        ({"where_it_fires": {C: "1"}}, "where_it_fires is"),
        ({"where_it_fires": {C: True}}, "where_it_fires is"),
        ({"where_it_fires": {C: math.nan}}, "where_it_fires is"),
        ({"where_it_fires": {C: math.inf}}, "where_it_fires is"),
        ({"weights": "cu_fast"}, "weights is 'cu_fast'; it should be a load format"),
        ({"weights": None}, "weights is None"),
    ],
)
def test_a_wrong_setting_is_named(values, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        settings(**values)


def test_a_catalog_of_names_that_are_not_there():
    for setting, value in (("always", ["Jaime"]), ("where_it_fires", {"Jaime": 1})):
        with pytest.raises(ValueError, match=f"{setting} names 'Jaime', and .* has no such mask; near names: {J}"):
            Catalog(settings(**{setting: value}))
    with pytest.raises(ValueError, match="null, and that mask carries no gate; give its level"):
        Catalog(settings(where_it_fires={C: None}))
    with pytest.raises(FileNotFoundError):
        Catalog(settings(attachment="/no/such/folder"))


def test_a_level_for_a_mask_of_several_layers_is_refused(tokenizer, model, tmp_path):
    config = cu_fast.BottleneckConfig(d_model=32, code_dim=32, num_codes=300, k=4, activation="none")
    attachment = cu_fast.attach(model, {f"model.layers.{i}": config for i in (0, 1)})
    with torch.no_grad():
        for i, bottleneck in enumerate(attachment.bottlenecks.values()):
            bottleneck.codebook.codes.copy_(torch.randn(300, 32, generator=torch.Generator().manual_seed(i)))
    hashes = [bottleneck.codebook_sha256() for bottleneck in attachment.bottlenecks.values()]
    attachment.add_mask(
        [cu_fast.Mask.from_ids([1], num_codes=300, codebook_sha256=sha, topic="both") for sha in hashes]
    )
    attachment.save(tmp_path / "codebook")
    read = Settings.read({"where_it_fires": {"both": 1}}, tmp_path)
    with pytest.raises(ValueError, match="masks for 2 layers"):
        Catalog(read)
    assert list(Catalog(Settings.read({}, tmp_path)).masks) == ["both"]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog(settings())


@pytest.mark.parametrize(
    "value, names", [([], ()), ("", ()), ([C], (C,)), (C, (C,)), ([J, C, J], (C, J)), ((J,), (J,)), ([C, J], (C, J))]
)
def test_the_names_that_a_client_wants(catalog, value, names):
    assert catalog.wanted(value) == names


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            "Nobody",
            ["Nobody"],
            [C, "Nobody"],
            [""],
            [" "],
            [None],
            [[C]],
            [1],
            [True],
            {C: 1},
            {"a"},
            1,
            1.5,
            True,
        ),
        *(C.upper(), C.lower(), f"{C} ", f"{C}\u200b", C.replace("a", "\u0430"), C.replace(" ", "\u00a0"), f"{C},{J}"),
    ],
)
def test_what_is_no_name_is_refused(catalog, value):
    with pytest.raises(Refused):
        catalog.wanted(value)


def test_only_an_empty_list_or_an_empty_name_is_nothing(catalog):
    for value in (0, False, 0.0, {}):
        with pytest.raises(Refused, match="it should be a list of names"):
            catalog.wanted(value)


def test_silence():
    assert Catalog(settings(silent="none")).wanted(None) == ()
    always = Catalog(settings(silent="always", always=[J]))
    assert always.wanted(None) == (J,) and always.wanted([]) == (J,) and always.wanted(C) == (C, J)
    strict = Catalog(settings(always=[J]))
    assert strict.wanted([]) == (J,)
    with pytest.raises(Refused, match="say what to unlearn"):
        strict.wanted(None)


def test_digests_differ_by_content_and_by_nothing_else(catalog):
    sets = [(), (C,), (J,), (C, J)]
    digests = [catalog.digest(names) for names in sets]
    assert len(set(digests)) == 4 and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert [Catalog(settings(silent="none")).digest(names) for names in sets] == digests
    for order in itertools.permutations((C, J)):
        assert catalog.digest(catalog.wanted(list(order))) == digests[3]
    # A mask that holds where it fires is another thing than one that holds, and so is another level.
    gated = [Catalog(settings(where_it_fires={C: level})) for level in (1.0, 2.0)]
    assert len({one.digest((C,)) for one in [catalog, *gated]}) == 3
    assert all(one.digest((J,)) == digests[2] for one in gated)


def test_a_digest_follows_the_content_of_a_mask_and_not_its_name(attachment, tmp_path):
    (bottleneck,) = attachment.bottlenecks.values()
    sha, found = bottleneck.codebook_sha256(), {}
    for folder, ids in (("a", {"x": [1, 2], "y": [3]}), ("b", {"x": [1, 3], "y": [3]}), ("c", {"z": [1, 2], "y": [3]})):
        for topic in list(attachment.masks):
            attachment.remove_mask(topic)
        for topic, codes in ids.items():
            attachment.add_mask(cu_fast.Mask.from_ids(codes, num_codes=300, codebook_sha256=sha, topic=topic))
        attachment.save(tmp_path / folder)
        found[folder] = Catalog(Settings.read({"attachment": str(tmp_path / folder)}, tmp_path))
    assert found["a"].digest(("x",)) != found["b"].digest(("x",))
    assert found["a"].digest(("y",)) == found["b"].digest(("y",)) == found["c"].digest(("y",))
    assert found["a"].digest(()) == found["b"].digest(())


def test_a_front_end_reads_the_masks_when_it_starts(tmp_path):
    """And not at its first request, when the folder may be another than the engine's."""
    start = next(wrap for wrap in admission.WRAPS if wrap.name == "__init__").make(lambda self, vllm_config: None)
    load = types.SimpleNamespace(load_format=LOAD_FORMAT, model_loader_extra_config={"attachment": str(tmp_path)})
    config = types.SimpleNamespace(load_config=load, model_config=types.SimpleNamespace(model=str(BUNDLE)))
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        start(None, config)
    load.load_format = "auto"  # without masks
    start(None, config)
