"""Models of BLIP's form into transformers: captioning, matching and VQA.

One class of transformers holds one task: a model that captions becomes BlipForConditionalGeneration, one that only
matches BlipForImageTextRetrieval, one whose decoder reads the fused question BlipForQuestionAnswering. What the other
tasks of a pretrained model need is left out. Their classes read texts as given: [ENC] is for their user to put first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from encoders import PatchConfig, TextConfig
from objectives.itm import Itm
from objectives.lm import Lm, LmConfig
from vlp.checkpoint.albef import SIDES
from vlp.checkpoint.bert_stack import decoder_stack, split_stack, word_head
from vlp.checkpoint.blip import DECODER, ENCODER, HEAD
from vlp.checkpoint.export import Exported, Exporter, other_look
from vlp.checkpoint.foreign import PREPROCESSOR_FILE
from vlp.checkpoint.hf_blip import VISION_TABLE
from vlp.checkpoint.hf_clip import ACTIVATIONS
from vlp.checkpoint.names import Pair, restore_pairs
from vlp.checkpoint.native import aliases
from vlp.data.presets import hf_processor
from vlp.fusion.dual import DualStreamConfig
from vlp.loaded import Loaded

logger = logging.getLogger(__name__)

CAPTION, MATCH, ANSWER = "BlipForConditionalGeneration", "BlipForImageTextRetrieval", "BlipForQuestionAnswering"
MEMORY = {CAPTION: "image", ANSWER: "fused"}
_BERT_SEP = 102
_THEIRS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
_VIT_ARGUMENTS = {"mlp_ratio", "act_layer"}


def _objective(loaded: Loaded, kind: type[Any], memory: str | None = None) -> str | None:
    """Name of the objective of this kind (whose decoder reads this memory)."""
    parts: dict[str, Any] = dict(loaded.model.objectives.items())
    found = ((name, one) for name, one in parts.items() if isinstance(one, kind))
    return next((name for name, one in found if memory is None or one.config.memory == memory), None)


def _writer(loaded: Loaded, task: str) -> LmConfig:
    """Config of the objective whose head writes."""
    writer = loaded.model.objectives[str(_objective(loaded, Lm, MEMORY[task]))]
    assert isinstance(writer, Lm)
    return writer.config


def _task(loaded: Loaded) -> str | None:
    """Class that holds the model's task."""
    if loaded.model.decoder is not None and _objective(loaded, Lm, "fused"):
        return ANSWER
    if loaded.model.decoder is not None and _objective(loaded, Lm, "image"):
        return CAPTION
    return MATCH if _objective(loaded, Itm) and loaded.model.space() is not None else None


def problem(loaded: Loaded) -> str | None:
    """Return why a model is not of BLIP's form; None: it is."""
    return next(_problems(loaded), None)


def _problems(loaded: Loaded) -> Iterator[str]:
    model: Any = loaded.model.config
    task = _task(loaded)
    vision, text, fusion, decoder = model.vision, model.text, model.fusion, model.decoder
    if task is None:
        yield "it needs an objective lm with a decoder, or itm with a contrastive space"
        return
    if not isinstance(vision, PatchConfig) or vision.stem or loaded.model.vision.bare:
        yield "the vision encoder is no plain ViT (model.vision.kind patch)"
    elif unknown := sorted(vision.arguments.keys() - _VIT_ARGUMENTS):
        yield f"its ViT has settings that BLIP's has not: {unknown}"
    if not isinstance(text, TextConfig) or text.layers or text.segments or text.norm != "post" or not text.embed_norm:
        yield "its text encoder is not BLIP's: layers 0, segments 0, norm post"
        return
    if task != CAPTION and not (
        isinstance(fusion, DualStreamConfig) and fusion.attention == "cross" and fusion.images == "one"
    ):
        yield "its fusion is not BLIP's: dual_stream with attention cross and one image"
    if task != MATCH and (decoder is None or getattr(decoder, "norm", None) not in ("post", None)):
        yield "its decoder is not BLIP's: kind causal, norm post"
    if task == ANSWER and decoder is not None:
        stack = ("layers", "heads", "hidden", "width")
        if any(getattr(decoder, name) != getattr(fusion, name) for name in stack):
            yield "decoder and fusion differ in size, and their class has one size for both"
        if loaded.model.vision.width != loaded.model.text.width:
            yield "images and texts differ in width, and their class has one width for what both stacks read"
    try:
        restore_pairs(_table(loaded, task), _part(loaded, task))
    except ValueError as error:
        yield str(error)


def back(state: Mapping[str, Tensor], loaded: Loaded) -> Exported:
    """Say a model of BLIP's form in transformers' words."""
    task = _task(loaded)
    assert task is not None
    wanted = _part(loaded, task)
    left = tuple(names[0] for names in aliases(loaded.model).values() if not wanted.keys() & set(names))
    first = getattr(loaded.model.config.text, "fused_first", None)
    if first is not None and task != CAPTION:
        logger.warning("texts that are fused with an image begin with id %d, which is for you to put there", first)
    processor = _processor(loaded)
    left += other_look(loaded.config.data.transform, hf_processor(processor).transform)
    found = restore_pairs(_table(loaded, task), wanted)
    return Exported(found, _config(loaded, task), {PREPROCESSOR_FILE: processor}, left_out=left)


