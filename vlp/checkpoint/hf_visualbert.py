"""VisualBERT (Li et al. 2019): transformers' models, and the authors' own files under their older names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlp.checkpoint.bert_stack import LAYER, embeddings, without_copies, word_head, word_head_copies
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers, names_there
from vlp.checkpoint.names import Pair, blocks, rename_pairs

_WORDS = "embeddings.word_embeddings.weight"
_OLDER = (
    (r"(bert\.bert|visual_bert)\.(.*)", r"\2"),
    (r"bert\.(?:cls|classifier)\.(.*)", r"cls.\1"),
    (r"embeddings\.token_type_embeddings_visual\.(.*)", r"embeddings.visual_token_type_embeddings.\1"),
    (r"embeddings\.position_embeddings_visual\.(.*)", r"embeddings.visual_position_embeddings.\1"),
    (r"embeddings\.projection\.(.*)", r"embeddings.visual_projection.\1"),
    (r"(.*LayerNorm\.)gamma", r"\1weight"),
    (r"(.*LayerNorm\.)beta", r"\1bias"),
)
NAMES = (
    *embeddings("", "text."),
    Pair("embeddings.visual_projection.{p}", "vision.project.{p}"),
    Pair("embeddings.visual_token_type_embeddings.weight", "vision.segment.weight"),
    # All regions stand at position 0.
    Pair("embeddings.visual_position_embeddings.weight", "vision.position", to_ours=lambda table: table[0]),
    *blocks("encoder.layer.{n}.", "fusion.blocks.{n}.", LAYER),
    Pair("pooler.dense.{p}", "fusion.pooler.text.{p}"),
    *word_head("cls.predictions.", "objectives.mlm.head."),
    # Their class 0 is a true pair, ours 1.
    Pair("cls.seq_relationship.{p}", "objectives.itm.head.{p}", to_ours=lambda rows: rows.flip(0)),
    Pair("cls.{p}", "objectives.answer.head.{p}"),
)


def _plain(name: str) -> str:
    """A name as transformers writes it, without the prefix of the part that every VisualBERT has."""
    for pattern, to in _OLDER:
        name = re.sub(rf"^{pattern}$", to, name)
    return name


def _recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    # VOLTA's VisualBERT has the authors' names, but another encoder.
    names = {_plain(name) for name in shapes}
    return {"embeddings.visual_projection.weight", "encoder.layer.0.attention.self.query.weight"} <= names


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    shapes = {_plain(name): shape for name, shape in shapes.items()}
    words, width = shapes[_WORDS]
    assumed: list[str] = []
    heads = config.get("num_attention_heads")
    if heads is None:
        heads = max(1, width // 64)
        assumed.append(f"num_attention_heads {heads}")
    if config.get("bypass_transformer"):
        raise ValueError("this VisualBERT leaves the image out of its layers (bypass_transformer), which vlp does not")
    length = shapes["embeddings.position_embeddings.weight"][0]
    activation = config.get("hidden_act", "gelu")
    eps = config.get("layer_norm_eps", 1e-12)
    return Recipe(
        {
            "model": {
                "vision": {
                    "kind": "region",
                    "features": shapes["embeddings.visual_projection.weight"][1],
                    "boxes": 0,
                    "width": width,
                    "merge": "sum",
                    "norm": "text",
                    "segments": "own",
                    "segment_rows": shapes["embeddings.visual_token_type_embeddings.weight"][0],
                    "positions": True,
                },
                "text": {
                    "layers": 0,
                    "width": width,
                    "heads": heads,
                    "hidden": shapes["encoder.layer.0.intermediate.dense.weight"][0],
                    "activation": activation,
                    "eps": eps,
                    "vocabulary_size": words,
                    "max_length": length,
                    "segments": shapes["embeddings.token_type_embeddings.weight"][0],
                },
                "fusion": {
                    "kind": "single_stream",
                    "layers": count_layers(shapes, r"encoder\.layer\.(\d+)\."),
                    "modality_embedding": False,
                    **({"pooler": "cls", "pool_at": "before_last"} if _answers(shapes, config) else {}),
                },
            },
            "objectives": _objectives(shapes, config, activation, assumed),
            "data": {"max_length": min(128, length), "tokenizer": {"source": "bert-base-uncased"}},
        },
        tuple(assumed),
    )


def _answers(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    """Whether the file's head answers questions, from the state of [MASK]; else it judges pairs of images (NLVR2)."""
    if "cls.weight" not in shapes or "VisualBertForVisualReasoning" in config.get("architectures", ()):
        return False
    return "VisualBertForQuestionAnswering" in config.get("architectures", ()) or shapes["cls.weight"][0] != 2


def _objectives(shapes: Shapes, config: Mapping[str, Any], activation: str, assumed: list[str]) -> dict[str, Any]:
    """The objectives whose heads the file holds; pairs and hidden words come with the data."""
    found: dict[str, Any] = {}
    if "cls.predictions.bias" in shapes:
        found["mlm"] = {"activation": activation, "image_labels": True}
    if "cls.seq_relationship.weight" in shapes:
        found["itm"] = {"scheme": "given", "masked": True}
    if "cls.weight" in shapes:
        answers = ["False", "True"]
        if _answers(shapes, config):
            answers = [f"answer {n}" for n in range(shapes["cls.weight"][0])]
            assumed.append(
                "answers are numbered, as the file does not name them; give settings objectives.answer.answers"
            )
        found["answer"] = {"answers": answers, "head": "linear", "loss": "ce"}
    return found


def _rename(state: State) -> Renamed:
    plain: dict[str, Tensor] = {_plain(name): tensor for name, tensor in state.items()}
    plain, left = without_copies(plain, word_head_copies("cls.predictions.", _WORDS))
    found = rename_pairs(NAMES, plain, {r".*position_ids": "a table that is computed"})
    return Renamed(found.state, {**left, **found.ignored}, names_there(found.unexpected, plain, state))


FAMILY = Family("hf_visualbert", _recognise, _recipe, _rename)
