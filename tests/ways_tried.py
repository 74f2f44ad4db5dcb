"""Commands of servers, each followed until its model is loaded: in a fork, with one rank."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest


def try_all(jobs: str, output: str) -> None:
    """In a fork: how each of the jobs, ``{"arguments", "environment"}``, ends."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.model_executor.model_loader import base_loader
    from vllm.transformers_utils import config
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    # What the weights are repacked to, for this processor's kernels, tells of no layer.
    base_loader.process_weights_after_loading = lambda *_: None
    # vLLM reads a config that it could not read once more, two seconds later.
    config.with_retry = lambda read, *_, **__: read()
    gc.freeze()
    found = []
    for job in json.loads(Path(jobs).read_text()):
        with as_before(job["environment"]), contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                found.append(_loaded(parser, job["arguments"]))
            except SystemExit:
                found.append(["refused", said.getvalue()])
            except Exception as error:
                found.append(["refused", f"{type(error).__name__}: {error}"])
    Path(output).write_text(json.dumps(found))
    os._exit(0)


@contextlib.contextmanager
def as_before(environment: Mapping[str, str]) -> Iterator[None]:
    """Set variables, and leave none of what vLLM keeps of a model for the next."""
    from vllm.config import model as config
    from vllm.model_executor.models import ModelRegistry
    from vllm.transformers_utils import utils

    known = dict(ModelRegistry.models)
    utils.maybe_model_redirect.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield
    ModelRegistry.models.clear()
    ModelRegistry.models.update(known)
    config._REGISTERED_MODEL_CLASS_OVERRIDES.clear()


def _loaded(parser: Any, arguments: list[str]) -> list[str]:
    """What vLLM's config and loader make of a command: as an engine and its only worker do."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    from sleb_serve.manifest.built import check_ranks
    from sleb_serve.manifest.pruning import Pruning

    config = AsyncEngineArgs.from_cli_args(parser.parse_args(arguments)).create_engine_config()
    with set_current_vllm_config(config):
        _join()
        loader = get_model_loader(config.load_config)
        model = loader.load_model(vllm_config=config, model_config=config.model_config)
    pruning = Pruning.of_config(config.model_config.hf_config)
    built = getattr(model, "sleb", None)
    if pruning is None or built is None:
        return ["dense", f"{config.load_config.load_format}, {config.model_config.config_format}"]
    check_ranks(pruning, [built.report(0)])
    return ["served", pruning.digest]


def _join() -> None:
    from vllm import distributed
    from vllm.utils.network_utils import get_open_port

    if not distributed.model_parallel_is_initialized():
        address = f"tcp://127.0.0.1:{get_open_port()}"
        distributed.init_distributed_environment(1, 0, address, 0, backend="gloo")
        distributed.ensure_model_parallel_initialized(1, 1)


def reload_others(job: str, output: str) -> None:
    """In a fork: load a command's model, and ask its loader for the weights of other folders.

    And at last for those that another command asks for.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    asked = json.loads(Path(job).read_text())
    parser = make_arg_parser(FlexibleArgumentParser())
    arguments, others = (parser.parse_args(asked[name]) for name in ("arguments", "others"))
    Path(output).write_text(json.dumps(_reloaded(arguments, asked["folders"], others)))
    os._exit(0)


def _reloaded(arguments: Any, folders: list[str], others: Any) -> list[str]:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    config, other = (
        AsyncEngineArgs.from_cli_args(asked).create_engine_config() for asked in (arguments, others)
    )
    found = []
    with set_current_vllm_config(config):
        _join()
        loader = get_model_loader(config.load_config)
        model = loader.load_model(vllm_config=config, model_config=config.model_config)
        for folder in [*folders, None]:
            try:
                if folder is None:
                    weights = loader.get_all_weights(other.model_config, model)
                else:
                    # As vLLM's reload_weights does with a path.
                    config.model_config.model = folder
                    weights = loader.get_all_weights(config.model_config, model)
                found.append(f"{len(list(weights))} tensors")
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
    return found
