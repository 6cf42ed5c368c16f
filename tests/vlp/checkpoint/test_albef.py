"""ALBEF's checkpoints: stand-ins by a reference of our own for cases that are not recorded here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from albef_reference import Names, State, bert, followed, linear, some_texts, vit, word_logits
from standins import GOLDENS, stand_in, verdict
from torch import Tensor
from torch.nn import functional as F

import vlp
from scripts.goldens.albef import config as authors_config
from scripts.goldens.base import Case
from vlp.checkpoint.export import convert

WIDTH, MEMORY, HEADS, LAYERS, SPLIT = 16, 24, 4, 4, 2
ALPHA = 0.4
FILE = {"file": "model.pth", "key": "model"}


def config(**more: Any) -> dict[str, Any]:
    bert_config = {"num_attention_heads": HEADS, "hidden_dropout_prob": 0.1, "layer_norm_eps": 1e-12}
    return {"distill": True, "_bert": bert_config, "_vit": {"num_heads": HEADS}, **more}


def names(layers: int = LAYERS, split: int = SPLIT, memory: int = MEMORY) -> Names:
    made = Names()
    made.vit("visual_encoder.", memory, 2, 8, 17)
    made.bert("text_encoder.", WIDTH, layers, split, memory)
    return made


def text_inputs(name: str, ids: Tensor, keep: Tensor) -> State:
    return {f"{name}.input_ids": ids, f"{name}.attention_mask": keep.long()}


@pytest.mark.parametrize("task", ["ve", "nlvr"])
def test_verdicts(tmp_path: Path, task: str) -> None:
    two = task == "nlvr"
    made = names(18, 6) if two else names()
    made.linear("cls_head.0", WIDTH, WIDTH)
    made.linear("cls_head.2", 2 if two else 3, WIDTH)
    if two:
        made.share_keys("text_encoder.", 6, 18)
    made.add_twins("visual_encoder", "text_encoder", "cls_head")
    ids, keep = some_texts(3)
    pixels, targets = torch.randn(6 if two else 3, 3, 32, 32), torch.tensor([0, 1, 1] if two else [2, 0, 1])

    def predict(weights: State) -> tuple[Tensor, Tensor]:
        images = vit(weights, "visual_encoder.", pixels, HEADS)
        hidden = bert(weights, "text_encoder.", ids, keep, HEADS, images.split(3))
        return hidden, linear(weights, "cls_head.2", linear(weights, "cls_head.0", hidden[:, 0]).relu())

    def reference(leaves: State) -> State:
        state = made.tied(leaves)
        hidden, prediction = predict(state)
        with torch.no_grad():
            _, believed = predict(followed(state))
        soft = -(prediction.log_softmax(1) * believed.softmax(1)).sum(1).mean()
        loss = (1 - ALPHA) * F.cross_entropy(prediction, targets) + ALPHA * soft
        return {"prediction": prediction, "hidden": hidden, "loss": loss}

    given = {"image": pixels, **text_inputs("text", ids, keep), "targets": targets, "alpha": torch.tensor(ALPHA)}
    found = verdict(stand_in(tmp_path / f"albef_{task}", made.state, given, reference, config(), **FILE))
    assert found.passed, found.line()
    assert found.gradients > 50


def test_text_assignment(tmp_path: Path) -> None:
    made = names(18, 6)
    made.linear("vision_proj", 8, MEMORY)
    made.linear("text_proj", 8, WIDTH)
    made.linear("ta_head", 3, WIDTH)
    made.state["temp"] = torch.tensor(0.07)
    made.share_keys("text_encoder.", 6, 18)
    ids, keep = some_texts(4)
    given = {"image": torch.randn(4, 3, 32, 32), **text_inputs("text", ids, keep)}
    # Draws of each row (its own is shown if > 1/3, the other image or two others, its own comes first if > 1/2), and
    # the two images and the label that they make.
    draws = [([0.9], [2], [0.7]), ([0.5], [3], [0.2]), ([0.1], [3, 1]), ([0.4], [0], [0.6])]
    pairs, labels = torch.tensor([[0, 2], [3, 1], [3, 1], [3, 0]]), torch.tensor([0, 1, 2, 0])
    for number, value in enumerate(one for row in draws for one in row):
        given[f"draw.{number:03d}.any"] = torch.tensor(value)

    def reference(leaves: State) -> State:
        state = made.tied(leaves)
        images = vit(state, "visual_encoder.", given["image"], HEADS)
        hidden = bert(state, "text_encoder.", ids, keep, HEADS, (images[pairs[:, 0]], images[pairs[:, 1]]))
        prediction = linear(state, "ta_head", hidden[:, 0])
        return {"prediction": prediction, "loss": F.cross_entropy(prediction, labels)}

    case = stand_in(tmp_path / "albef_pretrain_nlvr", made.state, given, reference, config(), **FILE)
    found = verdict(case)
    assert found.passed, found.line()
    assert any("text_proj" in one for one in vlp.load(case.weights, config=authors_config(case)).report.ignored)


def test_vqa_with_a_teacher(tmp_path: Path) -> None:
    made = names(memory=WIDTH)
    made.bert("text_decoder.bert.", WIDTH, 6, 0, WIDTH)
    made.word_head("text_decoder.cls.predictions.", "text_decoder.bert.embeddings.word_embeddings.weight", WIDTH)
    made.add_twins("visual_encoder", "text_encoder", "text_decoder")
    (ids, keep), (answer, answer_keep) = some_texts(3), some_texts(5, 6, seed=2)
    owner, weights = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0.6, 0.4, 1.0, 0.3, 0.7])
    pixels = torch.randn(3, 3, 32, 32)
    labels = answer[:, 1:].masked_fill(answer[:, 1:] == 0, -100)

    def write(weights: State) -> tuple[Tensor, Tensor]:
        images = vit(weights, "visual_encoder.", pixels, HEADS)
        question = bert(weights, "text_encoder.", ids, keep, HEADS, (images,))
        states = bert(
            weights, "text_decoder.bert.", answer, answer_keep, HEADS, (question[owner],), keep[owner], causal=True
        )
        return question, word_logits(weights, "text_decoder.cls.predictions.", states)

    def reference(leaves: State) -> State:
        state = made.tied(leaves)
        question, logits = write(state)
        with torch.no_grad():
            soft = write(followed(state))[1][:, :-1].softmax(-1)
        hard = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none").view(5, -1).sum(1)
        distilled = (-(soft * logits[:, :-1].log_softmax(-1)).sum(-1) * (labels != -100)).sum(1)
        each = (1 - ALPHA) * hard + ALPHA * distilled
        loss = (weights * each).sum() / 3
        return {"question_states": question, "answer_logits": logits, "answer_loss": each, "loss": loss}

    given = {
        "image": pixels,
        **text_inputs("question", ids, keep),
        **text_inputs("answer", answer, answer_keep),
        **{f"k.{row}": (owner == row).sum() for row in range(3)},
        "weights": weights,
        "alpha": torch.tensor(ALPHA),
    }
    found = verdict(stand_in(tmp_path / "albef_vqa_train", made.state, given, reference, config(), **FILE))
    assert found.passed, found.line()


def test_sizes_that_a_file_cannot_tell_are_assumed_and_said(tmp_path: Path) -> None:
    case = Case(GOLDENS / "albef_retrieval")
    told = vlp.load(case.weights, config=authors_config(case)).report
    assert not any("heads" in note for note in told.notes)
    assumed = vlp.load(case.weights).report
    assert sum("heads" in note for note in assumed.notes) == 2
    assert any("position_ids" in name for name in assumed.ignored)


def test_a_damaged_copy_is_refused(tmp_path: Path) -> None:
    state = torch.load(GOLDENS / "albef_pretrain" / "model.pth", weights_only=True)["model"]
    state["text_encoder.cls.predictions.decoder.weight"] = state["text_encoder.cls.predictions.decoder.weight"] + 1
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="one weight in this family, but differ"):
        vlp.load(tmp_path / "model.pth")


def test_a_file_without_heads_and_twins_loads(tmp_path: Path) -> None:
    state = torch.load(GOLDENS / "albef_retrieval" / "model.pth", weights_only=True)["model"]
    bare = {n: t for n, t in state.items() if n.startswith(("visual_encoder.", "text_encoder."))}
    torch.save(bare, tmp_path / "bare.pth")
    loaded = vlp.load(tmp_path / "bare.pth")
    assert loaded.model.teacher is None and not loaded.model.objectives and loaded.model.fusion is not None


def test_another_image_size_resizes_student_and_teacher(tmp_path: Path) -> None:
    case = Case(GOLDENS / "albef_retrieval")
    loaded = vlp.load(case.weights, settings={"model": {"vision": {"image_size": 48}}})
    assert set(loaded.report.resized) == {"vision.vit.pos_embed", "teacher.vision.vit.pos_embed"}


def test_retrieval_as_the_repository_evaluates_it(tmp_path: Path) -> None:
    """Candidates by embeddings, ranked by the matching head; query by query."""
    import numpy as np

    stored = torch.load(GOLDENS / "albef_retrieval" / "model.pth", weights_only=True)["model"]
    recorded = Case(GOLDENS / "albef_retrieval").config
    ids, keep = some_texts(6)
    given = {"images": torch.randn(4, 3, 32, 32), **text_inputs("text", ids, keep)}
    owners = {0: [0, 1], 1: [2, 3], 2: [4], 3: [5]}

    def reference(state: State) -> State:
        heads = recorded["_vit"]["num_heads"]
        images = vit(state, "visual_encoder.", given["images"], heads)
        texts = bert(state, "text_encoder.", ids, keep, heads, stop=2)
        image = F.normalize(linear(state, "vision_proj", images[:, 0]), dim=-1)
        text = F.normalize(linear(state, "text_proj", texts[:, 0]), dim=-1)
        similar, scores = (image @ text.T), {"i2t": torch.full((4, 6), -100.0), "t2i": torch.full((6, 4), -100.0)}
        for name, table in (("i2t", similar), ("t2i", similar.T)):
            for query in range(len(table)):
                for key in table[query].topk(3).indices.tolist():
                    i, t = (query, key) if name == "i2t" else (key, query)
                    one = slice(t, t + 1)
                    fused = bert(
                        state,
                        "text_encoder.",
                        ids[one],
                        keep[one],
                        heads,
                        (images[i : i + 1],),
                        start=2,
                        states=texts[one],
                    )
                    scores[name][query, key] = linear(state, "itm_head", fused[:, 0])[0, 1]
        ranks = []
        for query, row in enumerate(scores["i2t"].detach().numpy()):
            order = np.argsort(row)[::-1].tolist()
            ranks.append(min(order.index(t) for t in owners[query]))
        found = [100 * sum(r < k for r in ranks) / 4 for k in (1, 5, 10)]
        ranks = [
            np.argsort(row)[::-1].tolist().index(min(t // 2, 3)) for t, row in enumerate(scores["t2i"].detach().numpy())
        ]
        found += [100 * sum(r < k for r in ranks) / 6 for k in (1, 5, 10)]
        metrics = torch.tensor([*found, sum(found) / 6])
        return {"score_i2t": scores["i2t"], "score_t2i": scores["t2i"], "metrics": metrics}

    found = verdict(stand_in(tmp_path / "albef_retrieval_eval", stored, given, reference, recorded, **FILE))
    assert found.passed, found.line()


def torchmultimodal_names(state: State) -> State:
    """An ALBEF retrieval file under torchmultimodal's names."""
    albef, found = "model_with_similarity.albef_model.", {}
    layer = {
        "attention.self.query": "attention.query",
        "attention.self.key": "attention.key",
        "attention.self.value": "attention.value",
        "attention.output.dense": "attention.output",
        "attention.output.LayerNorm": "attention_layernorm",
        "crossattention.self.query": "cross_attention.query",
        "crossattention.self.key": "cross_attention.key",
        "crossattention.self.value": "cross_attention.value",
        "crossattention.output.dense": "cross_attention.output",
        "crossattention.output.LayerNorm": "cross_attention_layernorm",
        "intermediate.dense": "feedforward.model.0",
        "output.LayerNorm": "feedforward_layernorm",
    }
    block = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.proj": "self_attention.out_proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
    }
    for name, tensor in state.items():
        twin = "_m" if "_m." in name else ""
        part, _, rest = name.replace("_m.", ".", 1).partition(".")
        stem, _, kind = rest.rpartition(".")
        if part == "visual_encoder":
            rest = rest.replace("cls_token", "class_token").replace("pos_embed", "encoder.pos_embedding")
            rest = rest.replace("patch_embed.proj", "conv_proj") if "patch" in rest else rest
            rest = f"encoder.ln.{kind}" if stem == "norm" else rest
            if stem.startswith("blocks."):
                _, number, inner = stem.split(".", 2)
                inner = f"self_attention.in_proj_{kind}" if inner == "attn.qkv" else f"{block[inner]}.{kind}"
                rest = f"encoder.layers.encoder_layer_{number}.{inner}"
            found[f"{albef}vision_encoder{twin}.encoder.{rest}"] = tensor
        elif part == "text_encoder" and "embeddings" in rest:
            if "position_ids" not in rest:
                found[f"{albef}text_encoder{twin}.{rest.replace('LayerNorm', 'layer_norm')}"] = tensor
        elif part == "text_encoder":
            _, _, number, inner = stem.split(".", 3)
            fused = int(number) >= SPLIT
            ours = layer.get(inner, f"feedforward.model.{2 if fused else 3}")
            tower = (
                f"multimodal_encoder{twin}.layer.{int(number) - SPLIT}"
                if fused
                else f"text_encoder{twin}.encoder.layer.{number}"
            )
            found[f"{albef}{tower}.{ours}.{kind}"] = tensor
        elif part == "itm_head":
            found[name] = tensor
        else:
            found[f"model_with_similarity.{name}"] = tensor
    return found


