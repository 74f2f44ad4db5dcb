"""``GET /sleb/manifest`` in vLLM's own application: who may read it, where it is, what it shows."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forking import run_fork
from sleb_serve.errors import SlebError
from sleb_serve.manifest.pruning import Pruning, RepairFile
from sleb_serve.manifest.shown import shown, shown_name
from sleb_serve.serving.address import key_of_environment
from sleb_serve.utils.bearer import authorized

pytest.importorskip("vllm")

FOLDER = "/home/someone/models/llama-8b"
PRUNING = Pruning(
    *("LlamaForCausalLM", 8, "a" * 64, "b" * 64, (2, 3)),
    repair=RepairFile("fold", "c" * 64, f"{FOLDER}/fold.safetensors"),
)
RANK = {"rank": 0, "digest": PRUNING.digest, "layers": [0, 1, 4, 5, 6, 7], "parameters": 9}
RANK |= {"weights_read_bytes": 7, "weights_skipped_bytes": 2}

KEYS: dict[str, tuple[list[str], str, set[str]]] = {
    "none": ([], "", {"", "one", "two", "env"}),
    "one": (["--api-key", "one"], "", {"one"}),
    "several": (["--api-key", "one", "two"], "", {"one", "two"}),
    "environment": ([], "env", {"env"}),
    "both": (["--api-key", "one"], "env", {"one"}),
}
"""By a name: options, VLLM_API_KEY, and which keys are let in ("" is a request without one)."""
ROOTS = ("", "/proxy", "/a/b")
HEADERS = {key: f"Bearer {key}" for key in ("one", "two", "env", "other", "on", "one two")}
HEADERS |= {"": "", "basic": "Basic one", "bare": "one", "blank": "Bearer ", "é": "Bearer é"}


class Engine:
    """As much of vLLM's engine client as the endpoint asks."""

    def __init__(self, config: Any) -> None:
        model_config = SimpleNamespace(hf_config=config)
        self.vllm_config = SimpleNamespace(model_config=model_config)
        self.errored = False

    def shutdown(self) -> None:
        pass

    async def collective_rpc(self, _: str) -> list[dict[str, Any]]:
        return [RANK]


def _ask(output: str) -> None:
    """In a fork: what vLLM's application answers, by keys, root path, header and path."""
    os.environ["VLLM_PLUGINS"] = "sleb"
    found = {}
    for name, (options, variable, _) in KEYS.items():
        os.environ["VLLM_API_KEY"] = variable
        for root in ROOTS:
            for served in (PRUNING, None):
                options = [*options, *(["--root-path", root] if root else [])]
                key = f"{name} {root} {'dense' if served is None else 'pruned'}"
                found[key] = asyncio.run(_answers(options, root, served))
    Path(output).write_text(json.dumps(found))
    os._exit(0)


async def _answers(options: list[str], root: str, served: Pruning | None) -> list[Any]:
    import httpx
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.plugins.endpoint_plugins.interface import init_endpoint_plugins_state
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", FOLDER, *options])
    app = build_app(args, ("generate",), None)
    engine: Any = Engine({} if served is None else {"sleb": served.to_dict()})
    await init_endpoint_plugins_state(engine, app.state, args)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    found = []
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        for header, value in HEADERS.items():
            headers = {b"Authorization": value.encode()} if value else {}
            for prefix in sorted({"", root}):
                both = [
                    await client.get(f"{prefix}{path}", headers=headers)
                    for path in ("/sleb/manifest", "/v1/models")
                ]
                found.append([header, prefix, [a.status_code for a in both], both[0].text])
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Any]]:
    folder = tmp_path_factory.mktemp("endpoint")
    code = run_fork(_ask, folder / "log", str(folder / "answers.json"))
    assert code == 0, (folder / "log").read_text()[-4000:]
    found: Mapping[str, list[Any]] = json.loads((folder / "answers.json").read_text())
    return found


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("keys", KEYS)
def test_whoever_vllm_lets_read_its_models_may_read_the_manifest(
    answers: Mapping[str, list[Any]], keys: str, root: str
) -> None:
    let_in = KEYS[keys][2]
    for kind, status in (("pruned", 200), ("dense", 404)):
        asked = answers[f"{keys} {root} {kind}"]
        assert len(asked) == len(HEADERS) * len({"", root})
        for header, _, (ours, stock), text in asked:
            admitted = keys == "none" or header in let_in
            # This application has no models, so what is let in ends in another error.
            assert (stock != 401) == admitted
            assert ours == (status if admitted else 401), (header, text)
            if not admitted:
                assert json.loads(text) == {"error": "Unauthorized"}


def test_no_path_is_in_the_answer(answers: Mapping[str, list[Any]]) -> None:
    text = answers["none  pruned"][0][3]
    told = json.loads(text)
    assert told["served_model_name"] == ["llama-8b"]
    assert told["pruning"]["repair"] == {"kind": "fold", "sha256": "c" * 64}
    assert told["digest"] == PRUNING.digest
    assert not [word for word in strings(told) if "/" in word or "\\" in word]


def strings(value: Any) -> list[str]:
    """All texts in a JSON value, keys among them."""
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def test_a_served_name_shows_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    names = {"org/model": "org/model", "a/b": "b", "/x/y": "y", "./a": "a", "a-sleb3": "a-sleb3"}
    assert {name: shown_name(name) for name in names} == names
    assert shown_name(".") == tmp_path.name


def test_the_answer_is_the_manifest_content_and_what_ranks_told() -> None:
    told = json.loads(shown(PRUNING, ["a", "b"], [RANK]))
    assert set(told) == {"tag", "digest", "served_model_name", "pruning", "ranks"}
    assert told["ranks"] == [RANK]
    plain = Pruning("X", 8, "a" * 64, "b" * 64, (1,))
    assert json.loads(shown(plain, [], []))["pruning"] == plain.to_dict()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, False),
        ("", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("Bearer a", True),
        ("bearer b", True),
        ("BEARER a", True),
        ("Basic a", False),
        ("Bearer  a", False),
        ("Bearer a ", False),
        ("Bearer ab", False),
        ("a", False),
    ],
)
def test_a_key_is_one_of_the_keys_and_nothing_else(header: str | None, expected: bool) -> None:
    assert authorized(header, ("a", "b")) == expected
    assert authorized(header, ())


def test_a_key_that_cannot_be_sent_is_refused_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, found in (("", None), ("a key", "a key")):
        monkeypatch.setenv("VLLM_API_KEY", key)
        assert key_of_environment() == found
    for key in ("secret\r\nX: y", "secrét"):
        monkeypatch.setenv("VLLM_API_KEY", key)
        with pytest.raises(SlebError) as refused:
            key_of_environment()
        assert "secr" not in str(refused.value)
