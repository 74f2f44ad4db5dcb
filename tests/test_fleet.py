"""The simulation behind `sleb-serve plan --rate`, against closed forms and a plain one."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import refused
from plain_simulation import linear, plainly
from sleb_serve.cli.main import main
from sleb_serve.errors import SlebError
from sleb_serve.roofline.fleet import Load, Replica, Slo, fewest, need, serve
from sleb_serve.roofline.measured import Timed, fit, read_measured, steps_of, steps_taken
from sleb_serve.roofline.simulation import Limits, Request, simulate
from sleb_serve.roofline.workload import Workload

Capture = pytest.CaptureFixture[str]
ENDLESS = 1e12
SLO = Slo({"ttft": 0.45, "tpot": 0.04})


@given(data=st.data())
def test_it_is_what_a_plain_simulation_gives(data: st.DataObject) -> None:
    lengths = st.tuples(st.floats(0, 0.5), st.integers(1, 50), st.integers(1, 12))
    drawn = data.draw(st.lists(lengths, min_size=1, max_size=16))
    requests = [Request(*one) for one in sorted(drawn)]
    sequences = data.draw(st.integers(1, 8))
    limits = Limits(
        data.draw(st.integers(sequences, 40)),
        sequences,
        data.draw(st.integers(66, 200)),
        data.draw(st.sampled_from([0, 4])),
        1,
    )
    found, expected = simulate(requests, limits, linear), plainly(requests, limits, linear)
    assert (found.steps, found.preemptions) == (expected.steps, expected.preemptions)
    assert list(found.first) == pytest.approx(list(expected.first))
    assert list(found.last) == pytest.approx(list(expected.last))


def test_a_full_cache_preempts_and_the_work_is_done_again() -> None:
    requests = [Request(0.0, 50, 50)] * 4
    run = simulate(requests, Limits(512, 4, 250, 0, 1), linear)
    roomy = simulate(requests, Limits(512, 4, 400, 0, 1), linear)
    assert run.preemptions > 0 == roomy.preemptions
    assert run.steps > roomy.steps == 50
    with pytest.raises(SlebError, match="does not fit into the KV cache"):
        simulate(requests, Limits(512, 4, 99, 0, 1), linear)
    with pytest.raises(SlebError, match="max_num_seqs=8"):
        simulate(requests, Limits(4, 8, 400, 0, 1), linear)


def test_saturated_throughput_is_the_closed_form() -> None:
    batch, prompt, output, waves = 16, 32, 20, 10

    def step(new: int, sequences: int, attended: float, cached: float) -> float:
        return 0.004 + 3e-5 * new

    requests = [Request(0.0, prompt, output)] * (batch * waves)
    run = simulate(requests, Limits(batch * prompt, batch, ENDLESS, 0, 1), step)
    wave = step(batch * prompt, 0, 0, 0) + (output - 1) * step(batch, 0, 0, 0)
    assert len(requests) / max(run.last) == pytest.approx(batch / wave)
    # With a budget of one prompt a step, each request waits for those before it.
    run = simulate(requests[:batch], Limits(prompt, batch, ENDLESS, 0, 1), lambda *_: 1.0)
    assert run.first[0] == 1
    assert run.first[1] == 3  # of the second step one token is the first request's


def test_one_at_a_time_waits_as_long_as_in_an_m_d_1_queue() -> None:
    service, part = 0.1, 0.7
    load = Load(part / service, input_length=10, output_length=2, requests=100_000)
    requests = [Request(r.arrival, 10, 1) for r in load.stream(load.rate)]
    run = simulate(requests, Limits(10, 1, ENDLESS, 0, 1), lambda *_: service)
    waits = [f - r.arrival for f, r in zip(run.first, requests, strict=True)]
    expected = service + part * service / (2 * (1 - part))
    assert sum(waits) / len(waits) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_more_replicas_never_serve_worse(seed: int) -> None:
    load = Load(60, 400, 60, spread=0.5, requests=600, seed=seed)
    replica = Replica(0, 1, Limits(2048, 64, 20000, 8, 1), linear)
    found = [serve(replica, load, load.rate / n, SLO).attainment for n in range(1, 12)]
    assert found == sorted(found)
    assert found[0] < 0.5 < 0.99 < found[-1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [5, 60, 200])
def test_the_search_finds_what_trying_all_numbers_finds(seed: int, rate: float) -> None:
    load = Load(rate, 300, 40, spread=0.5, requests=400, seed=seed)
    replica = Replica(3, 2, Limits(1024, 32, 10000, 8, 1), linear)
    found = need(replica, load, SLO)
    tried = next(n for n in range(1, 500) if serve(replica, load, rate / n, SLO).attainment >= 0.99)
    assert (found.replicas, found.gpus) == (tried, 2 * tried)
    assert rate / tried <= found.capacity
    assert tried == 1 or found.capacity < rate / (tried - 1)


def test_fewest_is_the_least_that_is_enough() -> None:
    for least in range(1, 70):
        assert fewest(lambda n, least=least: n >= least) == least  # type: ignore[misc]
    assert fewest(lambda n: False) is None


def test_what_no_number_of_replicas_can_serve_is_none() -> None:
    load = Load(5, 300, 40, requests=200)
    replica = Replica(0, 1, Limits(1024, 32, 10000, 8, 1), lambda *_: 0.05)
    found = need(replica, load, SLO)
    assert (found.replicas, found.capacity) == (None, 0)
    assert found.served is not None
    assert found.served.tpot == pytest.approx(0.05, rel=1e-6)


def test_it_is_fast_and_gives_the_same_again() -> None:
    load = Load(20, 500, 150, spread=0.5, requests=3000, seed=1)
    requests, limits = load.stream(20), Limits(2048, 256, ENDLESS, 8, 1)
    begin = time.process_time()
    run = simulate(requests, limits, linear)
    rate = run.steps / (time.process_time() - begin)
    assert run == simulate(load.stream(20), limits, linear)
    assert rate > 100_000


# Step times from records


def bench_records(
    folder: Path, workloads: Sequence[Workload], steps: dict[int, Callable[..., float]]
) -> Path:
    """Records as `sleb-serve bench` writes them, of engines whose steps take so long."""
    tokens, sequences, memory = 2048, 64, 40000
    entries: list[dict[str, Any]] = [
        {
            "record": "setting",
            "weights_sha256": "a",
            "workloads": [{**vars(workload), "unit": ""} for workload in workloads],
        }
    ]
    arguments = {"max_num_batched_tokens": tokens, "max_num_seqs": sequences}
    for removed, step in steps.items():
        name = f"sleb{removed}" if removed else "dense"
        about = {"backend": "vllm", "blocks": removed, "engine_arguments": arguments}
        entries.append({"record": "variant", "variant": name, **about})
        cache = {"kv_cache_tokens": memory, "kv_cache_blocks": memory // 16}
        entries.append({"record": "engine", "variant": name, **cache})
        for workload in workloads:
            taken = steps_of(workload, tokens, sequences, memory)
            seconds = sum(step(*one) for one in taken)
            for number in range(3):
                time_ = 99.0 if number == 0 else seconds  # round 0 warms up
                place = {"variant": name, "workload": workload.name, "round": number}
                entries.append({"record": "sample", "elapsed_time": time_, **place})
    folder.mkdir()
    (folder / "records.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return folder


def generation(batch: int, prompt: int, output: int) -> Workload:
    return Workload(f"decode-{batch}-{prompt}", "decode", batch, prompt, output)


LOADS = (
    *(generation(batch, 16, 24) for batch in (1, 4, 16, 64)),
    generation(8, 200, 24),
    *(Workload(f"prefill-{n}", "prefill", 1, n, 1) for n in (64, 256, 1024, 2048)),
    Workload("prefill-4x512", "prefill", 4, 512, 1),
    Workload("prefill-64x16", "prefill", 64, 16, 1),
)


def test_a_step_time_is_found_again_from_records(tmp_path: Path) -> None:
    def pruned(*values: Any) -> float:
        return 0.8 * linear(*values)

    folder = bench_records(tmp_path / "r", LOADS, {0: linear, 6: pruned})
    dense, short = read_measured([folder])
    assert (dense.removed, short.removed, dense.loads) == (0, 6, len(LOADS))
    assert (dense.kv_tokens, dense.block) == (40000, 16)
    assert (dense.max_tokens, dense.max_sequences) == (2048, 64)
    assert max(dense.error, short.error) < 1e-6
    for values in ((1, 1, 40, 40), (40, 40, 4000, 4000), (700, 20, 90000, 4000)):
        # A step of less than the first corner takes as long as the first corner.
        assert dense.step(*values) == pytest.approx(linear(*values), rel=1e-4)
        assert short.step(*values) == pytest.approx(pruned(*values), rel=1e-4)
    mixed = [Request(0.0, 20 * (1 + i % 20), 10 + i % 50) for i in range(60)]
    limits = Limits(512, 24, 40000, 0, 1)
    found = simulate(mixed, limits, dense.step).last
    assert list(found) == pytest.approx(list(simulate(mixed, limits, linear).last), rel=1e-4)


def with_blocks(folder: Path, count: int) -> Path:
    file = folder / "records.jsonl"
    file.write_text(file.read_text().replace('"weights', f'"num_blocks": {count}, "weights', 1))
    return folder


def test_noise_gives_no_more_gain_than_the_removed_blocks_allow(tmp_path: Path) -> None:
    """A fifth outside the blocks, and times of a load that are up to 7 % too long or short."""
    source = random.Random(3)

    def noisy(share: float) -> Callable[..., float]:
        noise = [source.uniform(0.93, 1.07) for _ in range(100)]
        return lambda *v: linear(*v) * (0.2 + 0.8 * share) * noise[v[1] % 100]

    def ratios(folder: Path) -> list[float]:
        dense, short = read_measured([folder])
        steps = ((8, 8, 900, 900), (256, 4, 9000, 300), (1500, 20, 90000, 4000))
        return [dense.step(*values) / short.step(*values) for values in steps]

    alone, together = [], []
    for number in range(6):
        steps = {0: noisy(1.0), 6: noisy(0.8)}
        folder = bench_records(tmp_path / str(number), LOADS, steps)
        alone += ratios(folder)
        together += ratios(with_blocks(folder, 30))
    assert max(alone) > 1.25
    assert all(1 <= ratio <= 1.25 + 1e-9 for ratio in together)


def test_blocks_of_different_sizes_are_fitted_each_for_itself(tmp_path: Path) -> None:
    """Twice as fast by a fifth of the blocks."""
    steps = {0: linear, 6: lambda *v: 0.5 * linear(*v)}
    folder = bench_records(tmp_path / "r", LOADS, steps)
    alone = read_measured([folder])
    assert read_measured([with_blocks(folder, 30)]) == alone


def test_several_runs_of_one_model_are_read_as_one(tmp_path: Path) -> None:
    whole = bench_records(tmp_path / "whole", LOADS, {0: linear})
    parts = [
        bench_records(tmp_path / "a", LOADS[:5], {0: linear}),
        bench_records(tmp_path / "b", LOADS[5:], {0: linear}),
    ]
    assert read_measured(parts) == read_measured([whole])
    file = parts[1] / "records.jsonl"
    file.write_text(file.read_text().replace('"weights_sha256": "a"', '"weights_sha256": "b"'))
    with pytest.raises(SlebError, match="of several models"):
        read_measured(parts)


def test_a_fit_never_lets_more_work_take_less_time() -> None:
    source = random.Random(0)
    for _ in range(20):
        runs = []
        for workload in LOADS:
            steps = steps_of(workload, 2048, 64, 40000)
            seconds = sum(linear(*one) for one in steps) * source.uniform(0.7, 1.4)
            runs.append(Timed(steps, seconds))
        step, _ = fit(runs)
        times = [step(new, 1, 0, 0) for new in range(1, 4000, 7)]
        assert times == sorted(times)
        assert min(step.read, step.attended, step.sequence, times[0]) >= 0


def test_least_squares_without_negatives_is_scipys() -> None:
    from sleb_serve.utils.least_squares import non_negative

    optimize = pytest.importorskip("scipy.optimize")
    source = random.Random(0)
    for _ in range(100):
        size = source.randint(1, 6)
        rows = [[source.gauss(0, 1) for _ in range(size)] for _ in range(size + 4)]
        values = [source.gauss(0, 1) for _ in rows]
        assert non_negative(rows, values) == pytest.approx(
            list(optimize.nnls(rows, values)[0]), abs=1e-8
        )


def test_steps_taken_are_those_of_the_engine() -> None:
    found = steps_taken([Request(0.0, 30, 3), Request(0.0, 10, 2)], Limits(25, 4, ENDLESS, 0, 1))
    # 25 tokens of the first prompt; 5 more and the second prompt; a token for both; one more.
    assert [step[:2] for step in found] == [(25, 1), (15, 2), (2, 2), (1, 1)]
    assert found[0][2:] == (25 * 26 / 2, 25)
    assert found[2][2:] == (31 + 11, 31 + 11)


# The command line


def test_the_command_says_how_many_replicas(tmp_path: Path, capsys: Capture) -> None:
    folder = bench_records(tmp_path / "r", LOADS, {0: linear, 6: lambda *v: 0.8 * linear(*v)})
    load = ["--rate", "900", "--slo", "ttft=450ms,tpot=0.04s", "--output-length", "8"]
    arguments = ["plan", "--measured", str(folder), *load]
    assert main(arguments) == 0
    assert "900 requests/s of 512 + 8 tokens, 99 % of them within" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    dense, pruned = json.loads(capsys.readouterr().out)["needs"]
    assert pruned["replicas"] < dense["replicas"]
    assert pruned["capacity"] / dense["capacity"] > 1.2
    arguments = ["plan", "llama-2-7b", *load, "--removed", "8", "--json", "--gpu", "L40S"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["needs"]
    assert [n["removed"] for n in found] == [0, 8]
    assert main(["plan", *load, "--removed", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["needs"][0]["served"] is None  # 138 GB on one card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "3"], "--rate and --slo belong together"),
        (["--rate", "0", "--slo", "ttft=1s"], "--rate 0"),
        (["--rate", "1", "--slo", "ttft=1"], "ttft=1: give limits for ttft, tpot, e2el"),
        (["--rate", "1", "--slo", "ttft=1s", "--range-ratio", "1"], "--range-ratio 1"),
        (["--rate", "1", "--slo", "ttft=1s", "--output-length", "1"], "--output-length"),
        (["--measured", "nowhere"], "--measured is for --rate and --slo"),
        (["--rate", "1", "--slo", "ttft=1s", "--measured", "nowhere"], "cannot read nowhere"),
        (["--rate", "1", "--slo", "ttft=1s", "--attainment", "2"], "--attainment is above 0"),
    ],
)
def test_a_fleet_that_cannot_be_planned_is_refused(
    arguments: list[str], message: str, capsys: Capture
) -> None:
    assert message in refused(["plan", *arguments], capsys)


def test_records_that_tell_too_little_are_refused(tmp_path: Path, capsys: Capture) -> None:
    load = ["--rate", "1", "--slo", "ttft=1s"]
    folder = bench_records(tmp_path / "r", [generation(8, 16, 24)], {0: linear})
    line = refused(["plan", "--measured", str(folder), *load], capsys)
    assert "the records hold steps of one size alone" in line
    folder = bench_records(tmp_path / "p", LOADS, {6: linear})
    assert "hold no dense model" in refused(["plan", "--measured", str(folder), *load], capsys)
    (folder / "records.jsonl").write_text('{"record": "setting", "weights_sha256": "a"}\n')
    assert "hold no dense model" in refused(["plan", "--measured", str(folder), *load], capsys)
    entries = ({"record": "setting", "weights_sha256": "a"}, {"record": "variant"})
    about = {"variant": "dense", "backend": "vllm", "blocks": 0, "kv_cache_tokens": 5}
    lines = [*entries[:1], {**entries[1], **about}, {"record": "engine", **about}]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = refused(["plan", "--measured", str(folder), *load], capsys)
    assert "records of another version (KeyError" in line
