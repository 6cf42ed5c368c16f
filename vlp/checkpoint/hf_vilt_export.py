"""transformers' ViLT, the way back: a single stream over bare embeddings, with the one head that each class has."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from encoders import PatchConfig, TextConfig
from encoders.patch import PatchEncoder
from objectives import AnswerConfig, MlmConfig, RankConfig
from vlp.checkpoint.export import Exported, Exporter, other_look
from vlp.checkpoint.foreign import PREPROCESSOR_FILE
from vlp.checkpoint.hf_clip import ACTIVATIONS
from vlp.checkpoint.hf_vilt import answer_names, mlm_names, names, rank_names
from vlp.checkpoint.names import Pair, restore_pairs
from vlp.data.presets import hf_processor
from vlp.fusion.single import SingleStreamConfig

if TYPE_CHECKING:
    from objectives import ObjectiveConfig
    from vlp.loaded import Loaded
    from vlp.model import Model

logger = logging.getLogger(__name__)

_BICUBIC = 3
"""Pillow's number, as transformers writes it."""


def _problem(loaded: Loaded) -> str | None:
    model = loaded.model
    vision, text, fusion = model.config.vision, model.config.text, model.config.fusion
    if not isinstance(fusion, SingleStreamConfig) or fusion.images == "pair" or fusion.pooler != "tanh":
        return "it is a single_stream with pooler tanh whose texts have one image, or two one after the other"
    if fusion.norm != "pre" or not fusion.modality_embedding:
        return "its stack has the norms before each branch, and modality embeddings"
    if not isinstance(vision, PatchConfig) or vision.depth != 0 or not vision.class_token or vision.stem:
        return "its images are bare patches with a class token (model.vision.depth 0)"
    if not isinstance(text, TextConfig) or text.layers or not text.embed_norm or not text.segments:
        return "its texts are BERT's bare embeddings (model.text.layers 0)"
    if {model.vision.width, text.width} != {fusion.width}:
        return "patches, words and stack have one width"
    if fusion.activation not in ACTIVATIONS.values():
        return f"activation {fusion.activation} is not known there"
    return _head_problem(model)


def _head_problem(model: Model) -> str | None:
    config = (_head(model) or ("", None))[1]
    if isinstance(config, MlmConfig) and config.head != "bert":
        return "its word head is BERT's"
    if isinstance(config, AnswerConfig):
        pooled = model.fusion.pooled_width if model.fusion else None
        hidden = 2 * (_fusion(model).width or 0)
        if config.head != "mlp" or (config.hidden or 2 * (pooled or 0)) != hidden:
            return f"its answer head is mlp with hidden {hidden}"
    return None


def _fusion(model: Model) -> SingleStreamConfig:
    return cast(SingleStreamConfig, model.config.fusion)


def _head(model: Model) -> tuple[str, ObjectiveConfig] | None:
    """The objective whose head goes along; the others stay behind."""
    for kind in (AnswerConfig, RankConfig, MlmConfig):
        for name, config in model.objective_configs.items():
            if isinstance(config, kind):
                return name, config
    return None


def _back(state: Mapping[str, Tensor], loaded: Loaded) -> Exported:
    model = loaded.model
    head = _head(model)
    prefix = "" if head is None else "vilt."
    kind, table = "ViltModel", names(prefix)
    more: dict[str, Any] = {}
    if head is not None:
        kind, pairs, more = _class_of(model, *head)
        table = (*table, *pairs)
    keep = ("text.", "fusion.", *([] if head is None else [f"objectives.{head[0]}."]))
    own = {name: tensor for name, tensor in state.items() if name.startswith((*keep, "vision.vit."))}
    processor = _preprocessor(loaded)
    other = other_look(loaded.config.data.transform, hf_processor(processor).transform)
    left = (*(name for name in state if name not in own), *other)
    return Exported(
        restore_pairs(table, own),
        {"architectures": [kind], "model_type": "vilt", **_config(model), **more},
        {PREPROCESSOR_FILE: processor},
        left_out=left,
    )


def _class_of(model: Model, name: str, config: ObjectiveConfig) -> tuple[str, tuple[Pair, ...], dict[str, Any]]:
    """(transformers' class, names of its head, what config.json says of it)."""
    if isinstance(config, MlmConfig):
        return "ViltForMaskedLM", mlm_names(name), {"tie_word_embeddings": config.tied}
    if isinstance(config, RankConfig):
        return "ViltForImageAndTextRetrieval", rank_names(name), {}
    assert isinstance(config, AnswerConfig)
    labels = {
        "id2label": {str(number): answer for number, answer in enumerate(config.answers)},
        "label2id": {answer: number for number, answer in enumerate(config.answers)},
    }
    if _fusion(model).images == "each":
        return "ViltForImagesAndTextClassification", answer_names(name), {**labels, "num_images": 2}
    return "ViltForQuestionAnswering", answer_names(name), labels


def _config(model: Model) -> dict[str, Any]:
    vision, text = cast(PatchConfig, model.config.vision), cast(TextConfig, model.config.text)
    stack = _fusion(model).stack
    if text.eps != stack.eps:
        logger.warning(
            "transformers' ViLT has one epsilon for all norms: the text embedding's %g becomes %g", text.eps, stack.eps
        )
    return {
        "vocab_size": model.text.word_embedding.shape[0],
        "type_vocab_size": text.segments,
        "modality_type_vocab_size": 3 if _fusion(model).images == "each" else 2,
        "max_position_embeddings": text.max_length,
        "hidden_size": stack.width,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "intermediate_size": stack.hidden or 4 * stack.width,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == stack.activation),
        "hidden_dropout_prob": stack.dropout,
        "attention_probs_dropout_prob": stack.dropout,
        "layer_norm_eps": stack.eps,
        "image_size": vision.position_size or vision.image_size,
        "patch_size": cast(PatchEncoder, model.vision).patch_side,
        "qkv_bias": True,
        "max_image_length": -1,
    }


def _preprocessor(loaded: Loaded) -> dict[str, Any]:
    """Shorter side and multiples as ViLT has them, or a square."""
    transform, vision = loaded.config.data.transform, cast(PatchConfig, loaded.model.config.vision)
    shared: dict[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": _BICUBIC}
    shared |= {"rescale_factor": 1 / 255, "image_mean": vision.mean, "image_std": vision.std}
    if transform.crop == "none":
        size = {"size": {"shortest_edge": vision.image_size}, "size_divisor": transform.multiple, "do_pad": True}
        return {"image_processor_type": "ViltImageProcessor", **size, **shared}
    square = {"height": vision.image_size, "width": vision.image_size}
    return {"image_processor_type": "ViTImageProcessor", "size": square, **shared}


EXPORTER = Exporter("hf_vilt", "hf", _problem, _back)
