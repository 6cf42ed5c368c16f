"""X-VLM's checkpoints: stand-ins by a reference of our own for cases that are not recorded here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from albef_reference import Names, State, attend, bert, linear, norm, some_texts, vit, word_logits
from standins import GOLDENS, stand_in, verdict
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou

import vlp
from objectives.box import generalised_iou

WIDTH, MEMORY, HEADS, LAYERS, SPLIT = 16, 24, 4, 4, 2
DEPTH, LOCAL, TOKENS = 4, 2, 17
FILE = {"file": "model.pth", "key": "model"}
CONFIG = {
    "_bert": {"num_attention_heads": HEADS, "hidden_dropout_prob": 0.1, "layer_norm_eps": 1e-12},
    "_vision": {
        "num_heads": HEADS,
        "num_attention_heads": HEADS,
        "local_attn_depth": LOCAL,
        "hidden_act": "quick_gelu",
    },
}


def clip_names(made: Names) -> None:
    """A CLIP tower, as transformers calls its parts."""
    tower = "vision_encoder."
    made.add(f"{tower}class_embedding", MEMORY)
    made.add(f"{tower}patch_embed.weight", MEMORY, 3, 8, 8)
    made.add(f"{tower}pos_embed.weight", TOKENS, MEMORY)
    made.state[f"{tower}position_ids"] = torch.arange(TOKENS)[None]
    for name in ("pre_layrnorm", "post_layernorm"):
        made.norm(tower + name, MEMORY)
    for number in range(DEPTH):
        layer = f"{tower}encoder.layers.{number}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            made.linear(f"{layer}self_attn.{name}", MEMORY, MEMORY)
        for name in ("layer_norm1", "layer_norm2"):
            made.norm(layer + name, MEMORY)
        made.linear(f"{layer}mlp.fc1", 2 * MEMORY, MEMORY)
        made.linear(f"{layer}mlp.fc2", MEMORY, 2 * MEMORY)


def clip(state: State, pixels: Tensor, owner: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures -> their regions, each reading its own tokens alone in the last blocks, and the pictures."""
    tower = "vision_encoder."
    x = F.conv2d(pixels, state[f"{tower}patch_embed.weight"], stride=8).flatten(2).mT
    x = torch.cat([state[f"{tower}class_embedding"].expand(len(x), 1, -1), x], 1) + state[f"{tower}pos_embed.weight"]
    x = norm(state, f"{tower}pre_layrnorm", x, 1e-5)

    def block(number: int, x: Tensor, seen: Tensor | None) -> Tensor:
        layer = f"{tower}encoder.layers.{number}."
        y = norm(state, f"{layer}layer_norm1", x, 1e-5)
        parts = [linear(state, f"{layer}self_attn.{one}_proj", y) for one in ("q", "k", "v")]
        x = x + linear(state, f"{layer}self_attn.out_proj", attend(*parts, HEADS, seen))
        inner = linear(state, f"{layer}mlp.fc1", norm(state, f"{layer}layer_norm2", x, 1e-5))
        return x + linear(state, f"{layer}mlp.fc2", inner * torch.sigmoid(1.702 * inner))

    for number in range(DEPTH - LOCAL):
        x = block(number, x, None)
    regions = x[owner]
    for number in range(DEPTH - LOCAL, DEPTH):
        x, regions = block(number, x, None), block(number, regions, seen[:, None])
    return tuple(norm(state, f"{tower}post_layernorm", one, 1e-5) for one in (regions, x))  # type: ignore[return-value]


def mlp_head(made: Names, name: str, outputs: int) -> None:
    made.linear(f"{name}.0", 2 * WIDTH, WIDTH)
    made.norm(f"{name}.1", 2 * WIDTH)
    made.linear(f"{name}.3", outputs, 2 * WIDTH)


def head(state: State, name: str, x: Tensor) -> Tensor:
    return linear(state, f"{name}.3", F.gelu(norm(state, f"{name}.1", linear(state, f"{name}.0", x), 1e-5)))


def contrastive_parts(made: Names) -> None:
    made.linear("vision_proj", 8, MEMORY)
    made.linear("text_proj", 8, WIDTH)
    made.state["temp"] = torch.tensor(0.07)
    mlp_head(made, "itm_head", 2)


