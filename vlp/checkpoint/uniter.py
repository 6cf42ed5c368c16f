"""UNITER (Chen et al. 2020) and VILLA: pretraining, VQA, SNLI-VE, NLVR2 and retrieval, as the authors save them.

The authors pack each row's words and regions behind each other; here regions stand first and padding stays between,
which attention cannot tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vlp.checkpoint.bert_stack import LAYER, embeddings, without_copies, word_head, word_head_copies
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers, names_there
from vlp.checkpoint.names import Pair, blocks, rename_pairs

_IMAGE = "uniter.img_embeddings."
_WORDS = "uniter.embeddings.word_embeddings.weight"
ENTAILMENTS = ("contradiction", "entailment", "neutral")
"""SNLI-VE's verdicts, in the order of the authors' head; it has the names of VQA's."""

NAMES = (
    *embeddings("uniter.", "text."),
    Pair(_IMAGE + "img_linear.{p}", "vision.project.{p}"),
    Pair(_IMAGE + "img_layer_norm.{p}", "vision.project_norm.{p}"),
    Pair(_IMAGE + "pos_linear.{p}", "vision.box.{p}"),
    Pair(_IMAGE + "pos_layer_norm.{p}", "vision.box_norm.{p}"),
    Pair(_IMAGE + "LayerNorm.{p}", "vision.norm.{p}"),
    # Row 0, of regions that are not hidden, is kept at zero by the authors.
    Pair(_IMAGE + "mask_embedding.weight", "vision.mask", to_ours=lambda table: table[1]),
    *blocks("uniter.encoder.layer.{n}.", "fusion.blocks.{n}.", LAYER),
    Pair("uniter.pooler.dense.{p}", "fusion.pooler.text.{p}"),
    *word_head("cls.predictions.", "objectives.mlm.head."),
    Pair("feat_regress.net.0.{p}", "objectives.mrfr.head.dense.{p}"),
    Pair("feat_regress.net.2.{p}", "objectives.mrfr.head.norm.{p}"),
    Pair("feat_regress.bias", "objectives.mrfr.head.outputs.features.bias"),
    Pair("region_classifier.net.0.{p}", "objectives.mrc.head.dense.{p}"),
    Pair("region_classifier.net.2.{p}", "objectives.mrc.head.norm.{p}"),
    Pair("region_classifier.net.3.{p}", "objectives.mrc.head.outputs.classes.{p}"),
    Pair("rank_output.{p}", "objectives.rank.head.{p}"),
    Pair("vqa_output.{n}.{p}", "objectives.answer.head.{n}.{p}"),
)
_MATCH = Pair("itm_output.{p}", "objectives.itm.head.{p}")
_PAIR = Pair("nlvr2_output.{p}", "objectives.relate.head.{p}")
_PAIR_ATTENTION = (
    *(
        pair
        for theirs, ours in (("attn1", "left"), ("attn2", "right"))
        for pair in (
            Pair(
                f"{theirs}.in_proj_{{p}}",
                tuple(f"objectives.relate.head.{ours}.{part}.{{p}}" for part in ("query", "key", "value")),
            ),
            Pair(f"{theirs}.out_proj.{{p}}", f"objectives.relate.head.{ours}.out.{{p}}"),
        )
    ),
    Pair("fc.0.{p}", "objectives.relate.head.mix.{p}"),
    Pair("attn_pool.fc.0.{p}", "objectives.relate.head.pool.score.{p}"),
    Pair("nlvr2_output.{p}", "objectives.relate.head.output.{p}"),
)