def test_torchmultimodal(tmp_path: Path) -> None:
    # torchmultimodal's fusion is as wide as its images.
    made = Names()
    made.vit("visual_encoder.", WIDTH, 2, 8, 17)
    made.bert("text_encoder.", WIDTH, LAYERS, SPLIT, WIDTH)
    for name in ("vision_proj", "text_proj", "itm_head"):
        made.linear(name, 2 if name == "itm_head" else 8, WIDTH)
    made.state["temp"] = torch.tensor(0.07)
    made.add_twins("visual_encoder", "text_encoder", "vision_proj", "text_proj")
    for name in ("image_queue", "text_queue"):
        made.state[name] = F.normalize(torch.randn(8, 12), dim=0)
    made.state |= {
        "queue_ptr": torch.tensor([4]),
        "idx_queue": torch.tensor([[5, 1, 2, 12, 3, 4, 6, 7, 9, -100, -100, 8]]),
    }
    back = {id(tensor): name for name, tensor in made.state.items()}
    theirs = torchmultimodal_names(made.state)
    ids, keep = some_texts(4)
    given = {"image": torch.randn(4, 3, 32, 32), "text": ids, "mask": keep.long(), "idx": torch.tensor([5, 8, 5, 12])}
    given |= {"replay.neg_image_idx": torch.tensor([1, 2, 0, 0]), "replay.neg_text_idx": torch.tensor([2, 3, 1, 1])}

    def embed(state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images = vit(state, "visual_encoder.", given["image"], HEADS)
        texts = bert(state, "text_encoder.", ids, keep, HEADS, stop=SPLIT)
        image = F.normalize(linear(state, "vision_proj", images[:, 0]), dim=-1)
        return images, texts, image, F.normalize(linear(state, "text_proj", texts[:, 0]), dim=-1)

    def reference(leaves: State) -> State:
        state = {back[id(theirs[name])]: leaf for name, leaf in leaves.items()}
        images, texts, image, text = embed(state)
        with torch.no_grad():
            _, _, image_m, text_m = embed(followed(state))
        both = [
            torch.cat([new, state[f"{name}_queue"].detach().T]) for name, new in (("image", image_m), ("text", text_m))
        ]
        same = given["idx"][:, None] == torch.cat([given["idx"], state["idx_queue"][0]])
        target, itc = same / same.sum(1, keepdim=True), torch.tensor(0.0)
        for own, own_m, other in ((image, image_m, both[1]), (text, text_m, both[0])):
            soft = ALPHA * (own_m @ other.T / state["temp"]).softmax(1).detach() + (1 - ALPHA) * target
            itc = itc - (soft * (own @ other.T / state["temp"]).log_softmax(1)).sum(1).mean() / 2
        pairs = torch.arange(4).repeat(3), torch.arange(4).repeat(3)
        pairs[0][4:8], pairs[1][8:] = given["replay.neg_image_idx"], given["replay.neg_text_idx"]
        fused = bert(
            state,
            "text_encoder.",
            ids[pairs[1]],
            keep[pairs[1]],
            HEADS,
            (images[pairs[0]],),
            start=SPLIT,
            states=texts[pairs[1]],
        )
        logits = linear(state, "itm_head", fused[:, 0])
        itm = F.cross_entropy(logits, torch.tensor([1] * 4 + [0] * 8))
        return {"image_feat": image, "text_feat": text, "itm_score": logits[:4, 1], "loss": itc + itm}

    arguments = {"num_attention_heads": HEADS}
    told = {"vision_encoder_args": arguments, "text_encoder_args": arguments, "multimodal_encoder_args": arguments}
    found = verdict(
        stand_in(tmp_path / "tmm_albef_retrieval", theirs, given, reference, told, file="model.pt", key="model")
    )
    assert found.passed, found.line()


def same_file(stored: State, written: State) -> None:
    assert stored.keys() == written.keys(), sorted(stored.keys() ^ written.keys())[:5]
    for name, tensor in stored.items():
        assert written[name].dtype == tensor.dtype, name
        torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("name", ["albef_pretrain", "albef_retrieval", "albef_vqa_train_nodistill"])
def test_there_and_back(tmp_path: Path, name: str) -> None:
    """The authors' file comes out as it went in: twins, queues and what is stored twice included."""
    case = Case(GOLDENS / name)
    loaded = vlp.load(case.weights, config=authors_config(case))
    convert(loaded, tmp_path / "out", "albef")
    stored = torch.load(case.weights, weights_only=True)["model"]
    # A teacher's fusion that nothing asks for is not kept; it begins as its student there.
    written = torch.load(tmp_path / "out" / "model.pth", weights_only=True)["model"]
    unread = [
        n for n in stored if name == "albef_retrieval" and "_m." in n and "layer." in n and int(n.split(".")[3]) >= 2
    ]
    for one in unread:
        assert torch.equal(written[one], stored[one.replace("_m.", ".", 1)])
    same_file(
        {n: t for n, t in stored.items() if n not in unread}, {n: t for n, t in written.items() if n not in unread}
    )
    again = vlp.load(tmp_path / "out" / "model.pth")  # whose config.json says the heads
    for weight, other in zip(loaded.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(other, weight, rtol=1e-6, atol=0)
    assert not any("heads" in note for note in again.report.notes)


def test_verdicts_on_two_images_go_back(tmp_path: Path) -> None:
    made = names(18, 6)
    made.linear("cls_head.0", WIDTH, WIDTH)
    made.linear("cls_head.2", 2, WIDTH)
    made.share_keys("text_encoder.", 6, 18)
    made.add_twins("visual_encoder", "text_encoder", "cls_head")
    torch.save({"model": made.state}, tmp_path / "nlvr.pth")
    loaded = vlp.load(
        tmp_path / "nlvr.pth", config={"bert_config": {"num_attention_heads": HEADS}, "vit": {"num_heads": HEADS}}
    )
    convert(loaded, tmp_path / "out", "albef")
    same_file(made.state, torch.load(tmp_path / "out" / "model.pth", weights_only=True)["model"])


def test_other_models_do_not_go(tmp_path: Path) -> None:
    loaded = vlp.load(GOLDENS / "xvlm_pretrain_swin_region" / "model.pth")
    with pytest.raises(ValueError, match="no plain ViT"):
        convert(loaded, tmp_path / "out", "albef")