def contrast(state: State, images: Tensor, texts: Tensor, same: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both embeddings, and the loss whose target is spread over ``same``."""
    image = F.normalize(linear(state, "vision_proj", images[:, 0]), dim=-1)
    text = F.normalize(linear(state, "text_proj", texts[:, 0]), dim=-1)
    logits, target = image @ text.T / state["temp"], same / same.sum(1, keepdim=True)
    loss = -(target * logits.log_softmax(1)).sum(1).mean() - (target * logits.T.log_softmax(1)).sum(1).mean()
    return image, text, loss / 2


def matching(
    state: State, prefix: str, given: State, images: Tensor, seen: Tensor, texts: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor]:
    pairs = torch.arange(len(texts)).repeat(3), torch.arange(len(texts)).repeat(3)
    number = len(texts)
    pairs[0][number : 2 * number], pairs[1][2 * number :] = given["replay.neg_image_idx"], given["replay.neg_text_idx"]
    memory, states = (images[pairs[0]],), texts[pairs[1]]
    fused = bert(state, prefix, keep, keep[pairs[1]], HEADS, memory, seen[pairs[0]], start=SPLIT, states=states)
    logits = head(state, "itm_head", fused[:, 0])
    return logits, F.cross_entropy(logits, torch.tensor([1] * number + [0] * 2 * number))


@pytest.mark.parametrize("kind", ["region", "image"])
def test_pretraining_with_a_clip_tower(tmp_path: Path, kind: str) -> None:
    made = Names(2)
    clip_names(made)
    made.bert("text_encoder.bert.", WIDTH, LAYERS, SPLIT, MEMORY)
    made.word_head("text_encoder.cls.predictions.", "text_encoder.bert.embeddings.word_embeddings.weight", WIDTH)
    contrastive_parts(made)
    mlp_head(made, "bbox_head", 4)
    ids, keep = some_texts(4)
    places, words = torch.tensor([[1, 2, 0], [2, 0, 0], [1, 0, 0], [2, 1, 0]]), torch.tensor([[9, 8, -100]] * 4)
    words[1:3, 1] = -100
    masked = ids.scatter(1, places[:, :1], 103)
    region = kind == "region"
    given = {"image": torch.randn(3 if region else 4, 3, 32, 32), "text_ids": ids, "text_atts": keep.long()}
    given |= {"text_ids_masked": masked, "masked_pos": places, "masked_ids": words}
    given |= {"replay.neg_image_idx": torch.tensor([1, 2, 0, 0]), "replay.neg_text_idx": torch.tensor([2, 3, 1, 1])}
    owner, seen = torch.arange(4), torch.ones(4, TOKENS, dtype=torch.bool)
    if region:
        owner = torch.tensor([0, 0, 1, 2])
        seen[1, 5:12], seen[3, 2:4] = False, False
        boxes = torch.tensor([[0.5, 0.5, 1, 1], [0.3, 0.4, 0.2, 0.3], [0.5, 0.5, 1, 1], [0.6, 0.5, 0.5, 0.4]])
        given |= {"idx_to_group_img": owner, "image_atts": seen.long(), "target_bbox": boxes}
        given |= {"is_image": torch.tensor([1, 0, 1, 0])}

    def reference(leaves: State) -> State:
        state, prefix = made.tied(leaves), "text_encoder.bert."
        regions, pictures = clip(state, given["image"], owner, seen)
        texts = bert(state, prefix, ids, keep, HEADS, stop=SPLIT)
        image, text, itc = contrast(state, regions, texts, torch.eye(4))
        logits, itm = matching(state, prefix, given, regions, seen, texts, keep)
        read = bert(state, prefix, masked, keep, HEADS, (regions,), seen)
        scores = word_logits(state, "text_encoder.cls.predictions.", read[torch.arange(4)[:, None], places])
        found = {
            "image_embeds": regions,
            "text_embeds": texts,
            "image_feat": image,
            "text_feat": text,
            "itm_logits": logits,
            "mlm_logits": scores,
            "loss_itc": itc,
            "loss_itm": itm,
            "loss_mlm": F.cross_entropy(scores.flatten(0, 1), words.flatten()),
        }
        if region:
            fused = bert(state, prefix, ids, keep, HEADS, (pictures[owner],), start=SPLIT, states=texts)
            predicted = head(state, "bbox_head", fused[:, 0]).sigmoid()
            corners = [box_convert(one, "cxcywh", "xyxy") for one in (predicted, boxes)]
            real = given["is_image"] == 0
            found |= {
                "image_embeds_fullatts": pictures,
                "bbox_pred": predicted,
                "loss_bbox": (predicted - boxes).abs()[real].sum() / real.sum(),
                "loss_giou": (1 - generalized_box_iou(*corners).diag())[real].sum() / real.sum(),
            }
        return found

    case = stand_in(tmp_path / f"xvlm_pretrain_clip_{kind}", made.state, given, reference, CONFIG, **FILE)
    found = verdict(case)
    assert found.passed, found.line()
    assert found.gradients > 100


def finetuned(memory: int = MEMORY, layers: int = LAYERS) -> Names:
    made = Names(3)
    made.vit("vision_encoder.", memory, 2, 8, TOKENS)
    made.bert("text_encoder.", WIDTH, layers, SPLIT, memory)
    return made


def test_retrieval(tmp_path: Path) -> None:
    made = finetuned()
    contrastive_parts(made)
    ids, keep = some_texts(4)
    given = {
        "image": torch.randn(4, 3, 32, 32),
        "text_ids": ids,
        "text_atts": keep.long(),
        "idx": torch.tensor([7, 3, 7, 1]),
    }
    given |= {"replay.neg_image_idx": torch.tensor([1, 2, 3, 0]), "replay.neg_text_idx": torch.tensor([3, 0, 1, 1])}

    def reference(leaves: State) -> State:
        state = made.tied(leaves)
        images = vit(state, "vision_encoder.", given["image"], HEADS)
        texts = bert(state, "text_encoder.", ids, keep, HEADS, stop=SPLIT)
        _, _, itc = contrast(state, images, texts, (given["idx"][:, None] == given["idx"]).float())
        seen = torch.ones(images.shape[:2], dtype=torch.bool)
        logits, itm = matching(state, "text_encoder.", given, images, seen, texts, keep)
        return {"itm_logits": logits, "loss_itc": itc, "loss_itm": itm}

    found = verdict(stand_in(tmp_path / "xvlm_retrieval", made.state, given, reference, CONFIG, **FILE))
    assert found.passed, found.line()


def test_nlvr(tmp_path: Path) -> None:
    layers = SPLIT + 2 * (LAYERS - SPLIT)
    made = finetuned(layers=layers)
    mlp_head(made, "cls_head", 2)
    made.share_keys("text_encoder.", SPLIT, layers)
    ids, keep = some_texts(2)
    given = {
        "image": torch.randn(4, 3, 32, 32),
        "text_ids": ids,
        "text_atts": keep.long(),
        "targets": torch.tensor([1, 0]),
    }

    def reference(leaves: State) -> State:
        state = made.tied(leaves)
        images = vit(state, "vision_encoder.", given["image"], HEADS)
        hidden = bert(state, "text_encoder.", ids, keep, HEADS, images.split(2))
        prediction = head(state, "cls_head", hidden[:, 0])
        return {"prediction": prediction, "loss": F.cross_entropy(prediction, given["targets"])}

    found = verdict(stand_in(tmp_path / "xvlm_nlvr", made.state, given, reference, CONFIG, **FILE))
    assert found.passed, found.line()


def test_vqa(tmp_path: Path) -> None:
    made = finetuned()
    made.bert("text_decoder.bert.", WIDTH, 2, 0, WIDTH)
    made.word_head("text_decoder.cls.predictions.", "text_decoder.bert.embeddings.word_embeddings.weight", WIDTH)
    (ids, keep), (answer, answer_keep) = some_texts(3), some_texts(5, 6, seed=2)
    candidates, candidate_keep = some_texts(8, 6, seed=3)
    owner, weights = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0.6, 0.4, 1.0, 0.3, 0.7])
    given: dict[str, Any] = {"image": torch.randn(3, 3, 32, 32), "weights": weights}
    for name, (one, mask) in {
        "question": (ids, keep), "answer": (answer, answer_keep), "cand": (candidates, candidate_keep),
    }.items():  # fmt: skip
        given |= {f"{name}.input_ids": one, f"{name}.attention_mask": mask.long()}

    def reference(leaves: State) -> State:
        state, decoder = made.tied(leaves), "text_decoder.bert."
        images = vit(state, "vision_encoder.", given["image"], HEADS)
        question = bert(state, "text_encoder.", ids, keep, HEADS, (images,))

        def losses(texts: Tensor, mask: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            states = bert(state, decoder, texts, mask, HEADS, (question[rows],), keep[rows], causal=True)
            logits = word_logits(state, "text_decoder.cls.predictions.", states)
            labels = texts[:, 1:].masked_fill(texts[:, 1:] == 0, -100)
            each = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none")
            return logits, each.view(len(texts), -1).sum(1)

        _, written = losses(answer, answer_keep, owner)
        best, shares = [], []
        for row in range(3):
            at = torch.full((8,), row)
            logits, each = losses(candidates, candidate_keep, at)
            first = logits[:, 0].softmax(1)[0, candidates[:, 1]]  # what is written first does not see what follows
            top, index = first.topk(4)
            share, order = (top.log() - each[index]).softmax(0).topk(4)
            best.append(index[order])
            shares.append(share)
        return {
            "topk_ids": torch.stack(best),
            "topk_probs": torch.stack(shares),
            "loss": (weights * written).sum() / 3,
        }

    found = verdict(stand_in(tmp_path / "xvlm_vqa", made.state, given, reference, CONFIG, **FILE))
    assert found.passed, found.line()


def test_generalised_overlap() -> None:
    boxes = torch.rand(50, 4).clamp(min=0.05), torch.rand(50, 4).clamp(min=0.05)
    wanted = generalized_box_iou(*(box_convert(one, "cxcywh", "xyxy") for one in boxes)).diag()
    torch.testing.assert_close(generalised_iou(*boxes), wanted)
    apart = generalised_iou(torch.tensor([[0.1, 0.1, 0.0, 0.0]]), torch.tensor([[0.1, 0.1, 0.0, 0.0]]))
    assert torch.isfinite(apart).all()


def test_a_swin_file_tells_its_own_sizes() -> None:
    """Without config= the size of the images follows from the stored masks of the shifted windows."""
    loaded = vlp.load(GOLDENS / "xvlm_pretrain_swin_region" / "model.pth")
    vision = loaded.model.config.vision
    assert vision.image_size == 64 and vision.arguments["window_size"] == 2
    assert any("attn_mask" in name for name in loaded.report.ignored)
