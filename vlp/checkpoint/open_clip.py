"""open_clip's and OpenAI's CLIP, open_clip's SigLIP, and its other image towers of timm with a text transformer.

A folder's open_clip_config.json (or `config=` with its keys) says what the names and shapes cannot: heads, activation,
epsilon, pooling. OpenAI's own files hold three more scalars, by which they are known and get their QuickGELU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm

from vlp.checkpoint.clip import (
    HEAD_WIDTH,
    IMAGE_BLOCK,
    IMAGE_PROJECTION,
    QUERY_KEY_VALUE,
    TEXT_BLOCK,
    TEXT_PROJECTION,
    TOWER,
    clip_words,
    image_pairs,
    patch_tower,
    scalar_pairs,
    sigmoid_loss,
    softmax_loss,
    text_tower,
    two_towers,
)
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers
from vlp.checkpoint.names import Names, Pair, blocks, rename_pairs, transposed
from vlp.data.presets import openclip

_SCALARS = ("input_resolution", "context_length", "vocab_size")
_IGNORED = dict.fromkeys(_SCALARS, "a number that the shapes say too") | {r"(text\.)?attn_mask": "a buffer"}
_TRUNK = "visual.trunk."
_GRID = "vision.body."
_CLASSIFIERS = ("head", "head.fc", "fc")
_ACT: tuple[Any, ...] = (None, {}, {"approximate": "tanh"})
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "vision_cfg": {
        "attentional_pool": (False,),
        "no_ln_pre": (False,),
        "final_ln_after_pool": (False,),
        "pool_type": ("tok",),
        "block_type": (None,),
        "act_kwargs": _ACT,
        "timm_pool": ("", "avg", "token", "tok", "map"),
        "timm_proj": ("", "linear", "none"),
    },
    "text_cfg": {
        "embed_cls": (False,),
        "hf_model_name": (None,),
        "block_type": (None,),
        "act_kwargs": _ACT,
        "pool_type": ("argmax", "last", "first", "eos"),
    },
}
"""Traits of open_clip's towers, and the values of them that are read here."""
_POOLS = {"argmax": "largest", "last": "end", "first": "cls", "eos": "eos"}


