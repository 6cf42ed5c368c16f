"""Models of ALBEF's form into its authors' ``.pth`` files: pretraining, retrieval, VQA, NLVR2, SNLI-VE.

What those files store twice is stored twice; a momentum teacher that the model has none of, and that the authors' code
of the task wants, begins as its student.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from encoders import PatchConfig, TextConfig
from objectives.answer import AnswerConfig
from objectives.lm import LmConfig
from vlp.checkpoint.albef import table
from vlp.checkpoint.bert_stack import word_head_copies
from vlp.checkpoint.clip_export import image_processor
from vlp.checkpoint.export import Exported, Exporter, other_look
from vlp.checkpoint.foreign import PREPROCESSOR_FILE
from vlp.checkpoint.names import restore_pairs
from vlp.data.presets import hf_processor
from vlp.fusion.dual import DualStreamConfig
from vlp.loaded import Loaded

KINDS = frozenset({"itc", "itm", "mlm", "answer", "lm", "assign"})
IMAGES = ("one", "alternate")
"""How many images a text may have, as `model.fusion.images` says it."""
_OTHERS_QUEUE = ("objectives.itc.queue.caption_id",)


def problem(loaded: Loaded) -> str | None:
    """Return why a model is not of ALBEF's form; None: it is."""
    return next(_problems(loaded), None)


def _problems(loaded: Loaded) -> Iterator[str]:
    model: Any = loaded.model.config
    vision, text, fusion, decoder = model.vision, model.text, model.fusion, model.decoder
    objectives = loaded.model.objective_configs
    if not isinstance(vision, PatchConfig) or vision.stem or loaded.model.vision.bare or not vision.class_token:
        yield "the vision encoder is no plain ViT with a class token (model.vision.kind patch)"
    if not isinstance(text, TextConfig) or not text.layers or not text.segments or text.norm != "post":
        yield "its text encoder is not ALBEF's: kind text with layers, segments and norm post"
        return
    if not isinstance(fusion, DualStreamConfig) or fusion.attention != "cross" or fusion.pooler != "cls":
        yield "its fusion is not ALBEF's: dual_stream with attention cross and pooler cls"
        return
    if fusion.width != text.width or fusion.project or fusion.modality_embedding or fusion.images not in IMAGES:
        yield f"its fusion is of another width than its texts, has embeddings of its own, or images not of {IMAGES}"
    if fusion.heads != text.heads or (fusion.hidden or 4 * text.width) != (text.hidden or 4 * text.width):
        yield "text encoder and fusion differ in heads or hidden width, and ALBEF has one stack for both"
    if decoder is not None and (decoder.norm not in ("post", None) or decoder.share == "all_but_self_attention"):
        yield "its decoder is not ALBEF's: norm post, sharing nothing or its embeddings"
    kinds = [one.kind for one in objectives.values()]
    if set(kinds) - KINDS or len(set(kinds)) < len(kinds):
        yield f"its objectives are {sorted(kinds)}; ALBEF's are of {sorted(KINDS)}, one of each"
    for one in objectives.values():
        if isinstance(one, AnswerConfig) and one.head != "relu":
            yield "its answer head is not ALBEF's: head relu"
        if isinstance(one, LmConfig) and one.memory != "fused":
            yield "its decoder reads the image; ALBEF's reads the fused question"


def back(state: Mapping[str, Tensor], loaded: Loaded) -> Exported:
    """Say a model of ALBEF's form in its authors' words."""
    own = dict(_by_kind(state, loaded))
    kinds: set[str] = {one.kind for one in loaded.model.objective_configs.values()}
    left = [name for name in _OTHERS_QUEUE if name in own]
    if "mlm" in kinds and "objectives.itc.queue.image_id" in own:  # only retrieval's files know images by their ids
        left.append("objectives.itc.queue.image_id")
    own = {name: tensor for name, tensor in own.items() if name not in left}
    if loaded.model.teacher is not None or "itc" in kinds:
        own |= _twins(own, kinds)
    bert = "bert." if "mlm" in kinds else ""
    model: Any = loaded.model.config
    split, layers = model.text.layers, model.text.layers + model.fusion.layers
    pairs = [
        pair
        for twin in ("", "_m")
        for pair in table(f"text_encoder{twin}.{bert}", layers, split, twin, assigns="assign" in kinds)
    ]
    found = restore_pairs(pairs, own)
    _add_copies(found, bert, split if model.fusion.images == "alternate" else None)
    # The authors' code has mean and std in itself; our loader reads them from here.
    processor = image_processor(loaded, "CLIP")
    other = (*other_look(loaded.config.data.transform, hf_processor(processor).transform), *_other_words(loaded))
    return Exported(found, _config(loaded, found), {PREPROCESSOR_FILE: processor}, left_out=(*left, *other))


def _other_words(loaded: Loaded) -> Iterator[str]:
    """How texts are cleaned here, where ALBEF's code does otherwise."""
    clean = loaded.config.data.tokenizer.clean
    if clean not in ("albef", "albef_question"):
        yield f"data.tokenizer.clean {clean} (it cleans texts in its own way)"


