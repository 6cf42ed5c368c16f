"""Write `format_N/`, a tiny checkpoint of the present config format, and what its model says (`format_N.json`).

Run once for each format, before the commit that raises `vlp.recipes.FORMAT`, and never again for an old one:

    PYTHONPATH=.:tests python tests/vlp/checkpoint/write_format.py
"""

import json
from pathlib import Path

from checkpoints import CAPTIONS, save
from PIL import Image

import vlp
from encoders import PatchConfig, TextConfig
from objectives import ItcConfig, ItmConfig
from vlp.fusion.dual import DualStreamConfig
from vlp.model import EmbedConfig, ModelConfig, build_model
from vlp.recipes import FORMAT


def describe(loaded: vlp.Loaded) -> dict[str, list]:
    """Embeddings and matching probabilities of a fixed image and the captions."""
    image = Image.linear_gradient("L").resize((20, 12))
    return {
        "image": loaded.embed_images([image])[0].tolist(),
        "texts": loaded.embed_texts(CAPTIONS).tolist(),
        "match": loaded.match([image] * len(CAPTIONS), CAPTIONS).tolist(),
    }


def main() -> None:
    """Write both."""
    sizes = {"width": 16, "layers": 1, "heads": 2}
    vision = PatchConfig(model="vit_tiny_patch16_224", image_size=16, patch_size=8, width=16, depth=1, heads=2)
    text = TextConfig(**sizes, vocabulary_size=50, max_length=8)
    config = ModelConfig(vision=vision, text=text, fusion=DualStreamConfig(**sizes), embed=EmbedConfig(width=4))
    folder = Path(__file__).parent / f"format_{FORMAT}"
    save(folder, build_model(config, {"itc": ItcConfig(), "itm": ItmConfig()}, seed=1))
    folder.with_suffix(".json").write_text(json.dumps(describe(vlp.load(folder))) + "\n")


if __name__ == "__main__":
    main()
