"""Which sequence of a batch has which mask: by what the model was given and how generate() expands it, not by sizes."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tiny_models import VOCABULARY, D, add_masks, attach_to, build, inputs, logits, under

SHRINKING = [[None, None, "a", "a"], ["a", "a", None, None], ["a"] * 4]


@pytest.fixture
def whisper():
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        vocab_size=100, d_model=D, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=50,
        max_target_positions=32, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config).eval()
    settings = model.generation_config
    settings.no_timestamps_token_id, settings.is_multilingual, settings.max_initial_timestamp_index = 60, False, 5
    return model


@pytest.mark.parametrize("layer", ["model.decoder.layers.1", "model.encoder.layers.0"])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_batch_that_shrinks_inside_generate(whisper, layer, beams):
    """Whisper's long form goes on with the audios that have not ended: 2 of 4, with 2 beams, look like the 4 entries."""
    sounds, present = torch.randn(4, 8, 250), torch.ones(4, 250, dtype=torch.long)
    present[:2, 100:] = 0  # two short ones
    attachment = attach_to(whisper, layer)
    add_masks(attachment, {"input_features": sounds[:, :, :100], "decoder_input_ids": torch.randint(3, 50, (4, 3))})
    options = {
        "attention_mask": present, "return_timestamps": True, "num_beams": beams, "max_new_tokens": 6, "max_length": None
    }  # fmt: skip
    for topics in SHRINKING:
        with attachment.unlearn(topics), pytest.raises(ValueError, match="the batch should be"):
            whisper.generate(sounds, **options)
    with attachment.unlearn("a"):  # one entry for all needs no order
        whisper.generate(sounds, **options)


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_sequences_that_are_dropped_when_they_are_finished(beams):
    """By a decoding loop of the user's: what is left of the batch is as large as another expansion would be."""
    model, given = build("llama"), inputs("llama", batch=4)
    attachment = attach_to(model, "model.layers.1")
    add_masks(attachment, given)

    def loop(model, input_ids, **options):
        for rows in (len(input_ids), len(input_ids) // 2):
            logits(model, {"input_ids": input_ids[:rows]})
        return input_ids

    with attachment.unlearn(["a", "b", None, None]), pytest.raises(ValueError, match="the batch should be"):
        model.generate(**given, num_beams=beams, max_new_tokens=2, custom_generate=loop)


@pytest.fixture
def xlnet():
    torch.manual_seed(0)
    config = hf.XLNetConfig(vocab_size=VOCABULARY, d_model=D, n_layer=3, n_head=4, d_inner=48)
    return hf.XLNetLMHeadModel(config).eval()


def test_a_layer_that_returns_tokens_first(xlnet):
    """[tokens, batch, width]: six sequences of six tokens look like a batch either way."""
    given = {"input_ids": torch.randint(3, VOCABULARY, (6, 6))}
    attachment = attach_to(xlnet, "transformer.layer.1")
    add_masks(attachment, given)
    mixed = ["a", None, None, None, None, None]
    with attachment.unlearn(mixed), pytest.raises(RuntimeError, match="which of the two is the batch is not known"):
        logits(xlnet, given)
    for batch, tokens in ((6, 4), (4, 6)):
        other = {"input_ids": given["input_ids"][:batch, :tokens]}
        with attachment.unlearn(mixed[:batch]), pytest.raises(RuntimeError, match="masks by sequence need"):
            logits(xlnet, other)
    with attachment.unlearn(mixed), pytest.raises(RuntimeError, match="which of the two is the batch is not known"):
        logits(xlnet, given)
    masked, base = under(attachment, "a", given), under(attachment, None, given)
    assert not torch.allclose(masked, base, atol=1e-3)


def test_as_many_sequences_as_tokens():
    """Known from any other batch that this layer has seen; until then it could be either."""
    model, given = build("llama"), inputs("llama", batch=4, tokens=4)
    attachment = attach_to(model, "model.layers.1")
    add_masks(attachment, given)
    topics = ["a", None, "b", None]
    with attachment.unlearn(topics), pytest.raises(RuntimeError, match="run any batch whose number of tokens"):
        logits(model, given)
    single = [under(attachment, topic, {k: v[i : i + 1] for k, v in given.items()}) for i, topic in enumerate(topics)]
    mixed = under(attachment, topics, given)  # batches of one were run
    torch.testing.assert_close(mixed, torch.cat(single), atol=2e-4, rtol=1e-4)


def test_a_layer_that_runs_outside_its_model():
    model, given = build("llama"), inputs("llama")
    attachment = attach_to(model, "model.layers.1")
    add_masks(attachment, given)
    x, position = torch.randn(2, 6, D), torch.arange(6)[None]
    around = {"position_embeddings": model.model.rotary_emb(x, position), "position_ids": position}
    with torch.no_grad():
        with attachment.unlearn(["a", None]), pytest.raises(RuntimeError, match="the number of sequences is not known"):
            model.model.layers[1](x, **around)
        with attachment.unlearn("a"), pytest.raises(RuntimeError, match="ran outside its model"):
            model.model.layers[1](x, **around)
        with attachment.unlearn(None):
            model.model.layers[1](x, **around)


def test_images_are_not_sequences():
    """A sequence may have several images, or none: as many images as sequences say nothing."""
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=D, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4
        ),
        text_config=hf.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        ),
        image_token_index=VOCABULARY - 1, image_seq_length=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config).eval()
    tower = "model.vision_tower.encoder.layers.0"
    if tower not in dict(model.named_modules()):
        tower = "model.vision_tower.vision_model.encoder.layers.0"
    ids = torch.full((2, 10), VOCABULARY - 1)
    ids[0, 8:], ids[1] = 5, 7  # both images are the first sequence's
    given = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}
    attachment = attach_to(model, tower)
    add_masks(attachment, given)
    with attachment.unlearn(["a", None]), pytest.raises(RuntimeError, match="the number of sequences is not known"):
        logits(model, given)
    assert not torch.allclose(under(attachment, "a", given), under(attachment, None, given), atol=1e-4)
