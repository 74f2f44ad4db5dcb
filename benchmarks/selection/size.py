"""Run `select` on a model of more than 4 GB within a hard memory limit of 2 GB.

Usage: size.py FOLDER. FOLDER gets a random Llama (kept for the next run), the manifest, and
`size.json`. A memory cgroup sets the limit; it also counts the page cache and kills the process
beyond it. If no cgroup can be created, resident memory is measured instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sleb_bench.demo_model import demo_model

LIMIT = 2 << 30
BUDGET = "1.2GiB"
SELECT = ["--remove", "2", "--calibration", "python-docs", "--sequences", "2"]
SELECT += ["--sequence-length", "128", "--memory-budget", BUDGET]
CGROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
)


def main() -> None:
    """Create the model if needed, select within the limit, write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder.resolve()
    model = folder / "model"
    if not model.exists():
        make_model(model, demo_model(folder / "tokenizer"))
    group, peak_file = make_group()
    command = [sys.executable, "-m", "sleb_serve.cli", "select", str(model)]
    command += ["-o", str(folder / "size-manifest.json"), *SELECT]
    begin = time.time()

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    with (folder / "size.log").open("wb") as log:
        child = subprocess.Popen(command, preexec_fn=enter, stdout=log, stderr=log)
        resident = 0
        while child.poll() is None:
            resident = max(resident, high_water(child.pid))
            time.sleep(0.05)
    result: dict[str, Any] = {
        "command": command[1:],
        "exit_code": child.returncode,
        "model_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "limit_bytes": LIMIT if group is not None else None,
        "group_peak_bytes": int(peak_file.read_text()) if peak_file is not None else None,
        "resident_peak_bytes": resident,
        "seconds": round(time.time() - begin, 1),
    }
    if group is not None:
        group.rmdir()
    (folder / "size.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(child.returncode)


def make_model(folder: Path, tokenizer: Path) -> None:
    """Create a random sharded Llama of more than 4 GB in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=34,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="600MB")
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder)


def make_group() -> tuple[Path | None, Path | None]:
    """Create a memory cgroup with the limit; return it and its peak file, or None."""
    for root, limit, peak in CGROUPS:
        group = root / "sleb-serve-size"
        try:
            group.mkdir(exist_ok=True)
            (group / limit).write_text(str(LIMIT))
        except OSError:
            continue
        return group, group / peak
    return None, None


def high_water(process: int) -> int:
    """Return a process's peak resident bytes."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    main()