def _by_kind(state: Mapping[str, Tensor], loaded: Loaded) -> Iterator[tuple[str, Tensor]]:
    """Weights with every objective called by its kind."""
    kinds = {name: one.kind for name, one in loaded.model.objective_configs.items()}
    for name, tensor in state.items():
        for prefix in ("objectives.", "teacher.heads."):
            if name.startswith(prefix):
                objective, _, rest = name.removeprefix(prefix).partition(".")
                yield f"{prefix}{kinds[objective]}.{rest}", tensor
                break
        else:
            yield name, tensor


def _twins(own: Mapping[str, Tensor], kinds: set[str]) -> dict[str, Tensor]:
    """The parts of the teacher that ALBEF's file has and ours lacks: as their student."""
    parts = ("vision.", "text.", "fusion.", "decoder.", "embed.main.image.", "embed.main.text.")
    found = {f"teacher.{name}": own[name] for name in own if name.startswith(parts)}
    for kind in kinds & {"mlm", "lm", "answer"}:
        start = f"objectives.{kind}."
        found |= {f"teacher.heads.{kind}.{n.removeprefix(start)}": own[n] for n in own if n.startswith(start)}
    return {name: tensor for name, tensor in found.items() if name not in own}


def _add_copies(found: dict[str, Tensor], bert: str, alternates_from: int | None) -> None:
    """Store what ALBEF's files store twice: tied words, position numbers, the second of two shared projections."""
    for twin in ("", "_m"):
        encoder, decoder = f"text_encoder{twin}.{bert}", f"text_decoder{twin}.bert."
        for name in [name for name in found if name.startswith(f"{encoder}embeddings.")]:
            if f"{decoder}encoder.layer.0.output.dense.weight" in found:  # a decoder that shares its embeddings
                found.setdefault(name.replace(encoder, decoder, 1), found[name])
        for prefix, part in ((encoder, f"text_encoder{twin}"), (decoder, f"text_decoder{twin}")):
            table_name = f"{prefix}embeddings.position_embeddings.weight"
            if table_name in found:
                found[f"{prefix}embeddings.position_ids"] = torch.arange(len(found[table_name]))[None]
            copies = word_head_copies(f"{part}.cls.predictions.", f"{prefix}embeddings.word_embeddings.weight")
            if f"{part}.cls.predictions.bias" in found:
                found |= {copy: found[original] for copy, original in copies.items()}
        if alternates_from is not None:
            layer = f"{encoder}encoder.layer."
            shared = [n for n in found if n.startswith(layer) and ("n.self.key." in n or "n.self.value." in n)]
            for name in [n for n in shared if ".crossattention." in n]:
                number, _, rest = name.removeprefix(layer).partition(".")
                found[f"{layer}{int(number) + 1}.{rest}"] = found[name]


def _config(loaded: Loaded, found: Mapping[str, Tensor]) -> dict[str, Any]:
    """The authors' keys, as their YAML, config_bert.json and code have them."""
    model: Any = loaded.model.config
    text, fusion, vision = model.text, model.fusion, loaded.model.vision.config
    objectives: dict[str, Any] = {one.kind: one for one in loaded.model.objective_configs.values()}
    distill: float = max((getattr(one, "distill", 0.0) for one in objectives.values()), default=0.0)
    config = {
        "image_res": vision.image_size,
        "vision_width": loaded.model.vision.width,
        "momentum": model.momentum,
        "distill": distill > 0,
        "bert_config": {
            "architectures": ["BertForMaskedLM"],
            "model_type": "bert",
            "hidden_size": text.width,
            "num_hidden_layers": text.layers + fusion.layers // (2 if fusion.images == "alternate" else 1),
            "num_attention_heads": text.heads,
            "intermediate_size": text.hidden or 4 * text.width,
            "hidden_act": text.activation,
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.dropout,
            "layer_norm_eps": text.eps,
            "max_position_embeddings": text.max_length,
            "type_vocab_size": text.segments,
            "vocab_size": loaded.model.text.word_embedding.shape[0],
            "pad_token_id": 0,
            "fusion_layer": text.layers,
            "encoder_width": loaded.model.vision.width,
        },
        "vit": {"num_heads": vision_heads(loaded)},
    }
    if distill:
        config["alpha"] = distill
    if "itc" in objectives:
        config |= {"embed_dim": model.embed.width, "queue_size": objectives["itc"].queue}
        config["temp"] = found["temp"].item()
    if "mlm" in objectives:
        config["mlm_probability"] = objectives["mlm"].mask_probability
    return config


def vision_heads(loaded: Loaded) -> int:
    """Heads of the vision tower's attention."""
    vision: Any = loaded.model.vision
    heads: int = vision.vit.blocks[0].attn.num_heads
    return heads


EXPORTER = Exporter("albef", "albef", problem, back, weights="model.pth")