def image_names() -> tuple[Pair, ...]:
    """Return the names of open_clip's own ViT."""
    block: dict[Names, Names] = {
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn.in_proj_{p}": "attn.qkv.{p}",
        "attn.out_proj": "attn.proj",
    }
    theirs = "visual.transformer.resblocks.{n}."
    return (
        Pair("visual.conv1.weight", TOWER + "patch_embed.proj.weight"),
        *image_pairs("visual.", "positional_embedding", "class_embedding", ("ln_pre", "ln_post")),
        *blocks(theirs, IMAGE_BLOCK, {**block, "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}),
        *(Pair(f"{theirs}ls_{n}.gamma", f"{IMAGE_BLOCK}ls{n}.gamma") for n in (1, 2)),
        Pair("visual.proj", IMAGE_PROJECTION + "weight", **transposed()),
    )


def trunk_names(ours: str) -> tuple[Pair, ...]:
    """Return the names of an image tower of timm, which is called ``ours`` here."""
    # Without a projection of open_clip's it is the model's own classifier, which timm's families call differently.
    projections = ("visual.head.proj", *(_TRUNK + name for name in _CLASSIFIERS))
    return (
        *(Pair(name + ".{p}", IMAGE_PROJECTION + "{p}") for name in projections),
        Pair(_TRUNK + "{rest}", ours + "{rest}"),
    )


def text_names(prefix: str, linear: bool) -> tuple[Pair, ...]:
    """Return the names of open_clip's text transformer.

    Args:
        prefix: "text." in its models with towers of their own, else "".
        linear: the projection is a linear layer with a bias, not a matrix.
    """
    block: dict[Names, Names] = {
        "ln_1": "attention_norm",
        "ln_2": "feed_norm",
        "attn.in_proj_{p}": tuple(f"{name}.{{p}}" for name in QUERY_KEY_VALUE),
        "attn.out_proj": "attention.out",
        "mlp.c_fc": "feed.up",
        "mlp.c_proj": "feed.down",
    }
    matrix = Pair(prefix + "text_projection", TEXT_PROJECTION + "weight", **transposed())
    return (
        Pair(prefix + "token_embedding.weight", "text.embeddings.word.weight"),
        Pair(prefix + "positional_embedding", "text.embeddings.position.weight"),
        *blocks(prefix + "transformer.resblocks.{n}.", TEXT_BLOCK, block),
        Pair(prefix + "ln_final.{p}", "text.final_norm.{p}"),
        Pair(prefix + "text_projection.{p}", TEXT_PROJECTION + "{p}") if linear else matrix,
    )


def _prefix(names: Mapping[str, Any]) -> str:
    return "text." if "text.token_embedding.weight" in names else ""


def _model_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's part of open_clip_config.json, or what was given as one."""
    found = config.get("model_cfg", config)
    return found if isinstance(found, Mapping) else {}


def _check(shapes: Shapes, model: Mapping[str, Any]) -> None:
    """Refuse towers that are not read here.

    Raises:
        ValueError: it is one.
    """
    if "visual.layer1.0.conv1.weight" in shapes:
        raise ValueError("the image tower is CLIP's own ResNet, which vlp does not read; take a ViT or a timm tower")
    if "text.transformer.embeddings.word_embeddings.weight" in shapes:
        raise ValueError(
            "the text tower is transformers' within open_clip, which vlp does not read; load it as hf_text"
        )
    for part, traits in _ONLY.items():
        for name, known in traits.items():
            value = (model.get(part) or {}).get(name, known[0])
            if value not in known and (value or known[0]):
                raise ValueError(f"open_clip's {part}.{name} {value!r} is not read by vlp; only {known[0]!r} is")


def _activation(tower: Mapping[str, Any], quick: bool) -> str:
    """Of one of open_clip's own towers."""
    return "quick_gelu" if quick else "gelu_tanh" if tower.get("act_kwargs") else "gelu"


def _vision(shapes: Shapes, model: Mapping[str, Any], config: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    tower = model.get("vision_cfg") or {}
    preset = openclip(config.get("preprocess_cfg") or {})
    if "visual.conv1.weight" not in shapes:
        return _trunk(shapes, tower, preset.mean, preset.std)
    width = shapes["visual.conv1.weight"][0]
    found = patch_tower(
        shapes,
        "visual.conv1.weight",
        "visual.positional_embedding",
        layers=count_layers(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
        heads=width // tower.get("head_width", HEAD_WIDTH) or 1,
        hidden=shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        activation=_activation(tower, quick),
        eps=(tower.get("norm_kwargs") or {}).get("eps", 1e-5),
        preset=preset,
        resize="bicubic_antialias",
        stated=tower.get("image_size"),
    )
    if "visual.transformer.resblocks.0.ls_1.gamma" in shapes:
        found["arguments"]["init_values"] = tower.get("ls_init_value") or 1.0
    return found


def _trunk(shapes: Shapes, tower: Mapping[str, Any], mean: Any, std: Any) -> dict[str, Any]:
    """`model.vision` of a timm tower: a ViT by its own name, if timm has it, else by its shapes; a CNN as a grid."""
    name = tower.get("timm_model_name", "")
    known = timm.is_model(name)
    patches, positions = shapes.get(_TRUNK + "patch_embed.proj.weight"), shapes.get(_TRUNK + "pos_embed")
    if patches is None or positions is None:
        if not known:
            raise ValueError(
                f"open_clip's vision_cfg.timm_model_name {name!r} is no model of timm's; give it in config="
            )
        size = tower.get("image_size", 224)
        return {"kind": "grid", "model": name, "image_size": size, "mean": mean, "std": std}
    classes = _TRUNK + "cls_token" in shapes
    attends = _TRUNK + "attn_pool.latent" in shapes
    common = {"class_token": classes, "mean": mean, "std": std} | ({"pool": "map"} if attends else {})
    found = patch_tower(
        shapes,
        _TRUNK + "patch_embed.proj.weight",
        _TRUNK + "pos_embed",
        layers=count_layers(shapes, r"visual\.trunk\.blocks\.(\d+)\."),
        heads=max(1, patches[0] // HEAD_WIDTH),
        hidden=shapes.get(_TRUNK + "blocks.0.mlp.fc1.weight", (4 * patches[0],))[0],
        activation="gelu",
        eps=1e-6,
        preset=openclip({}),
        class_token=classes,
        resize="bicubic_antialias",
        stated=tower.get("image_size"),
    )
    if known:
        return {"kind": "patch", "model": name, "image_size": found["image_size"], **common}
    before = "clip_224" if _TRUNK + "norm_pre.weight" in shapes else "siglip_224" if attends else "224"
    return found | common | {"model": f"vit_base_patch16_{before}"}


def _text(shapes: Shapes, model: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    tower, prefix = model.get("text_cfg") or {}, _prefix(shapes)
    words = shapes[prefix + "token_embedding.weight"]
    pool = _POOLS[tower.get("pool_type", "argmax")]
    return text_tower(
        words,
        shapes[prefix + "positional_embedding"][0],
        layers=count_layers(shapes, prefix.replace(".", r"\.") + r"transformer\.resblocks\.(\d+)\."),
        heads=tower.get("heads", 8 if tower else max(1, words[1] // HEAD_WIDTH)),
        hidden=shapes[prefix + "transformer.resblocks.0.mlp.c_fc.weight"][0],
        activation=_activation(tower, quick),
        eps=(tower.get("norm_kwargs") or {}).get("eps", 1e-5),
        pool=pool,
        causal=not tower.get("no_causal_mask", False),
        eos=tower.get("eos_id", 2) if pool == "eos" else None,
    )


def _embed(shapes: Shapes, text: Mapping[str, Any]) -> dict[str, Any]:
    prefix = _prefix(shapes)
    matrix, linear = shapes.get(prefix + "text_projection"), shapes.get(prefix + "text_projection.weight")
    width = matrix[1] if matrix else linear[0] if linear else text["width"]
    found = {
        "width": width,
        "bias": _biased(shapes, prefix),
        "image": "linear" if "visual.proj" in shapes or _projected(shapes, "weight") else "none",
        "text": "linear" if matrix or linear else "none",
    }
    return found | ({"temperature": 0.1, "logit_bias": -10.0} if "logit_bias" in shapes else {})


def _projected(shapes: Shapes, part: str) -> bool:
    """Whether a timm tower's projection has a weight or bias."""
    return any(f"{name}.{part}" in shapes for name in ("visual.head.proj", *(_TRUNK + one for one in _CLASSIFIERS)))


def _biased(shapes: Shapes, prefix: str) -> bool | str:
    """Which projections have a bias."""
    image, text = _projected(shapes, "bias"), prefix + "text_projection.bias" in shapes
    return image if image == text else "image" if image else "text"


def _words(model: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """`data.tokenizer`: CLIP's own, or the one on the hub that the config names."""
    tower = model.get("text_cfg") or {}
    found = clip_words(text["vocabulary_size"])
    if name := tower.get("hf_tokenizer_name"):
        found = {"source": name, "clean": (tower.get("tokenizer_kwargs") or {}).get("clean", "whitespace")}
    return found if text["causal"] else {**found, "fixed_length": text["max_length"]}


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    model = _model_config(config)
    _check(shapes, model)
    openai = any(name in shapes for name in _SCALARS)
    quick = bool(model.get("quick_gelu", openai))
    vision, text = _vision(shapes, model, config, quick), _text(shapes, model, quick)
    loss = sigmoid_loss() if "logit_bias" in shapes else softmax_loss()
    preset = openclip(config.get("preprocess_cfg") or {})
    assumed = []
    if not model.get("vision_cfg"):
        act = "quick_gelu, as OpenAI's" if openai else "gelu (config={'quick_gelu': True} for OpenAI's weights)"
        assumed.append(
            f"no open_clip_config.json: heads of width 64, epsilon 1e-5, {act if 'quick_gelu' not in model else ''}"
        )
    elif vision["kind"] == "patch" and "heads" in vision and "visual.conv1.weight" not in shapes:
        assumed.append("timm does not know the image tower: heads of width 64, gelu, epsilon 1e-6")
    if not config.get("preprocess_cfg"):
        assumed.append("image preprocessing of OpenAI's CLIP (no preprocess_cfg)")
    tree = two_towers(vision, text, _embed(shapes, text), loss, preset, _words(model, text))
    return Recipe(tree, tuple(assumed))


def _rename(state: State) -> Renamed:
    prefix = _prefix(state)
    if "visual.conv1.weight" in state:
        image = image_names()
    else:
        image = trunk_names(TOWER if _TRUNK + "pos_embed" in state else _GRID)
    text = text_names(prefix, linear=prefix + "text_projection.weight" in state)
    axes = state["logit_scale"].dim() if "logit_scale" in state else 0
    return rename_pairs((*image, *text, *scalar_pairs(axes=axes)), state, _IGNORED)


def _recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    image = "visual.conv1.weight" in shapes or any(name.startswith(_TRUNK) for name in shapes)
    coca = any(name.startswith("text_decoder.") for name in shapes)
    text = {
        "token_embedding.weight",
        "text.token_embedding.weight",
        "text.transformer.embeddings.word_embeddings.weight",
    }
    return image and bool(text & shapes.keys()) and not coca


FAMILY = Family("open_clip", _recognise, _recipe, _rename)
