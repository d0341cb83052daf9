"""Models of every supported family, tiny, built from a config with random weights: nothing is downloaded."""

from __future__ import annotations

import copy
import threading
from typing import NamedTuple

import torch
import transformers as hf

from cu_fast import BottleneckConfig, attach
from cu_fast.masks import Mask

VOCABULARY, D, C, K = 64, 32, 150, 4
_LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": D, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


class Family(NamedTuple):
    """model class, its config, the layer that is swapped, and the one that runs after it."""

    model: type
    config: hf.PreTrainedConfig
    layer: str
    next: str


FAMILIES = {
    "gpt2": Family(
        hf.GPT2LMHeadModel,
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=D, n_layer=3, n_head=4, n_positions=64, pad_token_id=0,
                      bos_token_id=1, eos_token_id=2),
        "transformer.h.1", "transformer.h.2",
    ),
    "gpt_neox": Family(
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig(**{k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}),
        "gpt_neox.layers.1", "gpt_neox.layers.2",
    ),
    "llama": Family(hf.LlamaForCausalLM, hf.LlamaConfig(**_LLAMA), "model.layers.1", "model.layers.2"),
    "mistral": Family(
        hf.MistralForCausalLM, hf.MistralConfig(**_LLAMA, sliding_window=4), "model.layers.1", "model.layers.2"
    ),
    "qwen3": Family(hf.Qwen3ForCausalLM, hf.Qwen3Config(**_LLAMA), "model.layers.1", "model.layers.2"),
    "gemma3": Family(
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig(**_LLAMA, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"]),
        "model.layers.1", "model.layers.2",
    ),
    "phi3": Family(hf.Phi3ForCausalLM, hf.Phi3Config(**_LLAMA), "model.layers.1", "model.layers.2"),
    "opt": Family(
        hf.OPTForCausalLM,
        hf.OPTConfig(vocab_size=VOCABULARY, hidden_size=D, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
                     word_embed_proj_dim=D, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        "model.decoder.layers.1", "model.decoder.layers.2",
    ),
    "mamba": Family(
        hf.MambaForCausalLM,
        hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=3, state_size=8, pad_token_id=0,
                       bos_token_id=1, eos_token_id=2),
        "backbone.layers.1", "backbone.layers.2",
    ),
    "t5_encoder": Family(
        hf.T5ForConditionalGeneration, hf.T5Config(**_T5), "encoder.block.1", "encoder.block.2"
    ),
    "t5_decoder": Family(
        hf.T5ForConditionalGeneration, hf.T5Config(**_T5), "decoder.block.1", "decoder.block.2"
    ),
}  # fmt: skip


def build(name: str, **changes) -> torch.nn.Module:
    """The family's model in evaluation mode, always with the same weights; changes are to its config."""
    family = FAMILIES[name]
    config = copy.deepcopy(family.config)
    config.update(changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.model(config).eval()
        with torch.no_grad():  # weights large enough for what is said to depend on what is deleted
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(2 if name == "mamba" else 4)
    model.generation_config.eos_token_id = None  # runs on to max_new_tokens
    return model


def gemma2() -> torch.nn.Module:
    """Layers with norms behind attention and MLP."""
    torch.manual_seed(0)
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**_LLAMA)).eval()


def llava(vision_layers: int = 5) -> torch.nn.Module:
    """A model of images and text, whose two parts call their layers alike."""
    vision = hf.CLIPVisionConfig(
        hidden_size=D, intermediate_size=48, num_hidden_layers=vision_layers, num_attention_heads=4, image_size=8,
        patch_size=4,
    )  # fmt: skip
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_LLAMA), vision_config=vision, image_token_index=VOCABULARY - 1, image_seq_length=4
    )
    return hf.LlavaForConditionalGeneration(config).eval()


def qwen2_vl() -> torch.nn.Module:
    """A model of images and text whose two parts call their layers differently, with more of them for images."""
    text = {key: value for key, value in _LLAMA.items() if key != "head_dim"}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 5, "embed_dim": D, "hidden_size": D, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    torch.manual_seed(0)
    config = hf.Qwen2VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision)
    return hf.Qwen2VLForConditionalGeneration(config).eval()


def bottleneck_config(**changes) -> BottleneckConfig:
    return BottleneckConfig(**{"d_model": D, "code_dim": 24, "num_codes": C, "k": K, "activation": "none", **changes})


def attach_to(model: torch.nn.Module, *layers: str, attach_options: dict | None = None, **changes):
    """Fresh bottlenecks on the layers, always with the same weights; no two layers have the same codes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return attach(model, {layer: bottleneck_config(**changes) for layer in layers}, **(attach_options or {}))


def inputs(name: str, batch: int = 2, tokens: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.startswith("t5"):
        given["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, 3), generator=generator)
    return given


def add_masks(attachment, given: dict[str, torch.Tensor], names: str = "ab") -> None:
    """One mask a letter and layer: each deletes another share of the codes that the input uses there."""
    used: dict[str, torch.Tensor] = {}
    names_of = {id(bottleneck): layer for layer, bottleneck in attachment.bottlenecks.items()}

    def look(x, bottleneck):
        used[names_of[id(bottleneck)]] = bottleneck.select(x).ids.flatten().unique()

    with torch.no_grad(), attachment.unlearn(None), attachment.observe(look):
        attachment.model(**given)
    for i, name in enumerate(names):
        masks = [
            Mask.from_ids(ids[i :: len(names)], num_codes=C, topic=name, layer=layer,
                          codebook_sha256=attachment.bottlenecks[layer].codebook_sha256())
            for layer, ids in used.items()
        ]  # fmt: skip
        attachment.add_mask(masks)


def logits(model: torch.nn.Module, given: dict[str, torch.Tensor], **options) -> torch.Tensor:
    with torch.no_grad():
        return model(**given, **options).logits


def under(attachment, topics, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits inside ``unlearn(topics)``."""
    with attachment.unlearn(topics):
        return logits(attachment.model, given)


def mask_for(bottleneck, ids, topic: str, layer: str | None = None) -> Mask:
    return Mask.from_ids(ids, num_codes=C, codebook_sha256=bottleneck.codebook_sha256(), topic=topic, layer=layer)


def in_thread(fn) -> dict:
    """{"value": what fn returned in a new thread} or {"error": what it raised}."""
    result = {}

    def run():
        try:
            result["value"] = fn()
        except Exception as error:
            result["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result
