"""Virtual environments for the peers, made once: those whose pins do not clash share one."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from reference.stored import cached, made_whole

OURS = (
    "torch==2.13.0",
    "einops==0.8.2",
    "jaxtyping==0.3.11",
    "rich==15.0.0",
    "safetensors==0.8.0",
    "tqdm==4.70.1",
    "typer==0.29.2",
    "typing-extensions==4.16.0",
)
"""What this benchmark and `actsteer` need in each of them; both are read from this checkout."""

ENVIRONMENTS = {
    "transformers-4": (*OURS, "transformers==4.57.6", "numpy==1.26.4", "steering-vectors==0.12.2", "repeng==0.4.0"),
    "transformers-5": (
        *OURS,
        "transformers==5.24.0",
        "numpy==2.4.6",
        "nnsight==0.8.1",
        "pyvene==0.1.8",
        "tdhook==0.3.0",
    ),
    "transformer-lens": (*OURS, "transformers==5.9.0", "numpy==2.4.6", "transformer-lens==4.3.0"),
    "cast": (
        *(need for need in OURS if not need.startswith(("rich", "typer"))),
        "transformers==4.57.6",
        "activation-steering @ git+https://github.com/IBM/activation-steering@52be60235ee309b46c49d6d5877f36e20c52e6ab",
    ),
}
"""Name -> requirements. steering-vectors wants transformers before 5, repeng numpy before 2, CAST rich before 14; the
decoding of TransformerLens 4.3.0 with a cache is another one than the model's with transformers 5.24, and the same with
5.9."""

PLACES = {
    "steering-vectors": "transformers-4",
    "repeng": "transformers-4",
    "TransformerLens": "transformer-lens",
}
"""Peer -> its environment; all others run in transformers-5."""


def environment_of(peer: str) -> str:
    """The name of the environment in which a peer runs."""
    return PLACES.get(peer, "transformers-5")


def python_of(name: str) -> Path:
    """The interpreter of an environment, which is made first where it is not there: minutes, and gigabytes.

    Raises:
        subprocess.CalledProcessError: it could not be made; what the installer says is on the standard error.
    """
    requirements = ENVIRONMENTS[name]
    digest = hashlib.sha256("\n".join((sys.version, *requirements)).encode()).hexdigest()[:8]
    home = folder() / f"{name}-{digest}"  # other requirements make another environment
    if not home.exists():
        print(f"making the environment {name} in {home}, once", file=sys.stderr)
        made_whole(home, partial(_make, requirements))
    return home / "bin" / "python"


def folder() -> Path:
    """Where the environments lie: `$ACTSTEER_PEERS`, or this user's cache."""
    return Path(os.environ.get("ACTSTEER_PEERS") or cached("peers"))


def _make(requirements: tuple[str, ...], home: Path) -> None:
    python, uv = str(home / "bin" / "python"), shutil.which("uv")
    if uv is not None:
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(home)], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", python]
    else:
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *requirements], check=True)
