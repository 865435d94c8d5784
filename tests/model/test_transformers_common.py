"""The common model tests of transformers pass for both classes, as they do for ViT.

They are not in its wheel. The source distribution of the installed version is therefore fetched from the package index,
once, into pytest's cache.
"""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers


@pytest.fixture
def common_tests(pytestconfig):
    """The `tests` folder of the installed version's source distribution."""
    version = transformers.__version__
    folder = pytestconfig.cache.mkdir("transformers-sdist")
    archive = folder / f"transformers-{version}.tar.gz"
    if not archive.exists():
        download = [sys.executable, "-m", "pip", "download", f"transformers=={version}", "--no-deps"]
        result = subprocess.run([*download, "--no-binary=:all:", f"--dest={folder}"], capture_output=True, text=True)
        if result.returncode and "CI" not in os.environ:
            pytest.skip(f"transformers' source distribution can't be fetched: {result.stderr.splitlines()[-1]}")
        assert result.returncode == 0, result.stderr
    with tarfile.open(archive) as distribution:
        prefix = f"transformers-{version}/tests/"
        members = [member for member in distribution.getmembers() if member.name.startswith(prefix)]
        distribution.extractall(folder, members, filter="data")
    return folder / prefix


@pytest.mark.slow
def test_the_common_tests_of_transformers_pass(common_tests):
    file = Path(__file__).parents[1] / "support" / "transformers_common.py"
    command = [sys.executable, "-m", "pytest", str(file), "--quiet", "-p", "no:cacheprovider"]
    command += ["-o", "filterwarnings=", "-o", "addopts="]  # their warnings and markers are theirs
    environment = os.environ | {"TRANSFORMERS_TESTS": str(common_tests)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
    passed = int(re.search(r"(\d+) passed", result.stdout)[1])
    assert passed >= 90  # of ViT's, 96 run on a CPU without optional packages
