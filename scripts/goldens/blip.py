"""BLIP's cases, in the authors' files and in transformers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from encoders.types import Batch, Images, Texts, Tokens, Vocabulary
from objectives.base import Decode, Embed, Encode, Fuse
from objectives.itc import similarities
from objectives.lm import Lm
from scripts.goldens.base import Adapter, Case, Output, Ran
from vlp.generate import GenerationConfig, generate_text
from vlp.loaded import Loaded
from vlp.rank import rank_answers

IMAGE, TEXT, FALSE, ANSWERS = Encode("image"), Encode("text"), Fuse(rows="itm"), "lm:answer"
WRITTEN, ANSWERED = Decode(IMAGE), Decode(Fuse(), ANSWERS)
PAD, CLS, SEP = 0, 101, 102


def _config(case: Case) -> Mapping[str, Any]:
    return {"vit": case.config["vit"], "med_config": case.config["med"], **case.config}


def _bos(case: Case) -> int:
    return case.config["special"]["DEC"] if "special" in case.config else case.config["text_config"]["bos_token_id"]


def _vocabulary(ran: Ran) -> Vocabulary:
    return Vocabulary(ran.model.text.word_embedding.shape[0], PAD, CLS, SEP, None, _bos(ran.case), SEP)


def _text(case: Case, name: str = "text.") -> Texts:
    return Texts(case.inputs[f"{name}input_ids"], case.inputs[f"{name}attention_mask"].bool())


def _written(case: Case, text: Texts, prompt: int = 1) -> Texts:
    """As the decoder reads it: bos first, each label the next id, none for the first ``prompt`` ids."""
    ids = torch.cat([torch.full_like(text.ids[:, :1], _bos(case)), text.ids[:, 1:]], 1)
    known = torch.arange(ids.shape[1]) >= prompt
    labels = torch.where(text.keep & known, ids, -100).roll(-1, 1)
    labels[:, -1] = -100
    return Texts(ids, text.keep, "causal", labels=labels)


def _pairs(case: Case, loaded: Loaded) -> Batch:
    text = _text(case)
    texts = {"clean": text, "causal": _written(case, text, case.config.get("prompt_length", 1))}
    return Batch({"clean": Images(case.inputs["image"])}, texts, image_id=case.inputs.get("idx"))


def _two_images(case: Case, loaded: Loaded) -> Batch:
    rows = torch.arange(len(case.inputs["targets"]))
    targets = {"answer_scores": torch.eye(2)[case.inputs["targets"]]}
    return replace(_pairs(case, loaded), image_of_text=torch.stack([rows, rows + len(rows)], 1), targets=targets)


def _questions(case: Case, loaded: Loaded) -> Batch:
    given, answers = case.inputs, _written(case, _text(case, "answer."))
    texts = {"clean": _text(case, "question."), ANSWERS: answers}
    if "n.0" in given:
        counts = torch.stack([given[name] for name in sorted(given) if name.startswith("n.")])
        owner = torch.arange(len(counts)).repeat_interleave(counts)
        texts[ANSWERS] = replace(answers, owner=owner, weight=given["weights"])
    else:
        texts.pop(ANSWERS)
    return Batch({"clean": Images(given["image"])}, texts)


def generated(name: str, memory: Callable[[Ran], Tokens], prompt: Tensor | None = None, **settings: Any) -> Output:
    """The ids of the output of that name, padded as it is, and (but for ``max_length``) as long at most."""

    def write(ran: Ran) -> Tensor:
        found = torch.full_like(ran.case.outputs[name], PAD)
        config = GenerationConfig(**{"max_length": found.shape[1], **settings})
        prompts = None if prompt is None else prompt.expand(len(found), -1)
        texts, _ = generate_text(ran.model, memory(ran), _vocabulary(ran), config, prompts)
        for row, text in zip(found, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        return found

    return write


def _captions(case: Case) -> Mapping[str, Output]:
    prompt = torch.cat([torch.tensor([_bos(case)]), case.inputs["prompt_ids"][1:-1]])[None]
    given: dict[str, Any] = {"prompt": prompt, "max_length": 14, "min_length": 6, "score_length": "all"}

    def write(name: str, **settings: Any) -> Output:
        return generated(name, lambda ran: ran[IMAGE], **given, **settings)

    return {
        "image_embeds": lambda ran: ran[IMAGE].states,
        "lm_logits": lambda ran: ran.head("lm", ran[WRITTEN].states),
        "loss": lambda ran: ran.loss("lm"),
        "generate_greedy": write("generate_greedy"),
        "generate_beam3": write("generate_beam3", method="beam"),
        "generate_beam2_rep15": write("generate_beam2_rep15", method="beam", beams=2, repetition_penalty=1.5),
    }


def _matched(case: Case) -> Mapping[str, Output]:
    taught = {side: Embed(side, teacher=True) for side in ("image", "text")}
    return {
        "image_embeds": lambda ran: ran[IMAGE].states,
        "text_embeds": lambda ran: ran[TEXT].states,
        "fused": lambda ran: ran[Fuse()].text.states,
        "fusion_pos": lambda ran: ran[Fuse()].text.states,
        "fusion_neg": lambda ran: ran[FALSE].text.states,
        "image_feat": lambda ran: ran[Embed("image")],
        "text_feat": lambda ran: ran[Embed("text")],
        "image_feat_m": lambda ran: ran[taught["image"]],
        "text_feat_m": lambda ran: ran[taught["text"]],
        "itm_logits": lambda ran: ran.head("itm", _pooled(ran)),
        "itc_similarity": lambda ran: similarities(ran[Embed("image")], ran[Embed("text")], torch.zeros(1)),
        "lm_logits": lambda ran: ran.head("lm", ran[WRITTEN].states),
        "after_image_queue": lambda ran: ran.model.objectives["itc"].queue.image.T,
        "after_text_queue": lambda ran: ran.model.objectives["itc"].queue.text.T,
        "after_queue_ptr": lambda ran: ran.model.objectives["itc"].queue.pointer,
        "after_ptr_queue": lambda ran: ran.model.objectives["itc"].queue.pointer,
        "after_idx_queue": lambda ran: ran.model.objectives["itc"].queue.image_id[None],
        "loss_ita": lambda ran: ran.loss("itc"),
        "loss_itm": lambda ran: ran.loss("itm"),
        "loss_lm": lambda ran: ran.loss("lm"),
    }


def _pooled(ran: Ran) -> Tensor:
    """True pairs, then the drawn ones where there are."""
    return torch.cat([ran[one].pooled for one in (Fuse(), FALSE) if one in ran.results])


def _text_losses(ran: Ran) -> Tensor:
    writer = ran.model.objectives["lm"]
    assert isinstance(writer, Lm)
    return writer.losses(ran.results, ran.batch)


def _answers(case: Case) -> Mapping[str, Output]:
    def question(ran: Ran) -> Tokens:
        return ran[Fuse()].text

    def rank(ran: Ran) -> Tensor:
        candidates = _written(case, _text(case, "answer."))
        return rank_answers(ran.model, question(ran), candidates, int(case.inputs["k_test"]))[0][:, 0]

    # Generation reads the padding of the questions too.
    settings: dict[str, Any] = {"method": "beam", "max_length": 10, "min_length": 1, "score_length": "all"}
    return {
        "image_embeds": lambda ran: ran[IMAGE].states,
        "question_states": lambda ran: question(ran).states,
        "answer_logits": lambda ran: ran.head("lm", ran[ANSWERED].states),
        "answer_loss": _text_losses,
        "loss": lambda ran: ran.loss("lm"),
        "rank_max_ids": rank,
        "generate_beam3": generated("generate_beam3", lambda ran: replace(question(ran), keep=None), **settings),
    }


def _text_keep(*names: str, rows: str = "text.attention_mask") -> Callable[[Case], Mapping[str, Tensor]]:
    return lambda case: {name: case.inputs[rows].bool() for name in names}


def _pair_keep(case: Case) -> Mapping[str, Tensor]:
    keep = case.inputs["text.attention_mask"].bool()
    found = dict.fromkeys(("text_embeds", "fused", "fusion_pos", "lm_logits"), keep)
    if "replay.neg_text_idx" in case.inputs:
        found["fusion_neg"] = torch.cat([keep, keep[case.inputs["replay.neg_text_idx"]]])
    return found


def _draws(case: Case) -> Mapping[str, Tensor]:
    found = {"itm.image": "replay.neg_image_idx", "itm.text": "replay.neg_text_idx"}
    return {ours: case.inputs[theirs] for ours, theirs in found.items()}


def _share(case: Case) -> Mapping[str, Any]:
    return {"objectives": {"itc": {"distill": float(case.inputs["alpha"])}}}


def _hf_text(case: Case) -> Texts:
    return Texts(case.inputs["input_ids"], case.inputs["attention_mask"].bool())


def _hf_labels(case: Case, text: Texts) -> Texts:
    """As the decoder reads it; the recorded labels are those of the ids themselves."""
    labels = case.inputs["labels"].roll(-1, 1)
    labels[:, -1] = -100
    return replace(text, attention="causal", labels=labels)


def _hf_pairs(case: Case, loaded: Loaded) -> Batch:
    text = _hf_text(case)
    texts = {"clean": text}
    if "decoder_input_ids" in case.inputs:
        answers = Texts(case.inputs["decoder_input_ids"], case.inputs["decoder_attention_mask"].bool())
        texts[ANSWERS] = _hf_labels(case, answers)
    elif "labels" in case.inputs:
        texts["causal"] = _hf_labels(case, text)
    return Batch({"clean": Images(case.inputs["pixel_values"])}, texts)


def _hf_captions(case: Case) -> Mapping[str, Output]:
    prompt = case.inputs["input_ids"][:, :3]  # of the four given ids transformers drops the last

    def write(name: str, **settings: Any) -> Output:
        return generated(name, lambda ran: ran[IMAGE], **settings)

    return {
        "image_embeds": lambda ran: ran[IMAGE].states,
        "logits": lambda ran: ran.head("lm", ran[WRITTEN].states),
        "loss": lambda ran: ran.loss("lm"),
        "greedy_ids": write("greedy_ids"),
        "greedy_prompt_ids": write("greedy_prompt_ids", prompt=prompt),
        "beam3_ids": write("beam3_ids", method="beam"),
    }


def _hf_answers(case: Case) -> Mapping[str, Output]:
    return {
        "image_embeds": lambda ran: ran[IMAGE].states,
        "question_states": lambda ran: ran[Fuse()].text.states,
        "decoder_logits": lambda ran: ran.head("lm", ran[ANSWERED].states),
        "loss": lambda ran: ran.loss("lm"),
        "greedy_ids": generated("greedy_ids", lambda ran: ran[Fuse()].text),
    }


_EMBEDS = (IMAGE, TEXT, Embed("image"), Embed("text"), Fuse())
_TAUGHT = (Embed("image", teacher=True), Embed("text", teacher=True))
ADAPTERS: dict[str, Adapter] = {
    "blip_decoder": Adapter(_pairs, _captions, lambda case: (IMAGE, WRITTEN), _text_keep("lm_logits"), config=_config),
    "blip_itm": Adapter(_pairs, _matched, lambda case: _EMBEDS, _pair_keep, config=_config, objectives=lambda case: ()),
    "blip_pretrain": Adapter(
        _pairs, _matched, lambda case: (*_EMBEDS, *_TAUGHT, FALSE, WRITTEN), _pair_keep, _draws, _config, _share
    ),
    "blip_retrieval(_negall)?": Adapter(
        _pairs, _matched, lambda case: (*_EMBEDS, *_TAUGHT, FALSE), _pair_keep, _draws, _config, _share
    ),
    "blip_feature_extractor": Adapter(
        _pairs,
        lambda case: {
            "image": lambda ran: ran[IMAGE].states,
            "text": lambda ran: ran[TEXT].states,
            "multimodal": lambda ran: ran[Fuse()].text.states,
        },
        lambda case: (IMAGE, TEXT, Fuse()),
        _text_keep("text", "multimodal"),
        config=_config,
    ),
    "blip_nlvr(_merge)?": Adapter(
        _two_images,
        lambda case: {
            "prediction": lambda ran: ran.head("answer", ran[Fuse()].pooled),
            "hidden": lambda ran: ran[Fuse()].text.states,
            "loss": lambda ran: ran.loss("answer"),
        },
        lambda case: (Fuse(),),
        _text_keep("hidden"),
        config=_config,
    ),
    "blip_vqa_train": Adapter(
        _questions,
        _answers,
        lambda case: (IMAGE, Fuse(), ANSWERED),
        lambda case: {
            **_text_keep("question_states", rows="question.attention_mask")(case),
            **_text_keep("answer_logits", rows="answer.attention_mask")(case),
        },
        config=_config,
    ),
    "blip_vqa_infer": Adapter(_questions, _answers, lambda case: (Fuse(),), config=_config),
    "hf_blip_caption(_smooth)?": Adapter(
        _hf_pairs, _hf_captions, lambda case: (IMAGE, WRITTEN), _text_keep("logits", rows="attention_mask")
    ),
    "hf_blip_itm": Adapter(
        _hf_pairs,
        lambda case: {
            **_matched(case),
            "text_fused": lambda ran: ran[Fuse()].text.states,
            "text_unimodal": lambda ran: ran[TEXT].states,
        },
        lambda case: _EMBEDS,
        _text_keep("text_fused", "text_unimodal", rows="attention_mask"),
        objectives=lambda case: (),
    ),
    "hf_blip_vqa": Adapter(
        _hf_pairs,
        _hf_answers,
        lambda case: (IMAGE, Fuse(), ANSWERED),
        lambda case: {
            "question_states": case.inputs["attention_mask"].bool(),
            "decoder_logits": case.inputs["decoder_attention_mask"].bool(),
        },
        # transformers 5 leaves the question's mask out where the decoder reads it, and in generation all versions do.
        settings=lambda case: {"model": {"decoder": {"reads_padding": True}}},
    ),
}
"""Which adapter reads which cases."""
