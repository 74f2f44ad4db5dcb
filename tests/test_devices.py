"""Device-dependent choices with a simulated GPU, where a CPU can follow."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sleb_bench.engine
import sleb_bench.machine
from conftest import Models
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.healing.twin import Twin
from sleb_serve.models import loading
from sleb_serve.models.layerwise import CausalLM
from sleb_serve.roofline import device
from sleb_serve.selection import layer_sweep, memory, scorer
from sleb_serve.selection.layer_sweep import LayerSweep
from sleb_serve.selection.memory import chunk_for
from sleb_serve.utils.distributed import Ranks, launched

GIB = 1 << 30


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with one GPU, by what torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    return monkeypatch


@pytest.fixture
def loaded(models: Models, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a model as if, and returns where Transformers was told to put it."""
    checkpoint = open_checkpoint(str(models("llama")))
    real = loading.model_class(checkpoint)
    given: dict[str, Any] = {}

    class Watched:
        def __call__(self, config: Any) -> Any:
            return real(config)

        def from_pretrained(self, path: str, **options: Any) -> Any:
            given.update(options)
            return real.from_pretrained(path, dtype=options["dtype"])

    monkeypatch.setattr(loading, "model_class", lambda checkpoint: Watched())

    def load(**options: Any) -> Any:
        loading.load_model(checkpoint, "float32", **options)
        return given["device_map"]

    return load


# Where a model goes


def test_a_model_is_spread_over_accelerators_unless_a_device_is_named(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loaded() is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert loaded() == "auto"
    assert loaded(device="cuda:1") == "cuda:1"


@pytest.mark.parametrize(("free", "where"), [(GIB, "cpu"), (1000, "disk")])
def test_layers_of_a_model_too_large_for_a_gpu_wait_in_memory_or_on_disk(
    loaded: Any, accelerator: pytest.MonkeyPatch, free: int, where: str
) -> None:
    accelerator.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    for named, expected in ((None, 0), ("cuda:1", "cuda:1")):
        place = loaded(streamed=True, device=named)
        assert place.pop("model.layers") == where
        assert set(place) == {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}
        assert set(place.values()) == {expected}


def test_layers_on_a_machine_without_a_gpu_wait_on_disk(loaded: Any) -> None:
    place = loaded(streamed=True)
    assert place.pop("model.layers") == "disk"
    assert set(place.values()) == {"cpu"}


def test_each_launched_process_scores_on_the_accelerator_that_is_its_own(
    accelerator: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def state(**kwargs: Any) -> Any:
        asked.update(kwargs)
        return SimpleNamespace(process_index=1, num_processes=2, device="cuda:1")

    accelerator.setenv("WORLD_SIZE", "2")
    accelerator.setattr("accelerate.PartialState", state)
    ranks = launched()
    assert (ranks.index, ranks.count, ranks.device, asked) == (1, 2, "cuda:1", {"cpu": False})
    accelerator.setattr(torch.accelerator, "is_available", lambda: False)
    assert launched().device is None
    assert asked == {"cpu": True}
    accelerator.delenv("WORLD_SIZE")
    assert launched() == Ranks()


# What it computes in


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_fast_where_the_gpu_has_it_and_float16_on_any(
    accelerator: pytest.MonkeyPatch, native: bool
) -> None:
    def supported(including_emulation: bool) -> bool:
        return native or including_emulation

    accelerator.setattr(torch.cuda, "is_bf16_supported", supported)
    accelerator.setattr(loading, "EMULATED", {"float16": lambda: False})
    assert loading.has_fast("bfloat16") is native
    assert loading.has_fast("float16")


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_healing_computes_in_the_dtype_of_the_weights_on_their_device(dtype: torch.dtype) -> None:
    head = SimpleNamespace(weight=SimpleNamespace(dtype=dtype))
    twin: Any = SimpleNamespace(device=torch.device("cpu"), _head=head)
    a = torch.ones(2, 2)
    with Twin.autocast(twin):
        assert (a @ a).dtype == dtype
    if dtype == torch.bfloat16:
        twin.device = torch.device("cuda")
        assert Twin.autocast(twin).device == "cuda"


# Memory


def test_the_budget_is_four_fifths_of_what_the_gpu_has_free(
    accelerator: pytest.MonkeyPatch,
) -> None:
    accelerator.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 80 * GIB))
    assert memory.default_budget() == 8 * GIB


