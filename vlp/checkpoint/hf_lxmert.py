"""LXMERT (Tan and Bansal 2019): transformers' models, and the authors' own files, whose names they kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlp.checkpoint.bert_stack import embeddings, without_copies, word_head, word_head_copies
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers, names_there
from vlp.checkpoint.names import Pair, rename_pairs

_PREFIXES = ("lxrt_encoder.model.bert.", "lxmert.", "bert.")
_REGIONS = {"obj": "objects", "attr": "attributes", "feat": "features"}
_EMBEDDINGS = (
    *embeddings("", "text."),
    Pair("encoder.visn_fc.visn_fc.{p}", "vision.project.{p}"),
    Pair("encoder.visn_fc.visn_layer_norm.{p}", "vision.project_norm.{p}"),
    Pair("encoder.visn_fc.box_fc.{p}", "vision.box.{p}"),
    Pair("encoder.visn_fc.box_layer_norm.{p}", "vision.box_norm.{p}"),
    Pair("pooler.dense.{p}", "fusion.pooler.text.{p}"),
)
_HEADS = (
    *word_head("cls.predictions.", "objectives.mlm.head."),
    Pair("cls.seq_relationship.{p}", "objectives.itm.head.{p}"),
    Pair("obj_predict_head.transform.dense.{p}", "objectives.mrm.head.dense.{p}"),
    Pair("obj_predict_head.transform.LayerNorm.{p}", "objectives.mrm.head.norm.{p}"),
    *(
        Pair(f"obj_predict_head.decoder_dict.{theirs}.{{p}}", f"objectives.mrm.head.outputs.{ours}.{{p}}")
        for theirs, ours in _REGIONS.items()
    ),
    Pair("answer_head.logit_fc.{n}.{p}", "objectives.answer.head.{n}.{p}"),
    Pair("logit_fc.{n}.{p}", "objectives.answer.head.{n}.{p}"),
)


def _plain(name: str) -> str:
    """A name without the prefix of the part that every LXMERT has."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    return any(name.endswith("encoder.visn_fc.visn_fc.weight") for name in shapes)


