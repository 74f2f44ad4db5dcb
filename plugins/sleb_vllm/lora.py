"""LoRA adapters that were trained on the dense model: the same layers under their new numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.model_executor.models.utils import WeightsMapper

from sleb_serve.cut.config import Cut


@dataclass
class Renumbered(WeightsMapper):
    """A model's own mapper of names, and one that also renumbers for those who ask for renames.

    vLLM takes the mapper of renames for adapters, whose layers are the dense model's. The one for
    weights stays the model's own: the loader has renamed these already.
    """

    path: str = ""
    cut: Cut | None = None
    renumbers: bool = False

    @classmethod
    def over(cls, stock: WeightsMapper | None, path: str, cut: Cut) -> Renumbered:
        """Over a model's own mapper, for the decoder layers under the module `path`."""
        own = {} if stock is None else vars(stock)
        return cls(**own, path=path, cut=cut)

    def get_rename_mapper(self) -> Any:
        """See the class."""
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
        # A name of no module, which vLLM passes over; None it would refuse.
        return self.cut.name(name, prefix) or f"removed.{name.removeprefix(prefix)}"
