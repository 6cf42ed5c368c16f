"""VOLTA (Bugliarello et al. 2021): the controlled VisualBERT, UNITER, ViLBERT and LXMERT, and ViLBERT and LXMERT.

A file is of one structure, which its config says sublayer by sublayer; without ``config=`` names and shapes say most of
it, as which stream has weights there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.bert_stack import embeddings, without_copies, word_head, word_head_copies
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers, names_there
from vlp.checkpoint.names import Pair, rename_pairs

_WORDS = "bert.embeddings.word_embeddings.weight"
_LAYERS = r"bert\.encoder\.layer\.(\d+)\."
REGION_LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "0": ("classes", {"losses": ["kl"], "reduce": "sum"}),
    "1": ("features", {"losses": ["mse"]}),
    "2": ("features", {"losses": ["nce"]}),
    "3": ("objects", {"losses": ["class"]}),
    "4": ("attributes", {"losses": ["class"]}),
    "5": ("features", {"losses": ["smooth_l1"]}),
    "6": ("objects", {"losses": ["class"]}),
}
"""Their numbers of visual targets -> what is predicted and how."""
_POOLERS = {"mul": "product", "sum": "sum", "text": "relu"}
_SINGLE_STREAM = ("tt tv vt vv shared", "t v shared") * 12
_CO_LAYER = ("tv vt", "t v", "tt vv", "t v")
_VILBERT = ("tt", "t") * 6 + _CO_LAYER * 6
_CROSS_LAYER = ("tv vt shared", "tt vv", "t v")
_LXMERT = ("tt vv", "t v") * 5 + ("tt", "t") * 4 + _CROSS_LAYER * 5
PUBLISHED = {len(one): one for one in (_SINGLE_STREAM, _VILBERT, _LXMERT)}
"""Sublayers of the published structures, by their number."""


def _twin(name: str, mark: str) -> str:
    """A part's name in the other stream: "attention_self.query" -> "attention_self.v_query"."""
    head, _, last = name.rpartition(".")
    return f"{head}.{mark}{last}"


_STREAM = (
    ("attention_self.query", "attention.query"),
    ("attention_self.key", "attention.key"),
    ("attention_self.value", "attention.value"),
    ("attention_output.dense", "attention.out"),
    ("attention_output.LayerNorm", "norm"),
    ("intermediate.dense", "feed.up"),
    ("output.dense", "feed.down"),
    ("output.LayerNorm", "norm"),
)
NAMES = (
    *embeddings("bert.", "text."),
    # ViLBERT, LXMERT
    Pair("bert.v_embeddings.image_embeddings.{p}", "vision.project.{p}"),
    Pair("bert.v_embeddings.image_location_embeddings.{p}", "vision.box.{p}"),
    Pair("bert.v_embeddings.LayerNorm.{p}", "vision.norm.{p}"),
    Pair("bert.v_embeddings.ImgLayerNorm.{p}", "vision.project_norm.{p}"),
    Pair("bert.v_embeddings.LocLayerNorm.{p}", "vision.box_norm.{p}"),
    # VisualBERT; all regions stand at position 0
    Pair("bert.embeddings.projection.{p}", "vision.project.{p}"),
    Pair("bert.embeddings.token_type_embeddings_visual.weight", "vision.segment.weight"),
    Pair("bert.embeddings.position_embeddings_visual.weight", "vision.position", to_ours=lambda table: table[0]),
    # UNITER
    Pair("bert.embeddings.image_embeddings.{p}", "vision.project.{p}"),
    Pair("bert.embeddings.image_location_embeddings.{p}", "vision.box.{p}"),
    Pair("bert.embeddings.image_layer_norm.{p}", "vision.project_norm.{p}"),
    Pair("bert.embeddings.image_location_layer_norm.{p}", "vision.box_norm.{p}"),
    Pair("bert.embeddings.v_LayerNorm.{p}", "vision.norm.{p}"),
    *(
        Pair(f"bert.encoder.layer.{{n}}.{_twin(theirs, mark)}.{{p}}", f"fusion.sublayers.{{n}}.{ours}.{part}.{{p}}")
        for mark, ours in (("", "text"), ("v_", "image"))
        for theirs, part in _STREAM
    ),
    Pair("bert.t_pooler.dense.{p}", "fusion.pooler.text.{p}"),
    Pair("bert.v_pooler.dense.{p}", "fusion.pooler.image.{p}"),
    *word_head("cls.predictions.", "objectives.mlm.head."),
    # Their class 0 is a true pair, ours 1.
    Pair("cls.bi_seq_relationship.{p}", "objectives.itm.head.{p}", to_ours=lambda rows: rows.flip(0)),
    Pair("cls.imagePredictions.transform.dense.{p}", "objectives.mrm.head.dense.{p}"),
    Pair("cls.imagePredictions.transform.LayerNorm.{p}", "objectives.mrm.head.norm.{p}"),
    *(
        Pair(f"cls.imagePredictions.decoder_dict.{number}.{{p}}", f"objectives.mrm.head.outputs.{name}.{{p}}")
        for number, (name, _) in REGION_LOSSES.items()
    ),
    Pair("cls.qaPredictions.logit_fc.{n}.{p}", "objectives.answer.head.{n}.{p}"),
    *(Pair(f"clfs_dict.TASK{{n}}.logit_fc.{k}.{{p}}", f"objectives.answer.head.{k}.{{p}}") for k in (0, 2, 3)),
    Pair("clfs_dict.TASK{n}.{p}", "objectives.answer.head.{p}"),
)