def _counts(names: Mapping[str, Any]) -> tuple[int, int, int]:
    """Numbers of language, vision and cross layers."""
    shapes: Shapes = dict.fromkeys(names, ())
    language, vision, cross = (
        count_layers(shapes, rf"encoder\.{part}\.(\d+)\.") for part in ("layer", "r_layers", "x_layers")
    )
    return language, vision, cross


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    shapes = {_plain(name): shape for name, shape in shapes.items()}
    words, width = shapes["embeddings.word_embeddings.weight"]
    assumed: list[str] = []
    heads = config.get("num_attention_heads")
    if heads is None:
        heads = max(1, width // 64)
        assumed.append(f"num_attention_heads {heads}")
    language, vision, cross = _counts(shapes)
    sublayers: list[str] = []
    for number in range(max(language, vision)):
        here = [s for s, layers in (("t", language), ("v", vision)) if number < layers]
        sublayers += [" ".join(s + s for s in here), " ".join(here)]
    sublayers += ["tv vt shared", "tt vv", "t v"] * cross
    length = shapes["embeddings.position_embeddings.weight"][0]
    return Recipe(
        {
            "model": {
                "vision": {
                    "kind": "region",
                    "features": shapes["encoder.visn_fc.visn_fc.weight"][1],
                    "boxes": shapes["encoder.visn_fc.box_fc.weight"][1],
                    "width": width,
                    "merge": "norm_mean",
                    "norm": "none",
                },
                "text": {
                    "layers": 0,
                    "width": width,
                    "heads": heads,
                    "hidden": shapes["encoder.layer.0.intermediate.dense.weight"][0],
                    "activation": config.get("hidden_act", "gelu"),
                    "vocabulary_size": words,
                    "max_length": length,
                    "segments": shapes["embeddings.token_type_embeddings.weight"][0],
                    "train_first_rows": False,
                },
                "fusion": {
                    "kind": "sublayers",
                    "sublayers": sublayers,
                    "layers": language + cross,
                    "pooler": "tanh",
                    "images": "each" if _of_two_images(shapes, width) else "one",
                },
            },
            "objectives": _objectives(shapes, config, assumed),
            "data": {"max_length": min(20, length), "tokenizer": {"source": "bert-base-uncased"}},
        },
        tuple(assumed),
    )


def _of_two_images(shapes: Shapes, width: int) -> bool:
    """Whether the authors' head reads two pooled vectors (NLVR2)."""
    return shapes.get("logit_fc.0.weight", (0, 0))[1] == 2 * width


def _objectives(shapes: Shapes, config: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    """The objectives whose heads the file holds; in pretraining all read one pass with words and regions hidden."""
    found: dict[str, Any] = {}
    pretraining = "cls.predictions.bias" in shapes
    if pretraining:
        found["mlm"] = {"image": "masked", "activation": config.get("hidden_act", "gelu")}
    if "cls.seq_relationship.weight" in shapes:
        found["itm"] = {"scheme": "given", "masked": True}
    targets = {}
    for theirs, ours in _REGIONS.items():
        if (name := f"obj_predict_head.decoder_dict.{theirs}.weight") in shapes:
            losses = ["smooth_l1" if ours == "features" else "class"]
            weight = config.get("visual_loss_normalizer", 6.67)
            targets[ours] = {"outputs": shapes[name][0], "losses": losses, "weight": weight}
    if targets:
        found["mrm"] = {"text": "masked", "mean": "all", "targets": targets}
        found["mrm"] |= {"activation": config.get("hidden_act", "gelu")}
    for head in ("answer_head.logit_fc", "logit_fc"):
        if f"{head}.3.weight" in shapes:
            number, hidden = shapes[f"{head}.3.weight"]
            pairs = _of_two_images(shapes, shapes["pooler.dense.weight"][0])
            answers = ["False", "True"] if pairs else [f"answer {n}" for n in range(number)]
            if not pairs:
                assumed.append(
                    "answers are numbered, as the file does not name them; give settings objectives.answer.answers"
                )
            found["answer"] = {"answers": answers, "head": "gelu_mlp", "hidden": hidden, "masked": pretraining}
            found["answer"] |= {"loss": "ce" if pairs or head.startswith("answer_head") else "bce"}
    return found


def _layers(language: int, vision: int, cross: int) -> list[Pair]:
    """Names of the layers: the streams' own side by side, then the cross layers, of three sublayers each."""
    found: list[Pair] = []
    for part, layers, stream in (("layer", language, "text"), ("r_layers", vision, "image")):
        for number in range(layers):
            theirs, ours = f"encoder.{part}.{number}.", f"fusion.sublayers.{{}}.{stream}."
            found += _attention(theirs + "attention.self.", theirs + "attention.output.", ours.format(2 * number))
            found += _feed(theirs + "intermediate.", theirs + "output.", ours.format(2 * number + 1))
    first = 2 * max(language, vision)
    for number in range(cross):
        theirs = f"encoder.x_layers.{number}."
        crossed, looked, fed = (f"fusion.sublayers.{first + 3 * number + n}." for n in range(3))
        both = theirs + "visual_attention."
        found += _attention(both + "att.", both + "output.", crossed + "text.")
        for name, stream in (("lang", "text."), ("visn", "image.")):
            own = f"{theirs}{name}_self_att."
            found += _attention(own + "self.", own + "output.", looked + stream)
            found += _feed(f"{theirs}{name}_inter.", f"{theirs}{name}_output.", fed + stream)
    return found


def _attention(theirs: str, output: str, ours: str) -> list[Pair]:
    projections = [Pair(f"{theirs}{one}.{{p}}", f"{ours}attention.{one}.{{p}}") for one in ("query", "key", "value")]
    after = [("dense", "attention.out"), ("LayerNorm", "norm")]
    return projections + [Pair(f"{output}{there}.{{p}}", f"{ours}{here}.{{p}}") for there, here in after]


def _feed(theirs: str, output: str, ours: str) -> list[Pair]:
    up = Pair(theirs + "dense.{p}", ours + "feed.up.{p}")
    return [up, Pair(output + "dense.{p}", ours + "feed.down.{p}"), Pair(output + "LayerNorm.{p}", ours + "norm.{p}")]


def _rename(state: State) -> Renamed:
    plain: dict[str, Tensor] = {_plain(name): tensor for name, tensor in state.items()}
    words = "embeddings.word_embeddings.weight"
    plain, left = without_copies(plain, word_head_copies("cls.predictions.", words))
    table = (*_EMBEDDINGS, *_layers(*_counts(plain)), *_HEADS)
    found = rename_pairs(table, plain, {r".*position_ids": "a table that is computed"})
    return Renamed(found.state, {**left, **found.ignored}, names_there(found.unexpected, plain, state))


FAMILY = Family("hf_lxmert", _recognise, _recipe, _rename)
