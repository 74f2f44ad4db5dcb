"""Ways to ask a server for a model: options, files and variables beside a right command.

Each is given to `sleb-serve serve`, and added to the command that it prints. Either ends in an
error, or in the manifest's model. See `test_ways`; `docs/generate.py` makes a table of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SERVED = ""
"""The outcome of a way that ends in the manifest's model; of others, a piece of the message."""
UNKNOWN = "unrecognized arguments"


@dataclass(frozen=True)
class Way:
    """Something beside a right command, and how a server ends that is started so.

    Attributes:
        arguments: of the command; {places} stand for folders and files of the test.
        serve: what comes of giving them to `sleb-serve serve`.
        printed: what comes of adding them to the command that it prints.
        environment: variables that are set.
        file: a file of options, whose place is {file}.
        paired: whether the way is tried together with each other one.
    """

    arguments: str
    serve: str = SERVED
    printed: str = SERVED
    environment: Mapping[str, str] = field(default_factory=dict)
    file: str = ""
    paired: bool = True

    @property
    def options(self) -> set[str]:
        """The names of the options among the arguments."""
        return {part.partition("=")[0] for part in self.arguments.split() if part[:2] == "--"}

    @property
    def name(self) -> str:
        """As the table shows it."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        text = " ".join([*variables, self.arguments]).strip()
        return text if not self.file else f"{text} ({'; '.join(self.file.splitlines())})"


_NO_MANIFEST = "given without a manifest"
_OTHER = "architecture expected LlamaForCausalLM, found OPTForCausalLM"
_LOADS_DENSE = "which loads dense ones"
_NO_ARCHITECTURE = "['SlebLlamaForCausalLM'] are not supported for now"
_FROM_MANIFEST = "is set from the manifest"
_OTHER_FILES = "reads other files than the checkpoint"
_NOT_HELD = "cannot be checked against the manifest"
_FLOAT = "not supported for quantization method fp8"
_NO_METHOD = "Unknown quantization method"
_TRITON = "Model Runner V2 requires Triton"
_ONCE = "write overrides as one"

FORMATS = [
    Way("--load-format auto", printed=_LOADS_DENSE),
    Way("--load-format hf", printed=_LOADS_DENSE, paired=False),
    Way("--load-format safetensors", printed=_LOADS_DENSE, paired=False),
    Way("--load-format dummy", printed=_LOADS_DENSE),
    Way("--load-format SLEB", serve=_OTHER_FILES, paired=False),
    Way("--load-format sharded_state", serve=_OTHER_FILES, printed=_LOADS_DENSE, paired=False),
    Way("--load-format mistral", serve=_OTHER_FILES, printed=_LOADS_DENSE, paired=False),
    Way("--load-form auto", printed=_LOADS_DENSE),
    Way("--load_format=auto", printed=_LOADS_DENSE, paired=False),
    Way("--load-format.x auto", serve="not supported", printed="not supported", paired=False),
    Way("--config-format auto", serve=_FROM_MANIFEST, printed=_NO_ARCHITECTURE),
    Way("--config-format hf", serve=_FROM_MANIFEST, printed=_NO_ARCHITECTURE, paired=False),
    Way("--config-format mistral", serve=_FROM_MANIFEST, printed="params.json", paired=False),
    Way("--config-form hf", printed=_NO_ARCHITECTURE, paired=False),
    Way("--model-loader-extra-config {}", paired=False),
    Way("""--model-loader-extra-config '{"reader": "dummy"}'"""),
    Way(
        """--model-loader-extra-config '{"reader": "sharded_state"}'""",
        serve=_OTHER_FILES,
        printed=_OTHER_FILES,
        paired=False,
    ),
    Way("--ignore-patterns *.safetensors", paired=False),
    Way("--pt-load-map-location cpu", paired=False),
    Way("--download-dir {other}"),
    Way("--safetensors-load-strategy eager", paired=False),
]
OVERRIDES = [
    Way("--hf-overrides {}", printed=_NO_MANIFEST),
    Way("--hf-overrides {} --load-format auto", printed=_NO_MANIFEST),
    Way(
        "--hf-overrides {} --load-format auto --config-format auto",
        serve=_FROM_MANIFEST,
        printed="is a pruned model's, and no manifest was given",
        # With another name as well, nothing of a pruned model's command is left.
        paired=False,
    ),
    Way("--hf-overrides.rope_theta 5", serve=_ONCE, printed=_NO_MANIFEST),
    Way("--hf-over {}", serve=_ONCE, printed=_NO_MANIFEST, paired=False),
    Way("""--hf-overrides '{"rope_theta": 5}'""", printed=_NO_MANIFEST, paired=False),
    Way("""--hf-overrides '{"sleb": null}'""", serve=_FROM_MANIFEST, printed=_NO_MANIFEST),
    Way(
        """--hf-overrides '{"num_hidden_layers": 4}'""",
        serve="num_hidden_layers = 4",
        printed=_NO_MANIFEST,
    ),
    Way(
        """--hf-overrides '{"architectures": ["LlamaForCausalLM"]}'""",
        serve=_FROM_MANIFEST,
        printed=_NO_MANIFEST,
    ),
    Way("""--hf-overrides '{"model_type": "opt"}'""", printed=_NO_MANIFEST),
    Way(
        """--hf-overrides '{"text_config": {"num_hidden_layers": 8}}'""",
        serve="The text_config extracted",
        printed="The text_config extracted",
        paired=False,
    ),
]
MODELS = [
    Way("--model {other}", serve="--model is given twice", printed=_OTHER),
    Way("--model {copy}", serve="--model is given twice"),
    Way("--model={other}", serve="--model is given twice", printed=_OTHER, paired=False),
    Way("--mode {other}", serve="ambiguous option", printed="ambiguous option", paired=False),
    Way("{other}"),
    Way("-- --load-format auto", serve=UNKNOWN, printed=UNKNOWN, paired=False),
    Way("--model-weights {other}", serve=UNKNOWN, printed=UNKNOWN, paired=False),
    Way("--hf-config-path {other}", serve=_OTHER, printed=_OTHER),
    Way("--hf-config-path {copy}"),
    Way("--tokenizer {other}"),
    Way("--tokenizer-revision main", paired=False),
    Way("--code-revision main", paired=False),
    Way("--revision main"),
    Way("--revis main", paired=False),
    Way("--trust-remote-code"),
    Way("--served-model-name plain"),
    Way("--hf-token none", paired=False),
]
CLASSES = [
    Way("--model-impl transformers", paired=False),
    Way("--model-impl vllm", paired=False),
    Way("--runner pooling --convert embed"),
    Way("--runner draft"),
    Way("--runner draft --hf-overrides {}", printed=_NO_MANIFEST),
    Way(
        "--model-class-overrides "
        """'{"LlamaForCausalLM": "vllm.model_executor.models.opt:OPTForCausalLM"}'""",
        serve=_NOT_HELD,
        printed=_NOT_HELD,
    ),
    Way(
        "--model-class-overrides "
        """'{"SlebLlamaForCausalLM": "vllm.model_executor.models.llama:LlamaForCausalLM"}'""",
        serve=_NOT_HELD,
        printed=_NOT_HELD,
    ),
    Way("--quantization fp8", _FLOAT, _FLOAT, paired=False),
    Way("--quantization bitsandbytes", _NO_METHOD, _NO_METHOD, paired=False),
    Way("--quantization gguf", _NO_METHOD, _NO_METHOD, paired=False),
    Way("--enable-lora"),
    Way("""--speculative-config '{"method": "ngram", "num_speculative_tokens": 2}'"""),
    Way("""--speculative-config '{"model": "{copy}", "num_speculative_tokens": 2}'"""),
    Way("""--additional-config '{"sleb": null}'""", paired=False),
    Way("--generation-config vllm", paired=False),
    Way("""--override-generation-config '{"temperature": 0}'""", paired=False),
]
FILES = [
    Way("--config {file}", file="model: {other}"),
    Way("--config {file}", file="load-format: auto\nconfig-format: hf\nhf-overrides: '{}'"),
    Way(
        "--config {file}",
        serve=_NO_MANIFEST,
        printed=_NO_MANIFEST,
        file="hf-overrides.rope_theta: 5",
    ),
    Way("--config {file}", serve=UNKNOWN, printed=UNKNOWN, file="model-weights: {other}"),
    Way("--config={file}", file="model: {other}", paired=False),
    Way("--conf {file}", serve="ambiguous", printed="ambiguous", file="seed: 1", paired=False),
    Way("--config {file} --config {file}", serve="More than one", printed="More than one"),
]
VARIABLES = [
    Way("", "disables the plugin", "Unknown config format `sleb`", {"VLLM_PLUGINS": "none"}),
    Way(
        "",
        "disables the plugin",
        "Unknown config format `sleb`",
        {"VLLM_PLUGINS": ""},
        paired=False,
    ),
    Way(
        "",
        "disables the plugin",
        "Unknown config format `sleb`",
        {"VLLM_PLUGINS": " sleb"},
        paired=False,
    ),
    Way("", environment={"VLLM_PLUGINS": "sleb"}, paired=False),
    Way("", serve=_OTHER, printed=_OTHER, environment={"VLLM_MODEL_REDIRECT_PATH": "{to_other}"}),
    Way("", environment={"VLLM_MODEL_REDIRECT_PATH": "{to_copy}"}),
    Way("", "modelscope", "modelscope", {"VLLM_USE_MODELSCOPE": "True"}, paired=False),
    Way("", environment={"HF_HUB_CACHE": "{other}", "HF_HOME": "{other}"}, paired=False),
    Way("", environment={"HF_ENDPOINT": "http://127.0.0.1:9"}, paired=False),
    Way("", environment={"VLLM_TEST_FORCE_LOAD_FORMAT": "auto"}, paired=False),
    Way("", _TRITON, _TRITON, {"VLLM_USE_V2_MODEL_RUNNER": "1"}, paired=False),
    Way("", environment={"SLEB_ALLOW_UNTESTED_VLLM": "1"}, paired=False),
]
GROUPS = {
    "formats": FORMATS,
    "overrides": OVERRIDES,
    "models": MODELS,
    "classes": CLASSES,
    "files": FILES,
    "variables": VARIABLES,
}
WAYS = [way for ways in GROUPS.values() for way in ways]
