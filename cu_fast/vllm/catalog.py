"""What a server offers: the operator's settings, and masks by name. Read in every process; needs neither vLLM nor a splice."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from cu_fast.hf.checkpoint import CODEBOOK
from cu_fast.hf.files import Record, read_masks, read_record
from cu_fast.hf.places import near
from cu_fast.masks import Mask
from cu_fast.vllm import KEY, LOAD_FORMAT

Silent = Literal["refuse", "always", "none"]


class Refused(ValueError):
    """A request that is not served, and why."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ``--model-loader-extra-config`` says, as JSON.

    Attributes:
        attachment: folder that ``Attachment.save`` wrote; where it is not said, ``codebook`` in the model's folder.
        always: names of masks that hold in every request, whatever it says.
        silent: what a request gets that does not say what it unlearns. "refuse" = HTTP 400. "always" = the masks of
            always alone, of which there has to be one. "none" = nothing is deleted; always has to be empty.
        where_it_fires: name of a mask -> the level of :func:`cu_fast.level_for` (figure "mean") above which a prompt has to
            fire it to be unlearned; None = the learned gate that the mask carries. Other prompts are answered without it.
        weights: the load format of the model's own weights.
    """

    attachment: str
    always: tuple[str, ...] = ()
    silent: Silent = "refuse"
    where_it_fires: tuple[tuple[str, float | None], ...] = ()
    weights: str = "auto"

    @classmethod
    def of(cls, vllm_config: Any) -> Settings | None:
        """Those of a ``VllmConfig``; None = this server does not unlearn. Raises as :meth:`read`."""
        load = vllm_config.load_config
        if load.load_format != LOAD_FORMAT:
            return None
        return cls.read(load.model_loader_extra_config or {}, vllm_config.model_config.model)

    @classmethod
    def read(cls, values: Mapping[str, Any], model: str | Path) -> Settings:
        """Checked settings.

        Args:
            values: by name.
            model: folder of the model.

        Raises:
            ValueError: an unknown name, or a value that is not as above.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"model-loader-extra-config has {unknown[0]!r}; {near(unknown[0], known)}")
        attachment = values.get("attachment", str(Path(model) / CODEBOOK))
        always, silent, gates = (
            values.get("always", []),
            values.get("silent", "refuse"),
            values.get("where_it_fires", {}),
        )
        if not isinstance(attachment, str) or not attachment:
            raise ValueError(f"attachment is {attachment!r}; it should be a folder that attachment.save() wrote")
        if not isinstance(always, (list, tuple)) or not all(isinstance(name, str) for name in always):
            raise ValueError(f"always is {always!r}; it should be a list of names of masks")
        if silent not in get_args(Silent):
            raise ValueError(f"silent is {silent!r}; it should be one of {', '.join(get_args(Silent))}")
        if silent == "always" and not always:
            raise ValueError("silent is 'always', and always is empty; name a mask that always holds, or say 'none'")
        if silent == "none" and always:
            raise ValueError(f"silent is 'none', and always is {list(always)}; say silent 'always', or empty always")
        if not isinstance(gates, Mapping) or not all(level is None or _is_number(level) for level in gates.values()):
            raise ValueError(
                f"where_it_fires is {gates!r}; it should be names of masks, each with a number of codes per token, or null"
            )
        weights = values.get("weights", "auto")
        if not isinstance(weights, str) or weights == LOAD_FORMAT:
            raise ValueError(f"weights is {weights!r}; it should be a load format of vLLM, of the model's own weights")
        gates = tuple(sorted((name, None if level is None else float(level)) for name, level in gates.items()))
        return cls(attachment, tuple(sorted(set(always))), silent, gates, weights)


class Catalog:
    """Masks by name, and the digest of a set of them: by content, so that nothing goes by names alone.

    Args:
        settings: the operator's.

    Attributes:
        record: what the attachment's folder says of itself.
        masks: name -> its masks, one per layer.
        gates: name -> level, of the names that hold where they fire.

    Raises:
        FileNotFoundError, ValueError: the folder is missing, damaged or of another version; a setting names a mask that is not
            there, or one that cannot be judged as it says.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        path = Path(settings.attachment)
        self.record: Record = read_record(path)
        self.masks: dict[str, list[Mask]] = read_masks(path, self.record)
        self.gates = dict(settings.where_it_fires)
        for setting, names in (("always", settings.always), ("where_it_fires", self.gates)):
            if unknown := [name for name in names if name not in self.masks]:
                raise ValueError(
                    f"{setting} names {unknown[0]!r}, and {path} has no such mask; {near(unknown[0], self.masks)}"
                )
        for name, level in self.gates.items():
            if level is None and not all(mask.gate for mask in self.masks[name]):
                raise ValueError(f"where_it_fires has {name!r}: null, and that mask carries no gate; give its level")
            if level is not None and len(self.masks[name]) > 1:
                raise ValueError(
                    f"where_it_fires has {name!r}: {level:g}, and that name has masks for {len(self.masks[name])} layers, "
                    f"whose counts are not known when the first of them deletes; learn gates (cu_fast.fit_gate)"
                )

    def wanted(self, value: Any) -> tuple[str, ...]:
        """The names that hold for a request, sorted.

        Args:
            value: what the client wrote: a list of names, or one name; [] or "" = nothing; None = the client was silent.

        Raises:
            Refused: an unknown name, no name, or silence where it is refused.
        """
        if value is None:
            if self.settings.silent == "refuse":
                raise Refused(f"say what to unlearn: vllm_xargs {{{KEY!r}: [names]}}; [] is nothing, said explicitly")
            value = []
        if isinstance(value, str):
            value = [value] if value else []
        if not isinstance(value, (list, tuple)):
            raise Refused(f"{KEY} is {str(value)[:100]!r}; it should be a list of names of masks")
        for name in value:
            if not isinstance(name, str) or name not in self.masks:
                # Without near names: whose data was erased is for the operator to know, not for every client.
                raise Refused(f"this server has no mask {str(name)[:100]!r}")
        return tuple(sorted({*value, *self.settings.always}))

    @functools.lru_cache(4096)  # noqa: B019 - a process has one catalog, for good
    def digest(self, names: tuple[str, ...]) -> str:
        """sha256 of what is computed under these names: splices, masks, and the gates that they are behind."""
        record = self.record
        layers = [record.tensors_sha256, record.skip_first, sorted(record.hashes.items())]
        modes = sorted((layer, getattr(config, "mask_mode", None)) for layer, config in record.configs.items())
        held = sorted(mask.digest for name in names if name not in self.gates for mask in self.masks[name])
        gated = sorted(
            f"{mask.digest} {self.gates[name]}" for name in names if name in self.gates for mask in self.masks[name]
        )
        return hashlib.sha256(json.dumps([layers, modes, held, gated]).encode()).hexdigest()


@functools.lru_cache(8)
def catalog_of(settings: Settings) -> Catalog:
    """The catalog of some settings, read once in a process. Raises as :class:`Catalog`."""
    return Catalog(settings)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
