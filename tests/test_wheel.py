"""The wheel in an environment without torch: available commands, messages for missing extras."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import oracle
from conftest import ROOT
from test_packaging import SOURCES
from tiny import VOCABULARY

pytestmark = pytest.mark.slow  # pip takes most of its half minute

Models = Callable[[str], Path]
BUILT_FROM = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
NOT_COMPARED = "not compared with the dense model's without transformers: pip install"
SELECT = "pip install 'sleb-serve[select]'"


def run(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """A command's answer, without the paths by which this process finds packages."""
    own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    return subprocess.run(
        [str(part) for part in command],
        env=own,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def done(command: Sequence[str | Path]) -> str:
    """The output of a command that must succeed."""
    found = run(command)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the source archive."""
    pytest.importorskip("build")
    root = tmp_path_factory.mktemp("built")
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, root / name)
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    # The tests, too: an archive must leave them out.
    for folder in (*SOURCES.values(), ROOT / "tests"):
        shutil.copytree(folder, root / folder.relative_to(ROOT), ignore=leave)
    done([sys.executable, "-m", "build", "--no-isolation", "--outdir", root / "dist", root])
    return root / "dist"


def test_the_wheel_holds_the_packages_and_their_data(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == {
        str(Path(package) / file.relative_to(folder))
        for package, folder in SOURCES.items()
        for file in folder.rglob("*")
        if file.suffix in {".py", ".json", ".typed"}
    }


def test_the_source_archive_holds_no_tests(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        found = {Path(name).relative_to(Path(name).parts[0]) for name in files.getnames()}
    assert {Path(name) for name in BUILT_FROM} <= found
    assert not [name for name in found if name.parts[:1] == ("tests",)]


class Laptop:
    """An environment with the wheel and its base dependencies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run sleb-serve."""
        return run([self.folder / "bin" / "sleb-serve", *arguments], HF_HUB_OFFLINE="1")

    def answer(self, *arguments: str | Path) -> str:
        """What sleb-serve prints; it must succeed."""
        found = self(*arguments)
        assert found.returncode == 0, found.stderr
        return found.stdout

    def refusal(self, *arguments: str | Path) -> str:
        """The one line with which sleb-serve ends."""
        found = self(*arguments)
        assert found.returncode == 2, found.stdout + found.stderr
        *said, line = found.stderr.splitlines()
        assert not any("Traceback" in other for other in said)
        return line


@pytest.fixture(scope="module")
def laptop(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    folder = tmp_path_factory.mktemp("laptop") / "venv"
    done([sys.executable, "-m", "venv", "--without-pip", folder])
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    install = [*pip, "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    (wheel,) = built.glob("*.whl")
    installed = run([*install, wheel])
    if installed.returncode and run([*install, "--dry-run", "--no-deps", "tqdm"]).returncode:
        pytest.skip("pip reaches no package index")
    assert installed.returncode == 0, installed.stderr
    there = {found.name.partition("-")[0].lower() for found in folder.rglob("*.dist-info")}
    assert "sleb_serve" in there
    assert not there & {"torch", "transformers", "numpy", "vllm"}
    return Laptop(folder)


@pytest.fixture(scope="module")
def manifest(laptop: Laptop, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest for the tiny Llama, imported on the laptop."""
    path = tmp_path_factory.mktemp("manifest") / "m.json"
    found = laptop("import", models("llama"), "[5, 2]", "-o", path)
    assert found.returncode == 0, found.stderr
    assert NOT_COMPARED in found.stderr
    return path


def test_a_manifest_is_shown(laptop: Laptop, manifest: Path) -> None:
    shown = json.loads(laptop.answer("show", manifest, "--json"))
    assert [entry["block"] for entry in shown["removed"]] == [5, 2]


def test_a_manifest_is_checked_and_what_was_not_compared_is_named(
    laptop: Laptop, manifest: Path, models: Models
) -> None:
    checked = laptop.answer("check", models("llama"), "-m", manifest, "--json", "--gpu", "L4")
    report = json.loads(checked)
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert report["passed"]
    assert findings["model"]["status"] == "ok"
    assert findings["layers"]["status"] == "warning"
    assert NOT_COMPARED in findings["layers"]["detail"]
    assert findings["vLLM"]["status"] == "unknown"


def test_the_command_of_a_server_is_printed(laptop: Laptop, manifest: Path, models: Models) -> None:
    found = laptop("serve", models("llama"), "-m", manifest, "--dry-run", "--port", "8001")
    assert found.returncode == 0, found.stderr
    assert NOT_COMPARED in found.stderr
    command = shlex.split(found.stdout)
    assert command[:3] == ["vllm", "serve", str(models("llama"))]
    overrides = json.loads(command[command.index("--hf-overrides") + 1])
    assert overrides["architectures"] == ["SlebLlamaForCausalLM"]


def test_an_export_is_the_model_without_its_blocks(
    laptop: Laptop, manifest: Path, models: Models, tmp_path: Path
) -> None:
    import torch

    laptop.answer("export", models("llama"), "-m", manifest, "-o", tmp_path / "short")
    prompt = torch.tensor([list(range(3, 40))]) % VOCABULARY
    with torch.no_grad():
        found = oracle.load(tmp_path / "short")(prompt).logits
        expected = oracle.pruned(models("llama"), (2, 5))(prompt).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_other_tools_forms_are_written(laptop: Laptop, manifest: Path, models: Models) -> None:
    arguments = ("export", models("llama"), "-m", manifest, "--format")
    assert laptop.answer(*arguments, "llama.cpp", "-o", "-") == "2,5\n"
    assert "passthrough" in laptop.answer(*arguments, "mergekit", "-o", "-")


def test_servers_are_asked(laptop: Laptop, manifest: Path) -> None:
    found = laptop("probe", "http://localhost:1", "-m", manifest)
    assert (found.returncode, found.stderr[:9]) == (1, "not ready")
    assert "no answer" in laptop.refusal(
        "canary", "--dense", "http://localhost:1", "--pruned", "http://localhost:1"
    )


def renamed(model: Path, folder: Path, **changes: object) -> Path:
    """A copy of a model with another config."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_an_unlisted_architecture_is_refused(
    laptop: Laptop, models: Models, tmp_path: Path
) -> None:
    model = renamed(models("llama"), tmp_path / "new", architectures=["NewForCausalLM"])
    line = laptop.refusal("import", model, "[5, 2]", "-o", tmp_path / "m.json")
    assert "NewForCausalLM is not in the support matrix of this release" in line
    assert SELECT in line
    assert not (tmp_path / "m.json").exists()


def test_no_config_is_written_of_which_transformers_makes_another_model(
    laptop: Laptop, models: Models, tmp_path: Path
) -> None:
    """Gemma 2's second layers are of another kind, by their number alone."""
    model = renamed(models("gemma2"), tmp_path / "gemma2", layer_types=None)
    laptop.answer("import", model, "[2]", "-o", tmp_path / "m.json")
    for form in ("transformers", "mergekit", "llama.cpp"):
        output = tmp_path / "short"
        line = laptop.refusal(
            "export", model, "-m", tmp_path / "m.json", "-o", output, "--format", form
        )
        assert "needs transformers: " + SELECT in line
        assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        ("select MODEL -o OUT --remove 1 --calibration python-docs", "select needs torch", SELECT),
        ("eval MODEL -m M.json --perplexity python-docs", "eval needs", SELECT),
        ("bench MODEL -m M.json -o OUT", "bench needs matplotlib", "'sleb-serve[bench]'"),
        ("report RECORDS", "report needs numpy", "'sleb-serve[bench]'"),
        ("plan --gpu here", "plan needs torch", SELECT),
        ("lm-eval --help", "lm-eval needs lm_eval", "'sleb-serve[eval]'"),
        ("serve MODEL -m M.json", "needs vllm", "'sleb-serve[cuda]'"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(
    arguments: str,
    what: str,
    hint: str,
    laptop: Laptop,
    manifest: Path,
    models: Models,
    tmp_path: Path,
) -> None:
    records = ROOT / "benchmarks" / "records" / "serving"
    shutil.copytree(records, tmp_path / "records")
    places = {
        "MODEL": models("llama"),
        "M.json": manifest,
        "OUT": tmp_path / "out",
        "RECORDS": tmp_path / "records",
    }
    line = laptop.refusal(*(places.get(part, part) for part in arguments.split()))
    assert what in line
    assert hint in line
    assert not (tmp_path / "out").exists()


def test_a_name_of_the_api_needs_no_extra(laptop: Laptop) -> None:
    code = "import sys; from sleb_serve import Manifest; print('tqdm' in sys.modules)"
    assert done([laptop.folder / "bin" / "python", "-c", code]) == "False\n"
