"""What an installation brings."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def arguments(monkeypatch):
    found = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return found


def test_a_fairseq_comes_only_where_it_is_asked_for(arguments):
    """It would overwrite another one in silence."""
    assert arguments["install_requires"] and not [name for name in arguments["install_requires"] if "fairseq" in name]
    for extra in ("fairseq", "test"):
        assert [name for name in arguments["extras_require"][extra] if name.startswith("fairseq-fixed>=")]
    assert "fairseq-fixed==" in (ROOT / "constraints.txt").read_text()


def test_versions_runs_the_lower_bounds(arguments):
    """`tests/versions.sh oldest` holds pip to the bound of each requirement."""
    requirements = arguments["install_requires"] + arguments["extras_require"]["test"]
    wanted = dict(re.match(r"([\w-]+)>=([\d.]+)", each).groups() for each in requirements if ">=" in each)
    script = (ROOT / "tests/versions.sh").read_text()
    function = re.search(r"^constraints\(\) \{\n.*?^\}\n", script, re.M | re.S).group()
    command = f"python={sys.executable} root={ROOT}\n{function}\nconstraints "
    oldest = subprocess.run(["bash", "-c", f"{command}oldest"], capture_output=True, text=True, check=True).stdout
    found = dict(line.split("==") for line in oldest.split())
    assert found.pop("torchaudio") == found["torch"]
    assert found == {name: bound for name, bound in wanted.items() if name != "triton"}
    newest = subprocess.run(["bash", "-c", f"{command}newest"], capture_output=True, text=True, check=True).stdout
    assert newest.split() == []


def test_the_pythons_are_those_of_the_environments_script(arguments):
    assert arguments["python_requires"] == ">=3.11,<3.13"
    script = (ROOT / "scripts/setup_environment.sh").read_text()
    assert "not (3, 11) <= sys.version_info < (3, 13)" in script and "needs Python 3.11 or 3.12" in script
