"""Two towers back into transformers' CLIP and SigLIP, whatever format they came in; what open_clip's way needs too.

What the tables of names do not hold (activation, epsilon, pooling) is read from the built model; whether the result is
whole is decided by the reference's own class, built from the written config on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from encoders import PatchConfig, TextConfig
from encoders.layers import ACTIVATIONS
from encoders.patch import PatchEncoder
from vlp.checkpoint.export import Exported, Exporter, other_look
from vlp.checkpoint.foreign import PREPROCESSOR_FILE
from vlp.checkpoint.hf_clip import CLIP_NAMES
from vlp.checkpoint.hf_siglip import SIGLIP_NAMES
from vlp.checkpoint.names import Pair, restore_pairs
from vlp.data.presets import hf_processor
from vlp.data.tokenizer import OpenClipTokenizer
from vlp.embed import EmbedSpace

if TYPE_CHECKING:
    from vlp.loaded import Loaded

_PARTS = ("vision.", "text.", "embed.main.")
_OURS_IN_HF = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


@dataclass(frozen=True)
class Tower:
    """Sizes of a tower as it was built."""

    width: int
    layers: int
    heads: int
    hidden: int
    activation: str
    eps: float


def vision_config(loaded: Loaded) -> PatchConfig:
    """Return the image tower's config."""
    return cast(PatchConfig, loaded.model.config.vision)


def text_config(loaded: Loaded) -> TextConfig:
    """Return the text tower's config."""
    return cast(TextConfig, loaded.model.config.text)


def vit_of(loaded: Loaded) -> Any:
    """Return timm's ViT."""
    return cast(PatchEncoder, loaded.model.vision).vit


def image_tower(loaded: Loaded) -> Tower:
    """Return the image tower's sizes."""
    vit = vit_of(loaded)
    block = vit.blocks[0]
    activation = _activation(block.mlp.act)
    sizes = vit.embed_dim, len(vit.blocks), block.attn.num_heads, block.mlp.fc1.out_features
    return Tower(*sizes, activation, block.norm1.eps)


def text_tower(loaded: Loaded) -> Tower:
    """Return the text tower's sizes."""
    text = text_config(loaded)
    hidden = text.hidden or 4 * text.width
    return Tower(text.width, text.layers, text.heads, hidden, text.activation, text.eps)


def _activation(module: Callable[[Tensor], Tensor]) -> str:
    """Name of an activation of timm's, known by what it gives."""
    at = torch.linspace(-4, 4, 65)
    return next((name for name, one in ACTIVATIONS.items() if torch.allclose(one(at), module(at), atol=1e-6)), "")


def space_of(loaded: Loaded) -> EmbedSpace:
    """Return the space in which the towers meet."""
    space = loaded.model.space()
    assert space is not None
    return space


def end_id(loaded: Loaded) -> int | None:
    """Return the id at whose first place a text is read; None: at its largest."""
    text = text_config(loaded)
    if text.pool == "last":
        return loaded.tokenizer.vocabulary.sep
    return text.eos if text.pool == "eos" else None


def first_problem(*checks: tuple[bool, str]) -> str | None:
    """Return what is said of the first check that holds."""
    return next((problem for holds, problem in checks if holds), None)


def towers_problem(loaded: Loaded) -> str | None:
    """Return why a model is not two towers of our own kinds that meet in one space."""
    model = loaded.model
    vision, text = model.config.vision, model.config.text
    problem = first_problem(
        (model.fusion is not None, "the model has a fusion"),
        (model.decoder is not None, "the model has a decoder"),
        (model.space() is None, "the model has no contrastive space"),
        (len(model.embed) > 1, "the model has several contrastive spaces"),
    )
    if problem is not None:
        return problem
    if not isinstance(vision, PatchConfig) or not isinstance(text, TextConfig):
        return f"its towers are {vision.kind} and {text.kind}, not patch and text"
    return first_problem(
        (text.norm != "pre" or text.embed_norm or text.segments > 0, "its text tower is BERT's kind"),
        (type(vit_of(loaded)).__name__ != "VisionTransformer", "its image tower is no plain ViT"),
        (text.layers == 0 or vision.depth == 0, "a tower has no blocks"),
        (vision.position_size is not None, "its images keep their aspect ratio"),
    )


def _clip_problem(loaded: Loaded) -> str | None:
    """Why two towers are not CLIP's."""
    if problem := towers_problem(loaded):
        return problem
    vision, text = vision_config(loaded), text_config(loaded)
    image = image_tower(loaded)
    return first_problem(
        (not vision.class_token or vision.pool not in (None, "class"), "its image is not pooled at a class token"),
        (isinstance(vit_of(loaded).norm_pre, nn.Identity), "its image tower has no norm before the blocks"),
        (not text.causal, "its text tower is not causal"),
        (text.pool not in ("largest", "eos", "last"), f"its texts are pooled by {text.pool}"),
        (space_of(loaded).logit_bias is not None, "its logits have a bias"),
        (not image.activation, "its activation is unknown"),
    )


def _hf_clip_problem(loaded: Loaded) -> str | None:
    # transformers takes the id 2 for a sign of old configs and reads the largest id then.
    return _clip_problem(loaded) or first_problem(
        (end_id(loaded) == 2, "its texts end with the id 2, which CLIPModel misreads")
    )


