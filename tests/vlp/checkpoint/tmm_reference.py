"""FLAVA and CoCa as torchmultimodal computes them, in plain tensor operations on its state dicts' names."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
HEADS = 4


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def words(w: Weights, name: str, ids: Tensor) -> Tensor:
    """The padding's own embedding, id 0, is read but not trained, as both models have it."""
    return F.embedding(ids, w[f"{name}.weight"], padding_idx=0)


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def mix(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Multi-head attention in six lines."""
    query, key, value = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def attend(w: Weights, name: str, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
    if f"{name}.input_proj.weight" in w:
        return linear(w, f"{name}.output_proj", mix(*linear(w, f"{name}.input_proj", x).chunk(3, -1), mask))
    apart = f"{name}.q_proj.weight" in w
    names = ("q_proj", "k_proj", "v_proj", "output_proj") if apart else ("query", "key", "value", "output")
    query, key, value = (linear(w, f"{name}.{n}", y) for n, y in zip(names, (x, memory, memory), strict=False))
    return linear(w, f"{name}.{names[3]}", mix(query, key, value, mask))


def stack(
    w: Weights, name: str, x: Tensor, eps: float, mask: Tensor | None = None, memory: Tensor | None = None
) -> Tensor:
    """Pre-norm layers."""
    number = 0
    while f"{name}layer.{number}.attention_layernorm.weight" in w:
        layer = f"{name}layer.{number}."
        y = norm(w, layer + "attention_layernorm", x, eps)
        x = x + attend(w, layer + "attention", y, y, mask)
        if memory is not None:
            y = norm(w, layer + "cross_attention_layernorm", x, eps)
            x = x + attend(w, layer + "cross_attention", y, memory, None)
        y = F.gelu(linear(w, layer + "feedforward.model.0", norm(w, layer + "feedforward_layernorm", x, eps)))
        last = "2" if f"{layer}feedforward.model.2.weight" in w else "3"
        x = x + linear(w, f"{layer}feedforward.model.{last}", y)
        number += 1
    return x


def patches(w: Weights, name: str, image: Tensor, hidden: Tensor | None) -> Tensor:
    weight = w[f"{name}.weight"]
    x = F.conv2d(image, weight, w[f"{name}.bias"], stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    if hidden is None:
        return x
    return torch.where(hidden.flatten(1)[:, :, None], w["model.image_encoder.embeddings.mask_token"], x)


def flava(w: Weights, given: Weights) -> Weights:
    """Outputs and losses of FLAVAForPreTraining."""
    eps, model = 1e-12, "model."

    def image(hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        embed = model + "image_encoder.embeddings."
        x = patches(w, embed + "patch_embeddings.projection", given["image"], hidden)
        x = torch.cat([w[embed + "cls_token"].expand(len(x), -1, -1), x], 1) + w[embed + "position_embeddings"]
        x = stack(w, model + "image_encoder.encoder.", x, eps)
        return x, norm(w, model + "image_encoder.layernorm", x, eps)

    def text(ids: Tensor) -> tuple[Tensor, Tensor]:
        embed = model + "text_encoder.embeddings."
        x = words(w, embed + "word_embeddings", ids) + w[embed + "token_type_embeddings.weight"][0]
        x = norm(w, embed + "layer_norm", x + w[embed + "position_embeddings.weight"][: ids.shape[1]], eps)
        x = stack(w, model + "text_encoder.encoder.", x, eps, (ids != 0)[:, None, None])
        return x, norm(w, model + "text_encoder.layernorm", x, eps)

    clean_image, clean_text = image(None)[1], text(given["text"])[1]
    hidden = given["image_patches_mask"].flatten(1)
    parts = image(hidden)[0], text(given["text_masked"])[0]
    sides = [linear(w, f"{model}{n}_to_mm_projection", x) for n, x in zip(("image", "text"), parts, strict=True)]
    x = torch.cat([w[model + "mm_encoder.cls_token"].expand(len(hidden), -1, -1), *sides], 1)
    fused = norm(w, model + "mm_encoder.layernorm", stack(w, model + "mm_encoder.encoder.", x, eps), eps)
    true = given["itm_labels"] != 0
    outputs = {"image_sequence": clean_image, "text_sequence": clean_text, "multimodal_masked": fused}
    for name, states in (("image", clean_image), ("text", clean_text)):
        outputs[f"projected_{name}"] = linear(w, f"{model}{name}_projection", states[:, 0])

    def masked(name: str, states: Tensor, labels: Tensor) -> Tensor:
        name, labels = f"loss.mmm_loss.{name}.cls", labels[true]
        x = states[true][labels != -1]
        x = norm(w, f"{name}.layer_norm", F.gelu(linear(w, f"{name}.dense", x)), 1e-5)
        return F.cross_entropy(F.linear(x, w[f"{name}.decoder.weight"], w[f"{name}.bias"]), labels[labels != -1])

    number = hidden.shape[1]
    codes = torch.where(hidden, given["codes"].flatten(1), -1)
    pooled = torch.tanh(linear(w, "loss.itm_loss.pooler.dense", fused[:, 0]))
    left, right = (F.normalize(outputs[f"projected_{name}"], dim=-1) for name in ("image", "text"))
    logits = w["loss.contrastive_loss.logit_scale"].exp() * left @ right.T
    own = torch.arange(len(true))
    return outputs | {
        "loss_mmm_text": masked("mlm", fused[:, -given["text"].shape[1] :], given["mlm_labels"]),
        "loss_mmm_image": masked("mim", fused[:, 2 : 2 + number], codes),
        "loss_itm": F.cross_entropy(linear(w, "loss.itm_loss.cls.seq_relationship", pooled), given["itm_labels"]),
        "loss_global_contrastive": (
            F.cross_entropy(logits[true], own[true]) + F.cross_entropy(logits.T[true], own[true])
        )
        / 2,
    }


def pool(w: Weights, name: str, x: Tensor) -> Tensor:
    query = norm(w, f"{name}ln_q", w[f"{name}query"], 1e-5).expand(len(x), -1, -1)
    x = norm(w, f"{name}ln_k", x, 1e-5)
    return norm(w, f"{name}ln_post", attend(w, f"{name}attn", query, x, None), 1e-5)


def coca(w: Weights, given: Weights, prefix: str = "model.") -> Weights:
    """Outputs and losses of CoCaForPretraining; with cascaded poolers outputs alone."""
    eps = 1e-5
    image, lower, upper = (f"{prefix}{name}." for name in ("vision_encoder", "text_decoder", "multimodal_decoder"))
    x = patches(w, image + "embeddings.conv_projection", given["image"], None)
    if f"{image}embeddings.cls_token" in w:
        x = torch.cat([w[image + "embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
    x = stack(w, image + "encoder.", x + w[image + "embeddings.position_embeddings"], eps)
    if f"{image}encoder.final_layer_norm.weight" in w:
        x = norm(w, image + "encoder.final_layer_norm", x, eps)
    cascaded = f"{prefix}vision_pooler.query" not in w
    if cascaded:
        memory = pool(w, prefix + "vision_pooler.poolers.0.", x)
        contrast = pool(w, prefix + "vision_pooler.poolers.1.", memory)
    else:
        found = pool(w, prefix + "vision_pooler.", x)
        contrast, memory = found[:, 0], found[:, 1:]
    ids, keep = given["text"][:, :-1], given["mask"][:, :-1].bool()
    length = ids.shape[1]
    token = w[lower + "embeddings.cls_embedding"].expand(len(ids), 1, -1)
    x = torch.cat([words(w, lower + "embeddings.token_embeddings", ids), token], 1)
    causal = torch.ones(length + 1, length + 1, dtype=torch.bool).tril()
    seen = causal.expand(len(ids), -1, -1).clone()
    seen[:, -1, 1:] = keep  # one place late, as its padding of the mask has it
    x = stack(w, lower + "transformer_decoder.", x + w[lower + "embeddings.position_embeddings"], eps, seen[:, None])
    text = linear(w, lower + "text_projection", norm(w, lower + "ln_final", x[:, -1], eps))
    x = stack(w, upper + "transformer_decoder.", x[:, :-1], eps, causal[:-1, :-1], memory)
    scores = linear(w, upper + "output_projection", norm(w, upper + "transformer_decoder.final_layer_norm", x, eps))
    left, right = F.normalize(linear(w, f"{prefix}vision_proj", contrast), dim=-1), F.normalize(text, dim=-1)
    outputs = {"image_pooled": left, "text_pooled": right, "multimodal_embeddings": scores}
    if cascaded:
        return outputs
    logits, own = w["contrastive_loss.logit_scale"].exp() * left @ right.T, torch.arange(len(ids))
    return outputs | {
        "loss_contrastive": (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2,
        "loss_captioning": F.cross_entropy(scores.flatten(0, 1), given["text"][:, 1:].flatten(), ignore_index=0),
    }
