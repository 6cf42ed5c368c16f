"""BEiT-3 (Wang et al. 2022) as released: pretrained, with contrastive finetuning, and finetuned for every task.

The released models are not the paper's giant: attention and norms are per modality, and no feed-forward is of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.foreign import Family, Recipe, Renamed, Rule, Shapes, State, count_layers, rename_by

_LAYERS = r"beit3\.encoder\.layers\.(\d+)\."
_POSITIONS = "beit3.encoder.embed_positions"
_UNUSED = 2
"""First rows of the position tables, which fairseq's habit leaves unused."""


def _recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    return "beit3.encoder.layers.0.ffn.A.fc1.weight" in shapes


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    assumed: list[str] = []
    width, _, patch, _ = shapes["beit3.vision_embed.proj.weight"]
    heads = int(_literal(config, assumed, "encoder_attention_heads", max(4, width // 64)))
    eps = float(_literal(config, assumed, "layernorm_eps", 1e-5))
    side = math.isqrt(shapes[f"{_POSITIONS}.A.weight"][0] - _UNUSED - 1) * patch
    vision: dict[str, Any] = {"image_size": side, "patch_size": patch, "width": width, "depth": 0}
    vision |= {"mean": [0.5] * 3, "std": [0.5] * 3, "position_resize": "bicubic"}
    text = {
        "width": width,
        "layers": 0,
        "heads": heads,
        "vocabulary_size": shapes["beit3.text_embed.weight"][0],
        "max_length": shapes[f"{_POSITIONS}.B.weight"][0] - _UNUSED,
        "position_offset": _UNUSED,
        "segments": 0,
        "embed_norm": False,
    }
    fusion = {
        "kind": "multiway",
        "layers": count_layers(shapes, _LAYERS),
        "hidden": shapes["beit3.encoder.layers.0.ffn.A.fc1.weight"][0],
        "norm": "pre",
        "eps": eps,
        "decoupled": True,
        "sub_norm": "beit3.encoder.layers.0.self_attn.inner_attn_ln.A.weight" in shapes,
        "final_norm": "beit3.encoder.layer_norm.A.weight" in shapes,
        "pooler": "cls",
    }
    objectives, more = _task(shapes)
    classifies = "classify" in objectives
    if classifies:  # finetuned on ImageNet, with its statistics
        vision |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    tree = {
        "model": {
            "vision": vision,
            "text": text,
            "fusion": fusion | more,
            "embed": {"width": width, "bias": False},
        },
        "objectives": objectives,
        "data": {
            "max_length": 64,
            "tokenizer": {"source": "beit3.spm"},
            "transform": {"image_size": side, "resampler": "pillow"},
        },
    }
    return Recipe(tree, tuple(assumed))


def _literal(config: Mapping[str, Any], assumed: list[str], key: str, published: Any) -> Any:
    """The authors' own setting, else what they published."""
    if key in config:
        return config[key]
    assumed.append(f"{key} {published}")
    return published


def _task(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Objectives whose heads the file holds, as the authors trained them, and the fusion's settings for them."""
    if "language_head.weight" in shapes:
        return {"itc": {"positives": "diagonal", "max_scale": math.inf}}, {}
    if "pooler.dense.weight" in shapes:
        names = [f"answer {n}" for n in range(shapes["head.3.weight"][0])]
        return {"answer": {"answers": names}}, {"pooler": "tanh", "pooler_side": "image", "pooler_norm": True}
    if "head.dense1.weight" in shapes:
        answer = {"answers": ["False", "True"], "loss": "ce", "head": "norm_mlp"}
        return (
            {"relate": {"kind": "answer"} | answer | {"hidden": shapes["head.dense1.weight"][0]}},
            {"pooler": "cls_both", "images": "each"},
        )
    if "fc_norm.weight" in shapes:
        names = [f"class {n}" for n in range(shapes["head.weight"][0])]
        return {"classify": {"classes": names, "pool": "patches", "norm": True}}, {}
    if "mlm_head.weight" in shapes and "mim_head.weight" not in shapes:
        return {"seq2seq_mlm": {"label_smoothing": 0.1, "drop_worst": 0.2, "head": "linear", "tied": False}
                | {"drop_worst_after": 12_000 * 256}}, {}  # fmt: skip
    if "mlm_head.weight" in shapes:
        return {"mlm": {"mask_probability": 0.5, "head": "linear", "tied": False}}, {}
    return {}, {}


def _ways(theirs: str, ours: str) -> list[Rule]:
    """One layer's A and B, `.weight` and `.bias`."""
    return [
        Rule(rf"{_LAYERS}{theirs}\.{way}\.(weight|bias)", rf"fusion.blocks.\1.{ours}.{modality}.\2")
        for way, modality in (("A", "image"), ("B", "text"))
    ]


def _feeds(theirs: str, ours: str) -> list[Rule]:
    """One layer of the feed-forwards A and B."""
    return [
        Rule(rf"{_LAYERS}ffn\.{way}\.{theirs}\.(weight|bias)", rf"fusion.blocks.\1.feed.{modality}.{ours}.\2")
        for way, modality in (("A", "image"), ("B", "text"))
    ]


_RULES = (
    Rule(r"beit3\.text_embed\.weight", "text.embeddings.word.weight"),
    Rule(r"beit3\.vision_embed\.cls_token", "vision.vit.cls_token"),
    Rule(r"beit3\.vision_embed\.proj\.(.+)", r"vision.vit.patch_embed.proj.\1"),
    Rule(r"beit3\.encoder\.embed_positions\.A\.weight", "vision.vit.pos_embed", convert=lambda rows: rows[None, 2:]),
    Rule(r"beit3\.encoder\.embed_positions\.B\.weight", "text.embeddings.position.weight"),
    *_ways(r"self_attn\.q_proj", "attention.query"),
    *_ways(r"self_attn\.k_proj", "attention.key"),
    *_ways(r"self_attn\.v_proj", "attention.value"),
    *_ways(r"self_attn\.out_proj", "attention.out"),
    *_ways(r"self_attn\.inner_attn_ln", "attention.norm"),
    *_ways(r"self_attn_layer_norm", "attention_norm"),
    *_ways(r"final_layer_norm", "feed_norm"),
    *_feeds("fc1", "up"),
    *_feeds("fc2", "down"),
    *_feeds("ffn_layernorm", "norm"),
    Rule(r"beit3\.encoder\.layer_norm\.A\.(.+)", r"fusion.final_norm.image.\1"),
    Rule(r"beit3\.encoder\.layer_norm\.B\.(.+)", r"fusion.final_norm.text.\1"),
    Rule(r"beit3\.vision_embed\.mask_token", reason="no objective here predicts BEiT-3's visual tokens"),
    Rule(r"mim_head\..+", reason="no objective here predicts BEiT-3's visual tokens"),
    Rule(r"vision_head\.weight", "embed.main.image.weight"),
    Rule(r"language_head\.weight", "embed.main.text.weight"),
    Rule(r"logit_scale", "embed.main.logit_scale", convert=lambda scale: scale.reshape(1)),
    Rule(r"pooler\.norm\.(.+)", r"fusion.pooler_norm.\1"),
    Rule(r"pooler\.dense\.(.+)", r"fusion.pooler.text.\1"),
    Rule(r"head\.norm1\.(.+)", r"objectives.relate.head.0.\1"),
    Rule(r"head\.dense1\.(.+)", r"objectives.relate.head.1.\1"),
    Rule(r"head\.norm2\.(.+)", r"objectives.relate.head.2.\1"),
    Rule(r"head\.dense2\.(.+)", r"objectives.relate.head.4.\1"),
    Rule(r"head\.(\d)\.(.+)", r"objectives.answer.head.\1.\2"),
    Rule(r"fc_norm\.(.+)", r"objectives.classify.norm.\1"),
    Rule(r"head\.(weight|bias)", r"objectives.classify.head.\1"),
)


def _rename(state: State) -> Renamed:
    objective = "mlm" if "mim_head.weight" in state else "seq2seq_mlm"
    return rename_by([*_RULES, Rule(r"mlm_head\.(.+)", rf"objectives.{objective}.head.\1")], state)


FAMILY = Family("beit3", _recognise, _recipe, _rename)