def _recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    return "bert.encoder.layer.0.attention_self.query.weight" in shapes


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    assumed: list[str] = []
    words, width = shapes[_WORDS]
    sublayers = _sublayers(shapes, config, assumed)
    vision = _vision(shapes)
    heads = _number(config, "num_attention_heads", max(1, width // 64), assumed)
    text: dict[str, Any] = {
        "layers": 0,
        "width": width,
        "heads": heads,
        "hidden": _width(shapes, "intermediate.dense") or 4 * width,
        "activation": config.get("hidden_act", "gelu"),
        "vocabulary_size": words,
        "max_length": shapes["bert.embeddings.position_embeddings.weight"][0],
        "segments": shapes["bert.embeddings.token_type_embeddings.weight"][0],
    }
    fusion: dict[str, Any] = {
        "kind": "sublayers",
        "sublayers": list(sublayers),
        "layers": sum("tt" in one for one in sublayers),
        "image_heads": _number(config, "v_num_attention_heads", _heads(vision["width"]), assumed),
        "image_hidden": _width(shapes, "intermediate.v_dense"),
    }
    cross = next((n for n, one in enumerate(sublayers) if "tv" in one), None)
    if cross is not None:
        fusion["cross_width"] = shapes[f"bert.encoder.layer.{cross}.attention_self.query.weight"][0]
        default = heads if fusion["cross_width"] == width else _heads(fusion["cross_width"])
        fusion["cross_heads"] = config.get("sublayer2num_attention_heads", {}).get(str(cross), default)
    if "bert.t_pooler.dense.weight" in shapes:
        both = "bert.v_pooler.dense.weight" in shapes
        fusion["pooler"] = _pooler(config, both, assumed)
        fusion["pooled_width"] = shapes["bert.t_pooler.dense.weight"][0]
    task = _task(shapes, fusion.get("pooled_width", 0), assumed)
    if task and len(task["answers"]) == 2:
        fusion["images"] = "each"
    tree = {
        "model": {"vision": vision, "text": text, "fusion": fusion},
        "objectives": _objectives(shapes, config) | ({"answer": task} if task else {}),
        "data": {"max_length": min(36, text["max_length"]), "tokenizer": {"source": "bert-base-uncased"}},
    }
    return Recipe(tree, tuple(assumed))


def _sublayers(shapes: Shapes, config: Mapping[str, Any], assumed: list[str]) -> tuple[str, ...]:
    """Their lists of sublayers as ours, one description a sublayer.

    Raises:
        ValueError: neither the config nor the number of sublayers tells the structure.
    """
    number = count_layers(shapes, _LAYERS)
    if "tt_attn_sublayers" not in config:
        if number not in PUBLISHED:
            raise ValueError(
                f"this VOLTA checkpoint has {number} sublayers, which no published structure has; give its config "
                "(config=, with tt_attn_sublayers and the others)"
            )
        assumed.append(f"structure of the published model of {number} sublayers")
        return PUBLISHED[number]
    lists = [(name, config.get(f"{name}_attn_sublayers", ())) for name in ("tt", "tv", "vt", "vv")]
    lists += [(name, config.get(f"{name}_ff_sublayers", ())) for name in ("t", "v")]
    lists.append(("shared", config.get("shared_sublayers", ())))
    return tuple(" ".join(word for word, where in lists if n in where) for n in range(number))


def _vision(shapes: Shapes) -> dict[str, Any]:
    """Sizes and kind of the region embeddings, which their names tell.

    Raises:
        ValueError: they are VL-BERT's or another model's.
    """
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        ("bert.v_embeddings.", {"merge": "sum"}),
        ("bert.embeddings.", {"merge": "norm_sum", "segments": "text"}),
    )
    for prefix, more in kinds:
        if prefix + "image_embeddings.weight" in shapes:
            width, features = shapes[prefix + "image_embeddings.weight"]
            if prefix + "ImgLayerNorm.weight" in shapes:
                more = {"merge": "norm_mean", "norm": "none"}
            boxes = shapes[prefix + "image_location_embeddings.weight"][1]
            return {"kind": "region", "features": features, "boxes": boxes, "width": width, **more}
    if "bert.embeddings.projection.weight" not in shapes:
        raise ValueError(
            "this VOLTA checkpoint embeds regions in a way that vlp does not know (VL-BERT, M3P); it reads ViLBERT, "
            "LXMERT, VisualBERT and UNITER"
        )
    width, features = shapes["bert.embeddings.projection.weight"]
    rows = shapes["bert.embeddings.token_type_embeddings_visual.weight"][0]
    own = {"merge": "sum", "norm": "text", "segments": "own", "segment_rows": rows, "positions": True}
    return {"kind": "region", "features": features, "boxes": 0, "width": width, **own}


def _objectives(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """The objectives whose heads the file holds; words and regions are hidden in one pass, which all of them read."""
    found: dict[str, Any] = {}
    if "cls.predictions.bias" in shapes:
        found["mlm"] = {"image": "masked", "activation": config.get("hidden_act", "gelu")}
    targets = {}
    for name in shapes:
        if match := re.fullmatch(r"cls\.imagePredictions\.decoder_dict\.(\d+)\.bias", name):
            ours, how = REGION_LOSSES[match[1]]
            weight = config.get("visual_target_weights", {}).get(match[1], 6.667 if match[1] in "345" else 1.0)
            targets[ours] = {"outputs": shapes[name][0], "weight": weight, **how}
    if targets:
        normed = "cls.imagePredictions.transform.LayerNorm.weight" in shapes
        found["mrm"] = {"text": "masked", "targets": targets, "norm": normed}
        found["mrm"] |= {"activation": config.get("hidden_act", "gelu")}
    if "cls.bi_seq_relationship.weight" in shapes:
        found["itm"] = {"scheme": "given", "masked": True}
    if "cls.qaPredictions.logit_fc.3.weight" in shapes:
        number, hidden = shapes["cls.qaPredictions.logit_fc.3.weight"]
        answers = [f"answer {n}" for n in range(number)]
        found["answer"] = {"answers": answers, "head": "gelu_mlp", "hidden": hidden, "loss": "ce"}
    return found


def _task(shapes: Shapes, pooled: int, assumed: list[str]) -> dict[str, Any] | None:
    """The head of a finetuned file: VQA's and GQA's, NLVR2's of two images, or SNLI-VE's.

    Raises:
        ValueError: it is another task's, or there are several.
    """
    heads = {name for name in shapes if name.startswith("clfs_dict.") and name.endswith("weight")}
    if not heads:
        return None
    tasks = sorted({name.split(".")[1] for name in heads})
    prefix = f"clfs_dict.{tasks[0]}."
    first = shapes.get(prefix + "logit_fc.0.weight") or shapes.get(prefix + "weight", (0, 0))
    if len(tasks) == 1 and prefix + "logit_fc.0.weight" in shapes and first[1] in (pooled, 2 * pooled):
        number, hidden = shapes[prefix + "logit_fc.3.weight"]
        if first[1] == 2 * pooled:
            return {"answers": ["False", "True"], "head": "gelu_mlp", "hidden": hidden, "loss": "ce"}
        assumed.append("answers are numbered, as the file does not name them; give settings objectives.answer.answers")
        return {"answers": [f"answer {n}" for n in range(number)], "head": "gelu_mlp", "hidden": hidden}
    if len(tasks) == 1 and first == (3, pooled):
        return {"answers": ["contradiction", "neutral", "entailment"], "head": "linear", "loss": "ce"}
    raise ValueError(
        f"this VOLTA checkpoint has heads of {tasks}; vlp reads one of VQA, GQA, NLVR2 or SNLI-VE: load it without, "
        'ignore=["clfs_dict.*"]'
    )


def _width(shapes: Shapes, part: str) -> int | None:
    """Rows of the first sublayer's weight of this name."""
    ends = (shape[0] for name, shape in shapes.items() if re.fullmatch(_LAYERS + re.escape(part) + r"\.weight", name))
    return next(ends, None)


def _heads(width: int) -> int:
    """Heads of the published streams: 8 of 128 (ViLBERT's 1024), else of 64."""
    return 8 if width == 1024 else max(1, width // 64)


def _number(config: Mapping[str, Any], key: str, default: int, assumed: list[str]) -> int:
    if key not in config:
        assumed.append(f"{key} {default}")
    return int(config.get(key, default))


def _pooler(config: Mapping[str, Any], both: bool, assumed: list[str]) -> str:
    if "fusion_method" not in config:
        assumed.append("fusion_method mul" if both else "fusion_method text")
    method = config.get("fusion_method", "mul" if both else "text")
    if method not in _POOLERS:
        raise ValueError(f"fusion_method {method!r} of this VOLTA checkpoint is none of {sorted(_POOLERS)}")
    return _POOLERS[method]


def _rename(state: State) -> Renamed:
    kept, left = without_copies(state, word_head_copies("cls.predictions.", _WORDS))
    found = rename_pairs(NAMES, kept, {r".*\.position_ids": "a table that is computed"})
    return Renamed(found.state, {**left, **found.ignored}, names_there(found.unexpected, kept, state))


FAMILY = Family("volta", _recognise, _recipe, _rename)