def _recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    return _IMAGE + "img_linear.weight" in shapes


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    shapes = {_plain(name): shape for name, shape in shapes.items()}
    words, width = shapes[_WORDS]
    assumed: list[str] = []
    heads = config.get("num_attention_heads")
    if heads is None:
        heads = max(1, width // 64)
        assumed.append(f"num_attention_heads {heads}")
    length = shapes["uniter.embeddings.position_embeddings.weight"][0]
    paired = shapes.get("nlvr2_output.weight", (2, width))[1] == 2 * width
    vision = {
        "kind": "region",
        "features": shapes[_IMAGE + "img_linear.weight"][1],
        "boxes": shapes[_IMAGE + "pos_linear.weight"][1],
        "width": width,
        "segments": "text",
        "mask_embedding": True,
    }
    text = {
        "layers": 0,
        "width": width,
        "heads": heads,
        "hidden": shapes["uniter.encoder.layer.0.intermediate.dense.weight"][0],
        "activation": config.get("hidden_act", "gelu"),
        "vocabulary_size": words,
        "max_length": length,
        "segments": shapes["uniter.embeddings.token_type_embeddings.weight"][0],
    }
    fusion = {
        "kind": "single_stream",
        "layers": count_layers(shapes, r"uniter\.encoder\.layer\.(\d+)\."),
        "modality_embedding": False,
        "images": "each" if "nlvr2_output.weight" in shapes and paired else "one",
    }
    if "nlvr2_output.weight" in shapes and not paired:
        fusion["images"] = "pair"
    return Recipe(
        {
            "model": {"vision": vision, "text": text, "fusion": fusion},
            "objectives": _objectives(shapes, config, heads, assumed),
            "data": {"max_length": min(60, length), "tokenizer": {"source": "bert-base-cased"}},
        },
        tuple(assumed),
    )


def _objectives(shapes: Shapes, config: Mapping[str, Any], heads: int, assumed: list[str]) -> dict[str, Any]:
    """The objectives whose heads the file holds, as published."""
    found: dict[str, Any] = {}
    if "cls.predictions.bias" in shapes:
        found["mlm"] = {"activation": config.get("hidden_act", "gelu")}
    if "feat_regress.bias" in shapes:
        outputs = shapes["feat_regress.bias"][0]
        target = {"outputs": outputs, "losses": ["mse"], "tied": True}
        found["mrfr"] = {"kind": "mrm", "targets": {"features": target}}
    if "region_classifier.net.3.bias" in shapes:
        target = {"outputs": shapes["region_classifier.net.3.bias"][0], "losses": ["kl"]}
        found["mrc"] = {"kind": "mrm", "targets": {"classes": target}}
    if "rank_output.weight" in shapes:
        found["rank"] = {"loss": "margin", "scheme": "both", "negatives": 1}
    elif "itm_output.weight" in shapes:
        found["itm"] = {"scheme": "replace_image"}
        found["wra"] = {"special": True}
    if "vqa_output.3.weight" in shapes:
        number, hidden = shapes["vqa_output.3.weight"]
        answers = list(ENTAILMENTS) if number == len(ENTAILMENTS) else [f"answer {n}" for n in range(number)]
        if number != len(ENTAILMENTS):
            assumed.append(
                "answers are numbered, as the file does not name them; give settings objectives.answer.answers"
            )
        found["answer"] = {"answers": answers, "head": "gelu_mlp", "hidden": hidden}
    if "attn1.in_proj_weight" in shapes:
        found["relate"] = {"kind": "pair_attention", "heads": heads}
    elif "nlvr2_output.weight" in shapes:
        found["relate"] = {"kind": "answer", "answers": ["False", "True"], "head": "linear", "loss": "ce"}
    return found


def _plain(name: str) -> str:
    """A name with TensorFlow's words for a norm's weights replaced, which the authors read, too."""
    head, dot, last = name.rpartition(".")
    return head + dot + {"gamma": "weight", "beta": "bias"}.get(last, last)


def _rename(state: State) -> Renamed:
    copies = {"feat_regress.weight": _IMAGE + "img_linear.weight", **word_head_copies("cls.predictions.", _WORDS)}
    plain, left = without_copies({_plain(name): tensor for name, tensor in state.items()}, copies)
    ranks = "rank_output.weight" in plain
    pair = _PAIR_ATTENTION if "attn1.in_proj_weight" in plain else (_PAIR,)
    ignored = {r"itm_output\..*": "rank_output began as its row 1 and has taken its place"} if ranks else {}
    ignored |= {r".*\.position_ids": "a table that is computed"}
    found = rename_pairs((*NAMES, *pair, *(() if ranks else (_MATCH,))), plain, ignored)
    weight = plain.get("nlvr2_output.weight")
    if weight is not None and "attn1.in_proj_weight" not in plain and weight.shape[1] == plain[_WORDS].shape[1]:
        # Two images in one sequence: their order is in their segments alone.
        found.state["fusion.order"] = torch.zeros(2, weight.shape[1])
    return Renamed(found.state, {**left, **found.ignored}, names_there(found.unexpected, plain, state))


FAMILY = Family("uniter", _recognise, _recipe, _rename)
