"""LXMERT and VisualBERT: the recorded cases, and transformers' own classes at random small sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from standins import GOLDENS, verdict
from torch import Tensor, nn
from transformers import (
    LxmertConfig,
    LxmertForPreTraining,
    LxmertForQuestionAnswering,
    LxmertModel,
    VisualBertConfig,
    VisualBertForPreTraining,
    VisualBertForQuestionAnswering,
    VisualBertForVisualReasoning,
    VisualBertModel,
)

import vlp
from encoders.types import Batch, Regions, Texts
from objectives.base import Fuse
from scripts.goldens.base import Case

WORDS = 60
TEXT_FIELDS = ("ids", "keep", "segments")
LXMERT = [
    {"l_layers": 3, "r_layers": 2, "x_layers": 2, "hidden_act": "gelu", "visual_feat_dim": 20, "heads": 4},
    {"l_layers": 1, "r_layers": 3, "x_layers": 1, "hidden_act": "relu", "visual_feat_dim": 9, "heads": 2},
    {"l_layers": 2, "r_layers": 2, "x_layers": 3, "hidden_act": "gelu", "visual_feat_dim": 12, "heads": 3},
]
VISUALBERT = [
    {"num_hidden_layers": 3, "hidden_act": "gelu", "visual_embedding_dim": 20, "heads": 4, "layer_norm_eps": 1e-12},
    {"num_hidden_layers": 2, "hidden_act": "relu", "visual_embedding_dim": 7, "heads": 2, "layer_norm_eps": 1e-5},
]


def shared(heads: int) -> dict[str, Any]:
    return {
        "vocab_size": WORDS, "hidden_size": 24, "num_attention_heads": heads, "intermediate_size": 40,
        "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def lxmert(which: int) -> LxmertConfig:
    more = {"num_object_labels": 11, "num_attr_labels": 9, "num_qa_labels": 13}
    sizes = dict(LXMERT[which])
    return LxmertConfig(**shared(sizes.pop("heads")), **more, **sizes)


def visualbert(which: int) -> VisualBertConfig:
    sizes = dict(VISUALBERT[which])
    return VisualBertConfig(**shared(sizes.pop("heads")), pad_token_id=0, **sizes)


def noisy(model: nn.Module) -> Any:
    """Noise in every parameter, also where the initial weights are zero, one or a copy."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def rows(regions: int = 7, words: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    kept, seen = (
        torch.arange(words) < torch.tensor([[words], [6], [8]]),
        torch.arange(regions) < torch.tensor([[regions], [5], [4]]),
    )
    return {
        "input_ids": torch.randint(1, WORDS, (3, words), generator=generator) * kept,
        "attention_mask": kept.long(),
        "token_type_ids": torch.randint(0, 2, (3, words), generator=generator),
        "visual_attention_mask": seen.long(),
    }


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("name", ["hf_lxmert", "hf_visualbert"])
def test_recorded(name: str) -> None:
    found = verdict(Case(GOLDENS / name))
    assert found.passed, found.line()


def record(
    folder: Path, model: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor], loss: Tensor | None
) -> Case:
    """Write a case as the goldens are."""
    model.save_pretrained(folder)
    if loss is not None:
        loss.backward()
        norms = {name: None if p.grad is None else float(p.grad.norm()) for name, p in model.named_parameters()}
        (folder / "grad_norms.json").write_text(json.dumps(norms))
    save_file({name: x.contiguous() for name, x in inputs.items()}, folder / "inputs.safetensors")
    save_file({name: x.detach().clone().contiguous() for name, x in outputs.items()}, folder / "outputs.safetensors")
    (folder / "case.json").write_text(json.dumps({"name": folder.name}))
    return Case(folder)


@pytest.mark.parametrize("which", range(len(LXMERT)))
def test_lxmert(which: int, tmp_path: Path) -> None:
    config = lxmert(which)
    model = noisy(LxmertModel(config))
    inputs = rows() | {"visual_feats": noise(3, 7, config.visual_feat_dim), "visual_pos": noise(3, 7, 4)}
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    outputs = {name: out[name] for name in ("language_output", "vision_output", "pooled_output")}
    for side in ("language", "vision"):
        outputs |= {f"{side}_hidden_states.{n}": x for n, x in enumerate(out[f"{side}_hidden_states"])}
    found = verdict(record(tmp_path / "hf_lxmert", model, inputs, outputs, None))
    assert found.passed, found.line()