def _part(loaded: Loaded, task: str) -> dict[str, Tensor]:
    """The weights of the task's class there; those that parts share, under the name of the part that is its own."""
    lm, itm = _objective(loaded, Lm, MEMORY.get(task)), _objective(loaded, Itm)
    parts = ["vision."]
    if task != MATCH:
        parts += ["decoder.", f"objectives.{lm}.head."]
    if task != CAPTION:
        parts += ["text.", "fusion."]
    if task == MATCH:
        parts += ["embed.main.image.", "embed.main.text.", f"objectives.{itm}.head."]
    copy = f"objectives.{lm}.head.decoder.weight"
    tied = task != MATCH and _writer(loaded, task).tied
    return {
        name: tensor
        for name, tensor in loaded.model.state_dict().items()
        if name.startswith(tuple(parts)) and not (tied and name == copy)
    }


def _table(loaded: Loaded, task: str) -> tuple[Pair, ...]:
    lm, itm = _objective(loaded, Lm, MEMORY.get(task)), _objective(loaded, Itm)
    pairs = [*VISION_TABLE]
    if task != CAPTION:
        pairs += split_stack(ENCODER, "", _layers(loaded, task), 0)
    if task == MATCH:
        pairs += [Pair(f"{side}_proj.{{p}}", f"embed.main.{mine}.{{p}}") for side, mine in SIDES]
        pairs += [Pair("itm_head.{p}", f"objectives.{itm}.head.{{p}}")]
    else:
        head = f"objectives.{lm}.head."
        pairs += [*decoder_stack(DECODER, "decoder."), *word_head(HEAD, head)]
        pairs += [Pair(HEAD + "decoder.weight", head + "decoder.weight")]
    return tuple(pairs)


def _layers(loaded: Loaded, task: str) -> int:
    """Text layers."""
    model: Any = loaded.model
    return len((model.fusion if task == MATCH else model.decoder).blocks)


def _config(loaded: Loaded, task: str) -> dict[str, Any]:
    model: Any = loaded.model
    text, vision, encoder = model.config.text, model.config.vision, model.vision
    stack = (model.config.fusion if task == MATCH else model.config.decoder).stack
    writer = None if task == MATCH else _writer(loaded, task)
    bos, sep = _special(loaded)
    tied = writer is None or writer.tied
    return {
        "architectures": [task],
        "model_type": "blip",
        "tie_word_embeddings": tied,
        "image_text_hidden_size": model.config.embed.width,
        "text_config": {
            "model_type": "blip_text_model",
            "vocab_size": model.text.word_embedding.shape[0],
            "hidden_size": stack.width,
            "encoder_hidden_size": encoder.width,
            "intermediate_size": stack.hidden or 4 * stack.width,
            "num_hidden_layers": _layers(loaded, task),
            "num_attention_heads": stack.heads,
            "max_position_embeddings": text.max_length,
            "hidden_act": _THEIRS[stack.activation],
            "hidden_dropout_prob": stack.dropout,
            "attention_probs_dropout_prob": stack.dropout,
            "layer_norm_eps": stack.eps,
            "bos_token_id": bos,
            "sep_token_id": sep,
            "pad_token_id": text.padding_id or 0,
            "label_smoothing": 0.0 if writer is None else writer.label_smoothing,
            "tie_word_embeddings": tied,
            "is_decoder": True,
        },
        "vision_config": {
            "model_type": "blip_vision_model",
            "hidden_size": encoder.width,
            "intermediate_size": encoder.vit.blocks[0].mlp.fc1.out_features,
            "num_hidden_layers": len(encoder.vit.blocks),
            "num_attention_heads": encoder.vit.blocks[0].attn.num_heads,
            "image_size": vision.image_size,
            "patch_size": encoder.vit.patch_embed.patch_size[0],
            "hidden_act": _THEIRS[vision.arguments.get("act_layer", "gelu")],
            "layer_norm_eps": encoder.vit.norm.eps,
        },
    }


def _special(loaded: Loaded) -> tuple[int, int]:
    """Ids that begin and end a written text; of the published tokenizer where none is at hand."""
    try:
        vocabulary = loaded.tokenizer.vocabulary
    except ValueError:
        rows = loaded.model.text.word_embedding.shape[0]
        added = loaded.config.data.tokenizer.added_tokens
        return rows - len(added) if added else rows - 2, _BERT_SEP
    return vocabulary.bos, vocabulary.eos


def _processor(loaded: Loaded) -> dict[str, Any]:
    """Settings of transformers' image processor."""
    vision: Any = loaded.model.config.vision
    return {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        "do_resize": True,
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": 3,  # bicubic, of Pillow
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        "do_convert_rgb": True,
    }


EXPORTER = Exporter("hf_blip", "hf", problem, back)
