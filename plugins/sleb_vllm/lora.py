"""LoRA adapters of the dense model: renumbers their layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.model_executor.models.utils import WeightsMapper

from sleb_serve.cut.config import Cut


@dataclass
class Renumbered(WeightsMapper):
    """A model's own name mapper, and one for renames that also renumbers layers.

    vLLM uses the mapper of renames for adapters, which have the dense model's layers. Weights use
    the model's own mapper, because the loader has already renamed them.
    """

    path: str = ""
    cut: Cut | None = None
    renumbers: bool = False

    @classmethod
    def over(cls, stock: WeightsMapper | None, path: str, cut: Cut) -> Renumbered:
        """Wrap a model's mapper for the decoder layers under the module `path`."""
        own = {} if stock is None else vars(stock)
        return cls(**own, path=path, cut=cut)

    def get_rename_mapper(self) -> Any:
        """Return the mapper described in the class."""
        base = getattr(super(), "get_rename_mapper", None) or super().get_unstacked_mapper
        mapper = base()
        mapper.renumbers = True
        return mapper

    get_unstacked_mapper = get_rename_mapper  # its name up to vLLM 0.28

    def _map_name(self, key: str) -> str | None:
        name: str | None = super()._map_name(key)
        if name is None or not self.renumbers or self.cut is None:
            return name
        prefix = f"{self.path}."
        # A name of no module, which vLLM skips; it would refuse None.
        return self.cut.name(name, prefix) or f"removed.{name.removeprefix(prefix)}"