@pytest.mark.parametrize("which", range(len(LXMERT)))
def test_lxmert_pretraining(which: int, tmp_path: Path) -> None:
    config = lxmert(which)
    model = noisy(LxmertForPreTraining(config))
    inputs = rows() | {"visual_feats": noise(3, 7, config.visual_feat_dim), "visual_pos": noise(3, 7, 4)}
    labels = torch.full((3, 10), -100)
    labels[0, 2], labels[1, 4], labels[2, 7] = 5, 40, 59
    conf = torch.rand(3, 7, generator=torch.Generator().manual_seed(1))
    objects, attributes = torch.arange(21).view(3, 7) % 11, torch.arange(21).view(3, 7) % 9
    feature = noise(3, 7, config.visual_feat_dim) * 2
    targets = {"obj": (objects, conf), "attr": (attributes, conf), "feat": (feature, conf)}
    matched, ans = torch.tensor([1, 0, 1]), torch.tensor([0, 12, 5])
    out = model(**inputs, labels=labels, obj_labels=targets, matched_label=matched, ans=ans)
    hidden = model.lxmert(**inputs).vision_output
    regions = model.obj_predict_head(hidden)
    ce = nn.CrossEntropyLoss()
    outputs = {
        "loss": out.loss,
        "prediction_logits": out.prediction_logits,
        "cross_relationship_score": out.cross_relationship_score,
        "question_answering_score": out.question_answering_score,
        **{f"visual_{name}": regions[name] for name in ("obj", "attr", "feat")},
        "loss_mlm": ce(out.prediction_logits.flatten(0, 1), labels.flatten()),
        "loss_matched": ce(out.cross_relationship_score, matched),
        "loss_qa": ce(out.question_answering_score, ans),
    }
    parts = [outputs[f"loss_{name}"] for name in ("mlm", "matched", "qa")]
    outputs["loss_visual"] = out.loss - sum(parts)
    recorded = inputs | {
        "labels": labels, "matched_label": matched, "ans": ans, "obj_label": objects, "attr_label": attributes,
        "visual_conf": conf, "feat_target": feature,
    }  # fmt: skip
    found = verdict(record(tmp_path / "hf_lxmert_pretrain", model, recorded, outputs, out.loss))
    assert found.passed and found.gradients > 50, found.line()


def batch(inputs: dict[str, Tensor], features: Tensor, boxes: Tensor) -> Batch:
    texts = Texts(inputs["input_ids"], inputs["attention_mask"] == 1, segments=inputs["token_type_ids"])
    return Batch({"clean": Regions(features, boxes, inputs["visual_attention_mask"] == 1)}, {"clean": texts})


@pytest.mark.parametrize("which", range(len(LXMERT)))
def test_lxmert_answers(which: int, tmp_path: Path) -> None:
    """The image stream's end, which nobody reads, is left out, and said so."""
    config = lxmert(which)
    model = noisy(LxmertForQuestionAnswering(config))
    model.save_pretrained(tmp_path)
    inputs, features, boxes = rows(), noise(3, 7, config.visual_feat_dim), noise(3, 7, 4)
    loaded = vlp.load(tmp_path)
    with torch.no_grad():
        wanted = model(**inputs, visual_feats=features, visual_pos=boxes).question_answering_score
        fused = loaded.model.run({Fuse()}, batch(inputs, features, boxes))[Fuse()]
        torch.testing.assert_close(loaded.model.objectives["answer"].head(fused.pooled), wanted, atol=1e-5, rtol=1e-4)
    last = len(loaded.model.fusion.sublayers) - 1
    assert any(name.startswith(f"fusion.sublayers.{last}.image.") for name in loaded.report.ignored)
    assert not loaded.report.missing and not loaded.report.unexpected


def test_lxmert_of_the_authors(tmp_path: Path) -> None:
    """Their file has `module.` before everything, `bert.` for `lxmert.`, and the words twice."""
    config = lxmert(0)
    model = noisy(LxmertForPreTraining(config))
    state = {f"module.{name.replace('lxmert.', 'bert.')}": x for name, x in model.state_dict().items()}
    torch.save(state, tmp_path / "model_LXRT.pth")
    loaded = vlp.load(tmp_path / "model_LXRT.pth", config={"num_attention_heads": 4})
    model.save_pretrained(tmp_path / "hf")
    other = vlp.load(tmp_path / "hf")
    for name, x in other.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], x), name