def _siglip_problem(loaded: Loaded) -> str | None:
    """Why two towers are not SigLIP's."""
    if problem := towers_problem(loaded):
        return problem
    vision, text = vision_config(loaded), text_config(loaded)
    embed = loaded.model.config.embed
    return first_problem(
        (vision.class_token or vision.pool != "map", "its image is not pooled by attention"),
        (text.causal or text.pool != "end", "its text is not read at its last place without a causal mask"),
        (embed.image != "none" or embed.text != "linear", "other sides than the text are projected"),
        (embed.logit_bias is None, "its logits have no bias"),
        (image_tower(loaded).activation != text.activation, "its towers have unlike activations"),
    )


def taken_weights(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the towers' weights, and the names of all others: heads of further objectives, a teacher."""
    taken = {name: tensor for name, tensor in state.items() if name.startswith(_PARTS)}
    return taken, tuple(name for name in state if name not in taken)


def check_whole(found: Mapping[str, Tensor], build: Callable[[], nn.Module], what: str) -> None:
    """Compare names and shapes with those of the reference's class.

    Raises:
        ValueError: they differ.
    """
    with torch.device("meta"):
        wanted = {name: tuple(one.shape) for name, one in build().state_dict().items()}
    ours = {name: tuple(one.shape) for name, one in found.items()}
    if wrong := sorted(name for name in wanted.keys() | ours.keys() if wanted.get(name) != ours.get(name)):
        name = wrong[0]
        raise ValueError(
            f"{what} has {name} as {wanted.get(name, 'nothing')}, the model as {ours.get(name, 'nothing')}"
        )


def _hf_tower(tower: Tower) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.hidden,
        "hidden_act": _OURS_IN_HF[tower.activation],
        "layer_norm_eps": tower.eps,
    }


def _hf(
    state: Mapping[str, Tensor], loaded: Loaded, kind: str, names: tuple[Pair, ...], text: dict[str, Any]
) -> Exported:
    """The state and configs of transformers' ``CLIP`` or ``Siglip``."""
    import transformers

    taken, left_out = taken_weights(state)
    found = restore_pairs(names, taken)
    vision, words = vision_config(loaded), text_config(loaded)
    sides = {"image_size": vision.image_size, "patch_size": vit_of(loaded).patch_embed.patch_size[0]}
    config = {
        "architectures": [f"{kind}Model"],
        "model_type": kind.lower(),
        "projection_dim": space_of(loaded).width,
        "text_config": {
            "model_type": f"{kind.lower()}_text_model",
            "vocab_size": len(state["text.embeddings.word.weight"]),
            **_special_ids(loaded),
            "max_position_embeddings": words.max_length,
            **_hf_tower(text_tower(loaded)),
            **text,
        },
        "vision_config": {"model_type": f"{kind.lower()}_vision_model", **sides, **_hf_tower(image_tower(loaded))},
    }
    model = getattr(transformers, f"{kind}Model")
    check_whole(found, lambda: model(getattr(transformers, f"{kind}Config")(**config)), f"transformers' {kind}Model")
    processor = image_processor(loaded, kind)
    left_out += other_look(loaded.config.data.transform, hf_processor(processor).transform)
    return Exported(found, config, {PREPROCESSOR_FILE: processor}, _save_clip_words(loaded), left_out)


def _special_ids(loaded: Loaded) -> dict[str, int | None]:
    """The ids that begin, end and pad texts; none where the tokenizer is not at hand."""
    try:
        words = loaded.tokenizer.vocabulary
    except ValueError:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {"bos_token_id": words.cls, "eos_token_id": words.sep, "pad_token_id": words.pad}


def image_processor(loaded: Loaded, kind: str) -> dict[str, Any]:
    """Return what the model's images go through as the preprocessor_config.json of ``CLIP`` or ``Siglip``."""
    transform, vision = loaded.config.data.transform, vision_config(loaded)
    side, crop = vision.image_size, transform.resize == "shortest"
    scaled = round(side / transform.crop_share)
    square = {"height": side, "width": side}
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": scaled} if crop else square,
        "resample": {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}[
            transform.interpolation
        ],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.mean or ()),
        "image_std": list(vision.std or ()),
        **({"do_center_crop": crop, "crop_size": square} if kind == "CLIP" else {}),
    }


def _save_clip_words(loaded: Loaded) -> Callable[[Path], None] | None:
    """Write CLIP's byte pairs as a tokenizer of transformers, which open_clip ships in another form."""
    try:
        tokenizer = loaded.tokenizer
    except ValueError:
        return None
    if not isinstance(tokenizer, OpenClipTokenizer):
        return None
    return lambda folder: tokenizer.as_transformers().save_pretrained(str(folder))


def _hf_clip(state: Mapping[str, Tensor], loaded: Loaded) -> Exported:
    end = end_id(loaded)
    # The largest id is the last word: <end_of_text>. The number 2 asks for the largest whatever the vocabulary.
    return _hf(state, loaded, "CLIP", CLIP_NAMES, {"eos_token_id": 2 if end is None else end})


def _hf_siglip(state: Mapping[str, Tensor], loaded: Loaded) -> Exported:
    return _hf(state, loaded, "Siglip", SIGLIP_NAMES, {"projection_size": space_of(loaded).width})


EXPORTERS = (
    Exporter("hf_clip", "hf", _hf_clip_problem, _hf_clip),
    Exporter("hf_siglip", "hf", _siglip_problem, _hf_siglip),
)
