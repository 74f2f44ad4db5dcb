"""Which vLLM versions and features are refused, and what lets an untested version be tried."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sleb_vllm.features import check_features

from sleb_serve.errors import SlebError
from sleb_serve.serve import check_plugin
from sleb_vllm import compat
from sleb_vllm.compat import check_version, vllm_version


@pytest.fixture(autouse=True)
def no_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compat.ALLOW, raising=False)


@pytest.mark.parametrize("version", ["0.27.0", "0.30.1", "0.32.0", "0.32.0+cpu", "0.32.1rc1"])
def test_tested_versions_are_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.26.0", "0.33.0", "1.0.0", "0.3.0", "dev", None])
def test_other_versions_need_permission(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SlebError, match=r"untested with pruned models.*SLEB_ALLOW_UNTESTED_VLLM=1"):
        check_version(version)
    monkeypatch.setenv(compat.ALLOW, "1")
    check_version(version)


def test_the_command_line_refuses_an_untested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    check_plugin()
    monkeypatch.setattr("sleb_serve.serve.vllm_version", lambda: "0.33.0")
    with pytest.raises(SlebError, match=r"vLLM 0\.33\.0 is untested"):
        check_plugin()


def test_the_version_is_the_installed_packages() -> None:
    vllm = pytest.importorskip("vllm")
    assert vllm_version() == vllm.__version__


def config(**changes: Any) -> Any:
    values = {
        "load_config": SimpleNamespace(load_format="auto"),
        "parallel_config": SimpleNamespace(enable_eplb=False),
        "kv_transfer_config": None,
        "speculative_config": None,
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_config": SimpleNamespace(load_format="sharded_state")}, "--load-format"),
        ({"parallel_config": SimpleNamespace(enable_eplb=True)}, "--enable-eplb counts"),
        ({"kv_transfer_config": SimpleNamespace()}, "--kv-transfer-config"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "speculative method eagle3"),
        ({"speculative_config": SimpleNamespace(method="mtp")}, "speculative method mtp"),
    ],
)
def test_features_that_would_not_be_right_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    """Also those that vLLM itself refuses on a CPU before the plugin is asked."""
    check_features(config())
    check_features(config(speculative_config=SimpleNamespace(method="ngram")))
    with pytest.raises(SlebError, match=message):
        check_features(config(**changes))
