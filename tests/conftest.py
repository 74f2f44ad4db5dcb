"""Shared fixtures: tiny random models, the demo model, offline data."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tiny import AS_MADE, TINY, Tiny

if TYPE_CHECKING:
    from fake_servers import Fake

# Set before importing libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def add_torchvision() -> None:
    """Let this process and its children find torchvision from `torchvision_cpu`."""
    folder = Path(sys.prefix) / "torchvision"
    if folder.is_dir() and find_spec("torchvision") is None:
        sys.path.append(str(folder))
        known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, known), str(folder)])


add_torchvision()


def hear_signals() -> None:
    """Let tests stop their processes although `nohup`, or a script's `&`, ignores signals."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, handler)


hear_signals()


def take_share_of_cores() -> None:
    """Keep to some of the cores if tests run side by side: engines on the same ones starve."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    number, count = int(worker[2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cores[number::count]) or {cores[number % len(cores)]})


take_share_of_cores()

pytest.register_assert_rewrite("commands", "engines", "running")

# Other work on the machine must not make a property's inputs "too slow".
_BUSY: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=50, **_BUSY)
settings.register_profile("thorough", max_examples=1000, **_BUSY)
THOROUGH = os.environ.get("SLEB_TEST_THOROUGH", "") not in ("", "0")
"""Return whether to test properties on many inputs, which takes minutes."""
settings.load_profile("thorough" if THOROUGH else "quick")

ROOT = Path(__file__).resolve().parent.parent
Models = Callable[[str], Path]
"""Type of the fixture `models`: returns the folder of a tiny model by name."""
SHARED_DATASETS = ROOT.parent / "shared" / "hf" / "datasets"


LONGEST = (
    *("test_architectures", "test_plugin", "test_server", "test_bench", "test_deployment"),
    *("test_select_size", "test_reading", "test_faults", "test_compile_cache"),
    *("test_board", "test_bench_serving", "test_repair_served", "test_evaluation", "test_export"),
    *("test_wrong_ways", "test_binding", "test_quantised", "test_cli", "test_kinds"),
    *("test_lm_eval", "test_gpu_kit", "test_rebind", "test_broken_checkpoints", "test_arguments"),
    *("test_study", "test_claims", "test_bench_turns", "test_heal", "test_heal_ends"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow files first, so that parallel workers end together."""
    places = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Folder of a tiny random model by its name in `tiny.TINY`."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            save_model(name, path)
        return path

    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo model's checkpoint, shared with `make demo` if the Makefile sets it."""
    from sleb_bench.demo_model import demo_model
    from sleb_serve.errors import SlebError

    folder = os.environ.get("SLEB_TEST_MODEL_FOLDER", str(ROOT / ".cache" / "demo"))
    try:
        return demo_model(Path(folder).resolve())
    except SlebError as error:
        pytest.skip(str(error))


@pytest.fixture
def serve() -> Iterator[Callable[..., Fake]]:
    """Starts servers that answer with what they are given, and stops them."""
    from fake_servers import Fake

    servers: list[Fake] = []

    def start(*arguments: Any) -> Fake:
        servers.append(Fake(*arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def save_model(name: str, path: Path, dtype: str = "float32", **changes: Any) -> None:
    """A tiny random model by its name in `tiny.TINY`, with changes to its config."""
    config, values = TINY[name]
    save_tiny(name, Tiny(config, {**values, **changes}, dtype=dtype), path)


def save_tiny(name: str, tiny: Tiny, path: Path) -> None:
    """A tiny random model; its name is the seed."""
    import torch
    import transformers

    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, tiny.config)(**tiny.values)
    model = getattr(transformers, tiny.auto).from_config(config).float().eval()
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if parameter.ndim > 1 and not own.endswith(AS_MADE):
                # With the usual 0.02, removing a block would have no visible effect.
                parameter.normal_(0, 0.5 / parameter.shape[-1] ** 0.5)
    model.to(getattr(torch, tiny.dtype)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    if tiny.architecture:
        file = path / "config.json"
        saved = {**json.loads(file.read_text()), "architectures": [tiny.architecture]}
        file.write_text(json.dumps(saved, indent=1))


def tokenizer() -> Any:
    """A byte-level tokenizer of 256 letters, so that any text has tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=(
            "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
            "{% endfor %}assistant:"
        ),
    )