def test_processes_share_a_machine_s_memory_but_not_a_gpu_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scorer, "default_budget", lambda: 8 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert scorer._own_budget(None) == 2 * GIB
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert scorer._own_budget(None) == 8 * GIB


# Batches of states


def test_a_gpu_takes_many_states_at_once_and_a_cpu_one() -> None:
    assert chunk_for("cpu", 16) == 1
    assert chunk_for("cuda", 2048) == 16
    assert chunk_for("cuda", 100_000) == 1


def test_losses_of_states_that_go_through_a_layer_together_are_those_of_single_ones(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loading.load_model(open_checkpoint(str(models("llama"))), "float32")
    draw = random.Random(0)
    texts = [[draw.randrange(512) for _ in range(24)] for _ in range(3)]

    def losses() -> tuple[int, list[float]]:
        sweep = LayerSweep(CausalLM(model, texts[0]), texts, budget=GIB, weights=1 << 20)
        first = sweep.score([], range(1, 7)).losses
        return sweep.plan.chunk, [*first, *sweep.score([3], [1, 2, 4, 5, 6]).losses]

    one, expected = losses()
    monkeypatch.setattr(layer_sweep, "chunk_for", lambda kind, length: chunk_for("cuda", length))
    many, found = losses()
    assert (one, many) == (1, (1 << 15) // 24)
    # Losses above the least are bounds; which ones does not depend on the batch.
    assert found == pytest.approx(expected, rel=1e-5)


# Measuring


def test_a_gpu_is_waited_for_before_the_clock_is_read(accelerator: pytest.MonkeyPatch) -> None:
    made, waits, ones = [], [], torch.ones

    def on_cpu(*size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        made.append((size, device))
        return ones(8, 8, dtype=dtype)

    accelerator.setattr(torch, "ones", on_cpu)
    accelerator.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    properties = SimpleNamespace(total_memory=80 * GIB)
    accelerator.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = device.device_here()
    assert found.memory == 80 * GIB
    assert ((8192, 8192), "cuda") in made
    # Twice as often as something is timed: a product and a sum.
    assert len(waits) == 2 * (device._REPEATS + 1)


def test_a_cpus_peak_is_that_of_a_dtype_that_it_does_not_emulate() -> None:
    found = device.device_here().flops
    matrix = torch.ones(512, 512)
    times = []
    for _ in range(5):
        begin = time.monotonic()
        matrix @ matrix
        times.append(time.monotonic() - begin)
    # An emulated product has a hundredth of this rate.
    assert found > 0.2 * 2 * 512**3 / min(times)


def test_engines_are_never_forks_where_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "nvidia0"
    monkeypatch.setattr(
        sleb_bench.engine, "Path", lambda path: tmp_path if path == "/dev" else Path(path)
    )
    assert not sleb_bench.engine.has_gpu()
    own.touch()
    assert sleb_bench.engine.has_gpu()
    context: Any = sleb_bench.engine.process_context()
    assert isinstance(context, multiprocessing.context.SpawnContext)


def test_a_benchmark_notes_the_gpus_their_driver_and_nccl(
    tmp_path: Path, accelerator: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.1, 81559 MiB, 1980, 1980, 2619, 700 W'\n")
    command.chmod(0o755)
    accelerator.setenv("PATH", str(tmp_path), prepend=":")
    accelerator.setattr(torch.version, "cuda", "13.0")
    accelerator.setattr(torch.cuda, "nccl", SimpleNamespace(version=lambda: (2, 28, 3)))
    found = sleb_bench.machine.machine()
    (gpu,) = found["gpus"]
    assert (gpu["name"], gpu["driver_version"], gpu["power.limit"]) == (
        "NVIDIA H100",
        "580.1",
        "700 W",
    )
    assert (found["versions"]["cuda"], found["versions"]["nccl"]) == ("13.0", "2.28.3")
