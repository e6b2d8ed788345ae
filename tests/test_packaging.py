"""`pip install .`: the library alone, and its version."""

import re
import subprocess
import sys
import zipfile

import torch
from conftest import ROOT

import sparsity_factory


def test_the_wheel_holds_the_library_alone_and_its_version(tmp_path):
    options = [
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "--wheel-dir",
        str(tmp_path / "wheel"),
    ]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "sparsity_factory", "utils", "trainer"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)

    (wheel,) = (tmp_path / "wheel").iterdir()
    assert wheel.name.startswith(f"sparsify_deit-{sparsity_factory.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        required = re.findall(
            "^Requires-Dist: ([a-z]+)", archive.read(metadata).decode(), re.MULTILINE
        )
    modules = {f"sparsity_factory/{path.name}" for path in (ROOT / "sparsity_factory").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "sparsity_factory/tiles.cpp" in names
    assert required == ["torch", "numpy", "pyyaml"]


def test_the_library_is_imported_without_what_the_rest_of_the_project_needs():
    others = ["timm", "torchvision", "matplotlib", "PIL", "trainer", "utils"]
    code = f"import sys; sys.modules |= dict.fromkeys({others}); import sparsity_factory"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_citation_has_the_version():
    assert f"\nversion: {sparsity_factory.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_checkpoint_says_which_version_wrote_it(run_main, tiny, tmp_path):
    run_main(*tiny, "--output_dir", "run")
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert checkpoint["version"] == sparsity_factory.__version__
