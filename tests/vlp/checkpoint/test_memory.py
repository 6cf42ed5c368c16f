"""Loading a large foreign file holds one copy of it: the stored one is mapped, not read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import os, sys, threading, time
import vlp

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

small, large, weights = sys.argv[1:]
vlp.load(small)  # libraries are imported now
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
loaded = vlp.load(large)
done.set()
thread.join()
print((peak[0] - before) / os.path.getsize(weights))
"""


def clip(folder: Path, width: int, layers: int) -> Path:
    """A transformers CLIP with a vision tower of these sizes."""
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "image_size": 32}
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 99}, vision_config=vision))
    model.to_empty(device="cpu").save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's memory counters")
@pytest.mark.parametrize("format", ["safetensors", "pickle"])
def test_loading_peaks_below_a_third_more_than_the_file(tmp_path: Path, format: str) -> None:
    small, large = clip(tmp_path / "small", 24, 1), clip(tmp_path / "large", 768, 8)
    weights = large / "model.safetensors"
    if format == "pickle":
        from safetensors.torch import load_file

        torch.save(load_file(weights), large / "pytorch_model.bin")
        weights.unlink()
        weights = large / "pytorch_model.bin"
    assert weights.stat().st_size > 200e6, "too small to tell it from the libraries' own memory"
    command = [sys.executable, "-c", PROGRAM, str(small), str(large), str(weights)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 1.3, found.stdout
