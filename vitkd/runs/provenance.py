"""What results depend on besides the configuration: versions, code state, precision, hardware."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import vitkd


def provenance(device: torch.device) -> dict[str, Any]:
    """The entries of `metrics.json` about them."""
    return {
        "versions/vitkd": vitkd.__version__,
        "versions/python": platform.python_version(),
        **{f"versions/{name}": version(name) for name in ("torch", "lightning", "hydra-core")},
        **git_state(Path(vitkd.__file__).parent),
        "precision/float32_matmul": torch.get_float32_matmul_precision(),
        "hardware/device": device_name(device),
        "hardware/cpu_count": os.cpu_count(),
        "hardware/threads": torch.get_num_threads(),
        "hardware/platform": platform.platform(),
    }


def device_name(device: torch.device) -> str:
    """The accelerator's product name, or the processor's architecture."""
    is_cuda = device.type == "cuda"
    return torch.cuda.get_device_name(device) if is_cuda else f"{device.type} {platform.machine()}"


def git_state(package: Path) -> dict[str, Any]:
    """The commit of the checkout that holds `package` and whether it was changed; empty elsewhere."""
    if not (package.parent / ".git").exists():
        return {}
    git = ["git", "-C", str(package.parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git/commit": commit.stdout.strip(), "git/dirty": bool(changes.stdout.strip())}
