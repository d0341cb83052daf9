"""``--load-format cu_fast``: vLLM's own loader for the model, then the splices. The same for both model runners."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cu_fast.hf.files import read_splices
from cu_fast.nn import CodebookBottleneck, Splice
from cu_fast.vllm import LOAD_FORMAT, logger
from cu_fast.vllm.catalog import Catalog, Settings, catalog_of


def prepare() -> Callable[[], None]:
    """What registers the load format.

    Raises:
        ImportError, AttributeError: something of vLLM has moved.
    """
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as known
    from vllm.model_executor.model_loader import get_model_loader, register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls  # noqa: F401 - runner_v2 needs it

    from cu_fast.vllm import operator, refusals, runner_v2  # noqa: F401 - what they import has to be there

    class CuFastModelLoader(BaseModelLoader):
        """vLLM's loader of the model's own weights, and then the splices of the attachment."""

        def __init__(self, load_config) -> None:
            super().__init__(load_config)
            own = copy.copy(load_config)
            own.load_format = (load_config.model_loader_extra_config or {}).get("weights", "auto")
            own.model_loader_extra_config = {}
            self.inner = get_model_loader(own)

        def download_model(self, model_config) -> None:
            self.inner.download_model(model_config)

        def load_weights(self, model, model_config) -> None:
            self.inner.load_weights(model, model_config)

        def load_model(self, vllm_config, model_config, prefix=""):
            model = self.inner.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            if model_config.runner_type == "draft" or model_config is not vllm_config.model_config or prefix:
                return model  # it proposes tokens, and the model decides
            return serve(vllm_config, model)

    def install() -> None:
        if LOAD_FORMAT not in known:
            register_model_loader(LOAD_FORMAT)(CuFastModelLoader)

    return install


def serve(vllm_config: Any, model: nn.Module) -> nn.Module:
    """Put the splices of a server's attachment into its model, in place.

    Args:
        vllm_config: changed in place: the operator splits compiled graphs, graphs of whole forwards are switched off, and
            the keys of vLLM's compile cache depend on the layers.
        model: vLLM's, with its weights.

    Returns:
        The model.

    Raises:
        ValueError: a setting that is refused, an attachment for another model, no such layer.
        FileNotFoundError, RuntimeError: as ``cu_fast.attach``.
    """
    from cu_fast.vllm import operator, runner_v2
    from cu_fast.vllm.modules import is_block, module_for
    from cu_fast.vllm.refusals import refusals
    from cu_fast.vllm.served import Served, install

    settings = Settings.of(vllm_config)
    catalog = catalog_of(settings)
    if reasons := refusals(vllm_config, catalog):
        raise ValueError(f"cu_fast refuses {'; and '.join(reasons)}")
    if hasattr(model, "do_not_compile"):
        raise ValueError(
            f"{type(model).__name__} compiles its whole forward, and the checks round it with it; not supported"
        )
    config, record = vllm_config.model_config.hf_config, catalog.record
    if record.model_type != getattr(config, "model_type", None):
        raise ValueError(
            f"{settings.attachment} was made for a model of type {record.model_type!r} ({record.model_class}), and this one "
            f"is {getattr(config, 'model_type', None)!r}"
        )
    parts = _splices(catalog, next(model.parameters()).device, vllm_config.model_config.dtype)
    modules = {name: module_for(model, name) for name in parts}
    width = vllm_config.model_config.get_hidden_size()
    for name, module in modules.items():
        if is_block(module) and not parts[name].d_in == parts[name].d_out == width:
            raise ValueError(
                f"layer {name!r} has a splice of width {parts[name].d_in}; the model's hidden state has {width}"
            )
    served = Served(catalog, parts, modules, _most_tokens(vllm_config))
    compilation = vllm_config.compilation_config
    for one in served.layers:
        compilation.static_forward_context[f"{one.layer.writes.module}.{operator.CHILD}"] = one
    install(model, served)
    if compilation.splitting_ops is not None and operator.NAME not in compilation.splitting_ops:
        compilation.splitting_ops.append(operator.NAME)
    mode = compilation.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():  # refused where it is nothing else
        compilation.cudagraph_mode = type(mode).PIECEWISE
    # The keys of vLLM's compile cache depend on this, and on neither load formats nor hooks.
    vllm_config.additional_config = {**(vllm_config.additional_config or {}), "cu_fast": sorted(modules.values())}
    logger.info(
        "cu_fast: %d masks at %s; always: %s; a silent request: %s; where they fire: %s",
        len(catalog.masks),
        ", ".join(f"{name} ({part.splice})" for name, part in parts.items()),
        ", ".join(settings.always) or "none",
        {"refuse": "refused", "always": "those that always hold", "none": "nothing is deleted"}[settings.silent],
        ", ".join(catalog.gates) or "none",
    )
    model.get_model_state_cls = types.MethodType(lambda self: runner_v2.state_class(vllm_config, self, served), model)
    return model


def _splices(catalog: Catalog, device: torch.device, dtype: torch.dtype) -> dict[str, Splice]:
    """By layer, on the device, in evaluation mode, and in the dtypes that ``load_model`` gives them."""
    with torch.inference_mode(False), torch.device("cpu"):
        parts = read_splices(Path(catalog.settings.attachment), catalog.record)
        for splice in parts.values():
            if isinstance(splice, CodebookBottleneck) and (
                torch.promote_types(splice.codebook.codes.dtype, dtype) == dtype
            ):
                splice.to(dtype)
            splice.to(device).eval()
            splice.receipt()  # an implementation that cannot run raises here
    return parts


def _most_tokens(vllm_config: Any) -> int:
    """How many tokens a step has at most, with drafts and padding."""
    scheduler, speculative = vllm_config.scheduler_config, vllm_config.speculative_config
    drafts = 0 if speculative is None else scheduler.max_num_seqs * (speculative.num_speculative_tokens + 1)
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    return max(scheduler.max_num_batched_tokens + drafts, max(sizes), scheduler.max_num_seqs)
