"""The launcher installs jax for the accelerator that the machine's driver can run."""

import os
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "scripts" / "setup.sh"


def asked(folder, driver="", **environment):
    """What `accelerator` prints, and its complaint, where nvidia-smi prints `driver`; none if it is empty."""
    if driver:
        tool = folder / "nvidia-smi"
        tool.write_text(
            f"#!/bin/sh\necho '| NVIDIA-SMI 570.1  Driver Version: 570.1  {driver} |'\n"
        )
        tool.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    found = subprocess.run(
        ["bash", "-c", f"set -euo pipefail; root=/; . {SETUP}; accelerator"],
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
    )
    return found.stdout.strip(), found.stderr.strip(), found.returncode


@pytest.mark.parametrize(
    ("driver", "extra"),
    [
        ("CUDA Version: 12.8", "cuda12"),
        ("CUDA Version: 13.0", "cuda13"),
        ("CUDA Version: N/A", ""),
        ("", ""),
    ],
)
def test_the_driver_decides(driver, extra, tmp_path):
    assert asked(tmp_path, driver) == (extra, "", 0)


def test_a_variable_decides_first(tmp_path):
    assert asked(tmp_path, "CUDA Version: 12.8", JAXPG_JAX="cpu") == ("", "", 0)
    assert asked(tmp_path, JAXPG_JAX="tpu") == ("tpu", "", 0)
    said = "jaxpg: JAXPG_JAX=gpu must be cpu, cuda12, cuda13 or tpu"
    assert asked(tmp_path, JAXPG_JAX="gpu") == ("", said, 2)


def test_an_old_driver_is_said(tmp_path):
    extra, said, status = asked(tmp_path, "CUDA Version: 11.4")
    assert (extra, status) == ("", 0) and "CUDA 11 and jax needs 12" in said
