"""The pruned architectures' entries in vLLM's tables. Imported when vLLM loads the plugin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from sleb_vllm.architectures import ARCHITECTURES, pruned_name


@dataclass(frozen=True)
class PrunedModel:
    """Registry entry of a pruned architecture; the stock entry of the same model does the work.

    It stands where vLLM keeps its own lazy entries and answers the same two questions. To inspect
    is left to the stock entry, so what vLLM believes of the pruned model (and caches on disk) is
    what it believes of the stock one.
    """

    stock: Any

    def inspect_model_cls(self) -> Any:
        """What vLLM wants to know of the class without importing it here."""
        return self.stock.inspect_model_cls()

    def load_model_cls(self) -> Any:
        """The class that builds the model without its removed layers."""
        from sleb_vllm.model import pruned_class

        return pruned_class(self.stock.load_model_cls())


def register_pruned_architectures() -> None:
    """Add an entry for each architecture of `ARCHITECTURES` that this vLLM has. Idempotent."""
    for architecture in sorted(ARCHITECTURES & set(ModelRegistry.get_supported_archs())):
        name = pruned_name(architecture)
        ModelRegistry.models[name] = PrunedModel(ModelRegistry.models[architecture])
        MODELS_CONFIG_MAP[name] = _config_check(
            MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        )


def _config_check(stock: Any) -> Any:
    """Vllm's per-architecture configuration hook, with the manifest checked first.

    It runs in the first process, before any worker is started or any port is opened.
    """

    class PrunedConfig(stock):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            from sleb_vllm.binding import check_engine, prepare_loading

            prepare_loading(vllm_config, check_engine(vllm_config))
            stock.verify_and_update_config(vllm_config)

    return PrunedConfig
