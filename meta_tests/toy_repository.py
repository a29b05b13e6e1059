"""A repository as a user has it: a package with attention of its own, and what ``init`` writes."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

from conformance.__main__ import main

ATTENTION = '''"""Attention in ten lines; the last query is at the position of the last key."""

import torch


def attention(q, k, v, causal, scale, mask):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(~visible.tril(k.shape[2] - q.shape[2]), -torch.inf)
    if mask is not None:
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if boolean else scores + mask
    return torch.softmax(scores, dim=-1) @ v
'''

RIGHT, WRONG = "tril(k.shape[2] - q.shape[2])", "tril()"
"""Where the causal mask is anchored: at the last key, and at the first."""

TO_FILL = 'raise NotImplementedError("attention: call your code here")'


def with_init(folder: Path, *options: str) -> Path:
    """A repository with the package ``toy``, in which ``init`` was run as a user runs it."""
    (folder / "toy").mkdir()
    (folder / "toy/__init__.py").write_text("")
    (folder / "toy/layers.py").write_text(ATTENTION)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["init", *options]) == 0
    finally:
        os.chdir(before)
    return folder


def fill_in(folder: Path) -> None:
    """Call the package from the adapter, and take the options out that it does not have."""
    file = folder / "conformance_adapter.py"
    text = file.read_text()
    begin, end = text.index("    causal: bool"), text.index(") -> Tensor")
    options = ("causal:", "scale:", "mask:")
    kept = [line for line in text[begin:end].splitlines(True) if line.strip().startswith(options)]
    text = text[:begin] + "".join(kept) + text[end:]
    assert TO_FILL in text
    call = "return layers.attention(q, k, v, causal, scale, mask)"
    text = text.replace(TO_FILL, call).replace("import annotations\n", IMPORT, 1)
    file.write_text(text)


IMPORT = "import annotations\n\nfrom toy import layers\n"


def plant(folder: Path) -> None:
    """Anchor the causal mask at the wrong corner."""
    file = folder / "toy/layers.py"
    text = file.read_text()
    assert RIGHT in text
    file.write_text(text.replace(RIGHT, WRONG))


def mend(folder: Path) -> None:
    """Take the mistake back."""
    file = folder / "toy/layers.py"
    file.write_text(file.read_text().replace(WRONG, RIGHT))