@pytest.mark.parametrize("images", [1, 2])
def test_lxmert_finetuned_by_the_authors(images: int, tmp_path: Path) -> None:
    """VQA's head reads one pooled vector, NLVR2's two."""
    config = lxmert(0)
    model = noisy(LxmertModel(config))
    head = nn.Sequential(nn.Linear(24 * images, 48), nn.GELU(), nn.LayerNorm(48, 1e-12), nn.Linear(48, 2 * images + 1))
    head = noisy(head) if images == 1 else noisy(nn.Sequential(*head[:3], nn.Linear(48, 2)))
    state = {f"lxrt_encoder.model.bert.{name}": x for name, x in model.state_dict().items()}
    torch.save(state | {f"logit_fc.{name}": x for name, x in head.state_dict().items()}, tmp_path / "BEST.pth")
    loaded = vlp.load(tmp_path / "BEST.pth", config={"num_attention_heads": 4})
    inputs, features, boxes = rows(), noise(3, 7, config.visual_feat_dim), noise(3, 7, 4)
    if images == 2:
        inputs = {n: x[[0, 0]] if n != "visual_attention_mask" else x[:2] for n, x in inputs.items()}
        features, boxes = features[:2], boxes[:2]
    given = batch(inputs, features, boxes)
    if images == 2:
        text = given.texts["clean"]
        first = {name: getattr(text, name)[:1] for name in TEXT_FIELDS}
        given = replace(given, texts={"clean": replace(text, **first)}, image_of_text=torch.tensor([[0, 1]]))
    with torch.no_grad():
        pooled = model(**inputs, visual_feats=features, visual_pos=boxes).pooled_output
        found = loaded.model.run({Fuse()}, given)[Fuse()].pooled
        wanted = head(pooled.view(-1, 24 * images))
        torch.testing.assert_close(loaded.model.objectives["answer"].head(found), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("which", range(len(VISUALBERT)))
def test_visualbert(which: int, tmp_path: Path) -> None:
    config = visualbert(which)
    model = noisy(VisualBertModel(config))
    inputs = rows() | {"visual_embeds": noise(3, 7, config.visual_embedding_dim)}
    inputs["visual_token_type_ids"] = torch.arange(21).view(3, 7) % 2
    alignment = torch.randint(-1, 10, (3, 7, 2), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
        aligned = model(**inputs, image_text_alignment=alignment).last_hidden_state
    outputs = {
        "last_hidden_state": out.last_hidden_state,
        "pooler_output": out.pooler_output,
        "alignment": alignment,
        "last_hidden_state_with_alignment": aligned,
        **{f"hidden_states.{n}": x for n, x in enumerate(out.hidden_states)},
    }
    found = verdict(record(tmp_path / "hf_visualbert", model, inputs, outputs, None))
    assert found.passed, found.line()


@pytest.mark.parametrize("which", range(len(VISUALBERT)))
def test_visualbert_pretraining(which: int, tmp_path: Path) -> None:
    config = visualbert(which)
    model = noisy(VisualBertForPreTraining(config))
    inputs = rows() | {"visual_embeds": noise(3, 7, config.visual_embedding_dim)}
    inputs["visual_token_type_ids"] = torch.ones(3, 7, dtype=torch.long)
    labels = torch.full((3, 17), -100)
    labels[0, 2], labels[1, 4], labels[2, 7], labels[0, 12] = 5, 40, 59, 8
    recorded = inputs | {"labels": labels, "sentence_image_labels": torch.tensor([0, 1, 0])}
    out = model(**recorded)
    outputs = {name: out[name] for name in ("loss", "prediction_logits", "seq_relationship_logits")}
    found = verdict(record(tmp_path / "hf_visualbert_pretrain", model, recorded, outputs, out.loss))
    assert found.passed and found.gradients > 30, found.line()


@pytest.mark.parametrize("kind", [VisualBertForVisualReasoning, VisualBertForQuestionAnswering])
def test_visualbert_heads(kind: Any, tmp_path: Path) -> None:
    config = visualbert(0)
    config.num_labels = 2 if kind is VisualBertForVisualReasoning else 9
    model = noisy(kind(config))
    model.save_pretrained(tmp_path)
    inputs, features = rows(), noise(3, 7, config.visual_embedding_dim)
    loaded = vlp.load(tmp_path)
    (head,) = loaded.model.objectives.values()
    with torch.no_grad():
        wanted = model(**inputs, visual_embeds=features).logits
        pooled = loaded.model.run({Fuse()}, batch(inputs, features, features[..., :0]))[Fuse()].pooled
        torch.testing.assert_close(head.head(pooled), wanted, atol=1e-5, rtol=1e-4)


def test_visualbert_of_the_authors(tmp_path: Path) -> None:
    model = noisy(VisualBertForPreTraining(visualbert(0)))
    older = {"visual_token_type_embeddings": "token_type_embeddings_visual", "visual_projection": "projection"}
    older |= {
        "visual_position_embeddings": "position_embeddings_visual",
        "visual_bert.": "bert.bert.",
        "cls.": "bert.cls.",
    }
    state = {}
    for name, x in model.state_dict().items():
        for new, old in older.items():
            name = name.replace(new, old)
        state[name] = x
    torch.save(state, tmp_path / "visualbert.th")
    loaded = vlp.load(tmp_path / "visualbert.th", config={"num_attention_heads": 4})
    model.save_pretrained(tmp_path / "hf")
    for name, x in vlp.load(tmp_path / "hf").model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], x), name
