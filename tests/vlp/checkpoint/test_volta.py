"""VOLTA: the recorded case, and a reference of a few lines for every published structure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import GOLDENS, Weights, random_weights, stand_in, verdict
from torch import Tensor
from torch.nn import functional as F

import vlp
from encoders.types import Batch, Regions, Texts
from objectives.base import Fuse
from scripts.goldens.base import Case

WORDS, FEATURES = 120, 20
EVEN, ODD = list(range(0, 24, 2)), list(range(1, 24, 2))
SINGLE = {
    "tt_attn_sublayers": EVEN, "tv_attn_sublayers": EVEN, "vt_attn_sublayers": EVEN, "vv_attn_sublayers": EVEN,
    "t_ff_sublayers": ODD, "v_ff_sublayers": ODD, "shared_sublayers": list(range(24)),
}  # fmt: skip
CO = [14, 18, 22, 26, 30, 34]
VILBERT = {
    "tt_attn_sublayers": [0, 2, 4, 6, 8, 10, *CO], "vv_attn_sublayers": CO,
    "tv_attn_sublayers": [12, 16, 20, 24, 28, 32], "vt_attn_sublayers": [12, 16, 20, 24, 28, 32],
    "t_ff_sublayers": list(range(1, 36, 2)), "v_ff_sublayers": list(range(13, 36, 2)), "shared_sublayers": [],
}  # fmt: skip
LXMERT = {
    "tt_attn_sublayers": [0, 2, 4, 6, 8, 10, 12, 14, 16, 19, 22, 25, 28, 31],
    "vv_attn_sublayers": [0, 2, 4, 6, 8, 19, 22, 25, 28, 31],
    "tv_attn_sublayers": [18, 21, 24, 27, 30], "vt_attn_sublayers": [18, 21, 24, 27, 30],
    "t_ff_sublayers": [1, 3, 5, 7, 9, 11, 13, 15, 17, 20, 23, 26, 29, 32],
    "v_ff_sublayers": [1, 3, 5, 7, 9, 20, 23, 26, 29, 32], "shared_sublayers": [18, 21, 24, 27, 30],
}  # fmt: skip
BASE: dict[str, Any] = {
    "hidden_size": 16, "v_hidden_size": 16, "intermediate_size": 32, "v_intermediate_size": 32, "pooler_size": 24,
    "num_attention_heads": 4, "v_num_attention_heads": 4, "hidden_act": "gelu", "v_hidden_act": "gelu", "num_locs": 5,
    "fusion_method": "mul", "add_global_imgfeat": "first", "visual_target_weights": {"0": 1.0},
}  # fmt: skip
WIDER = {
    "v_hidden_size": 24, "v_intermediate_size": 24, "v_num_attention_heads": 2,
    "sublayer2attn_hidden_size": dict.fromkeys(["12", "16", "20", "24", "28", "32"], 24),
    "sublayer2num_attention_heads": dict.fromkeys(["12", "16", "20", "24", "28", "32"], 2),
}  # fmt: skip
ORIGINAL = {
    "fusion_method": "text", "num_locs": 4, "add_global_imgfeat": None, "pooler_size": 16,
    "visual_target_weights": {"3": 6.667, "4": 6.667, "5": 6.667},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "volta_ctrl_visualbert": BASE | SINGLE | {"image_embeddings": "visualbert"},
    "volta_ctrl_uniter": BASE | SINGLE | {"image_embeddings": "uniter"},
    "volta_ctrl_vilbert": BASE | VILBERT | {"image_embeddings": "vilbert"},
    "volta_ctrl_lxmert": BASE | LXMERT | {"image_embeddings": "lxmert", "hidden_act": "relu", "v_hidden_act": "relu"},
    "volta_vilbert": BASE | VILBERT | WIDER | {"image_embeddings": "vilbert"},
    "volta_lxmert": BASE | LXMERT | ORIGINAL | {"image_embeddings": "lxmert"},
}
OUTPUTS = {"0": 1601, "3": 1600, "4": 400, "5": FEATURES}


def test_recorded() -> None:
    found = verdict(Case(GOLDENS / "volta_ctrl_visualbert"))
    assert found.passed, found.line()


@pytest.mark.parametrize("name", CASES)
def test_structures(name: str, tmp_path: Path) -> None:
    config = CASES[name]
    weights, given = file(config), inputs(config)

    def run(leaves: Weights) -> dict[str, Tensor]:
        return reference(leaves, given, config)

    case = stand_in(tmp_path / name, weights, given, run, config, file="pytorch_model.bin", key="model")
    found = verdict(case)
    assert found.passed and found.gradients > 100, found.line()


@pytest.mark.parametrize("name", ["volta_ctrl_visualbert", "volta_ctrl_vilbert", "volta_ctrl_lxmert"])
def test_structure_by_its_size(name: str, tmp_path: Path) -> None:
    """Without its config, the number of sublayers tells a published structure; the report says so."""
    torch.save(file(CASES[name]), tmp_path / "pytorch_model.bin")
    sizes = {key: value for key, value in CASES[name].items() if "sublayer" not in key}
    loaded, other = (vlp.load(tmp_path / "pytorch_model.bin", config=one) for one in (sizes, CASES[name]))
    assert loaded.model.config.fusion.sublayers == other.model.config.fusion.sublayers
    assert any("structure of the published model" in note for note in loaded.report.notes)


def test_what_is_refused(tmp_path: Path) -> None:
    path, weights = tmp_path / "pytorch_model.bin", file(CASES["volta_ctrl_visualbert"])
    fewer = {name: x for name, x in weights.items() if ".layer.23." not in name}
    torch.save(fewer, path)
    with pytest.raises(ValueError, match="has 23 sublayers, which no published structure has"):
        vlp.load(path)
    vlbert = {name: x for name, x in weights.items() if "embeddings.projection" not in name}
    torch.save(vlbert, path)
    with pytest.raises(ValueError, match="embeds regions in a way that vlp does not know"):
        vlp.load(path, config=CASES["volta_ctrl_visualbert"])


def changes(config: Mapping[str, Any], n: int) -> tuple[bool, bool]:
    """Whether a sublayer has weights of text, and of image."""
    text = any(n in config[key] for key in ("tt_attn_sublayers", "tv_attn_sublayers", "t_ff_sublayers"))
    return text, any(n in config[key] for key in ("vv_attn_sublayers", "vt_attn_sublayers", "v_ff_sublayers"))


def count(config: Mapping[str, Any]) -> int:
    return max(max(config["t_ff_sublayers"]), max(config["v_ff_sublayers"])) + 1


def file(config: Mapping[str, Any]) -> Weights:
    """A file of the authors: random weights under their names; of shared ones two copies."""
    t, v = config["hidden_size"], config["v_hidden_size"]
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        found.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, width: int) -> None:
        found.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    for name, rows in (("word", WORDS), ("position", 40), ("token_type", 2)):
        found[f"bert.embeddings.{name}_embeddings.weight"] = (rows, t)
    norm("bert.embeddings.LayerNorm", t)
    kind, boxes = config["image_embeddings"], config["num_locs"]
    if kind == "visualbert":
        linear("bert.embeddings.projection", t, FEATURES)
        found["bert.embeddings.token_type_embeddings_visual.weight"] = (2, t)
        found["bert.embeddings.position_embeddings_visual.weight"] = (40, t)
    else:
        prefix = "bert.embeddings." if kind == "uniter" else "bert.v_embeddings."
        linear(prefix + "image_embeddings", v, FEATURES)
        linear(prefix + "image_location_embeddings", v, boxes)
        norms = {"vilbert": ["LayerNorm"], "lxmert": ["ImgLayerNorm", "LocLayerNorm"]}
        for name in norms.get(kind, ["image_layer_norm", "image_location_layer_norm", "v_LayerNorm"]):
            norm(prefix + name, v)
    for n in range(count(config)):
        layer, inner = f"bert.encoder.layer.{n}.", config.get("sublayer2attn_hidden_size", {}).get(str(n))
        for mark, width, has in zip(("", "v_"), (t, v), changes(config, n), strict=True):
            if not has:
                continue
            hidden = config[f"{mark}intermediate_size"]
            if any(n in config[f"{kind}_attn_sublayers"] for kind in ("tt", "tv", "vt", "vv")):
                for part in ("query", "key", "value"):
                    linear(f"{layer}attention_self.{mark}{part}", inner or width, width)
                linear(f"{layer}attention_output.{mark}dense", width, inner or width)
                norm(f"{layer}attention_output.{mark}LayerNorm", width)
            else:
                linear(f"{layer}intermediate.{mark}dense", hidden, width)
                linear(f"{layer}output.{mark}dense", width, hidden)
                norm(f"{layer}output.{mark}LayerNorm", width)
    linear("bert.t_pooler.dense", config["pooler_size"], t)
    if config["fusion_method"] == "mul":
        linear("bert.v_pooler.dense", config["pooler_size"], v)
    found["cls.predictions.bias"] = (WORDS,)
    linear("cls.predictions.transform.dense", t, t)
    norm("cls.predictions.transform.LayerNorm", t)
    linear("cls.bi_seq_relationship", 2, config["pooler_size"])
    linear("cls.imagePredictions.transform.dense", v, v)
    norm("cls.imagePredictions.transform.LayerNorm", v)
    for number in config["visual_target_weights"]:
        linear(f"cls.imagePredictions.decoder_dict.{number}", OUTPUTS[number], v)
    weights = random_weights(found)
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].clone()
    for n in config["shared_sublayers"]:
        for name in [name for name in weights if name.startswith(f"bert.encoder.layer.{n}.") and ".v_" in name]:
            weights[name] = weights[name.replace(".v_", ".")].clone()
    return weights


def inputs(config: Mapping[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    first = int(config["add_global_imgfeat"] is not None)
    words, regions = torch.tensor([[10], [6], [8]]), torch.tensor([[5], [4], [3]]) + first
    keep, seen = torch.arange(10) < words, torch.arange(5 + first) < regions
    labels, regional = torch.full((3, 10), -1), torch.full((3, 5), -1)
    labels[0, 3], labels[0, 7], labels[1, 2], labels[2, 4] = 115, 108, 114, 110
    regional[0, 1] = regional[0, 4] = regional[1, 2] = regional[2, 0] = 1
    return {
        "input_ids": torch.randint(1, WORDS, (3, 10), generator=generator) * keep,
        "attention_mask": keep.long(),
        "token_type_ids": torch.randint(0, 2, (3, 10), generator=generator),
        "image_feat": torch.randn(3, 5 + first, FEATURES, generator=generator),
        "image_loc": torch.rand(3, 5 + first, config["num_locs"], generator=generator),
        "image_attention_mask": seen.long(),
        "masked_lm_labels": labels,
        "image_label": regional,
        "image_cls": torch.randn(3, 5, 1601, generator=generator).softmax(-1),
        "obj_labels": torch.randint(0, 1600, (3, 5), generator=generator),
        "obj_confs": torch.rand(3, 5, generator=generator),
        "attr_labels": torch.randint(0, 400, (3, 5), generator=generator),
        "attr_confs": torch.rand(3, 5, generator=generator),
        "next_sentence_label": torch.tensor([0, 1, 0]),
    }


# A reference from the paper and the names of the weights: one row at a time, without padding.


def reference(w: Weights, given: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    rows = [encode(w, given, config, row) for row in range(3)]
    first = int(config["add_global_imgfeat"] is not None)
    act = {"gelu": F.gelu, "relu": F.relu}[config["hidden_act"]]
    pooled = [torch.stack([F.relu(linear(w, x[0], "bert.t_pooler.dense")) for x, _ in rows])]
    if config["fusion_method"] == "mul":
        pooled.append(torch.stack([F.relu(linear(w, x[0], "bert.v_pooler.dense")) for _, x in rows]))
    match = linear(w, pooled[0] * pooled[1] if len(pooled) > 1 else pooled[0], "cls.bi_seq_relationship")
    found, word_losses, region_losses = {}, [], []
    scores = []
    for row, (text, image) in enumerate(rows):
        states = norm(w, act(linear(w, text, "cls.predictions.transform.dense")), "cls.predictions.transform.LayerNorm")
        scores.append(states @ w["bert.embeddings.word_embeddings.weight"].T + w["cls.predictions.bias"])
        for at in (given["masked_lm_labels"][row] != -1).nonzero()[:, 0]:
            word_losses.append(-scores[-1][at].log_softmax(0)[given["masked_lm_labels"][row, at]])
        head = "cls.imagePredictions."
        states = norm(w, act(linear(w, image, head + "transform.dense")), head + "transform.LayerNorm")
        for at in (given["image_label"][row] == 1).nonzero()[:, 0]:
            for number, weight in config["visual_target_weights"].items():
                out = linear(w, states[first + at], f"{head}decoder_dict.{number}")
                region_losses.append(weight * region_loss(number, out, given, row, at, first))
    if len(pooled) > 1:
        found["pooled_v"] = pooled[1]
    label = given["next_sentence_label"]
    return {
        **found,
        "sequence_t": laid([text for text, _ in rows], 10),
        "sequence_v": laid([image for _, image in rows], 5 + first),
        "pooled_t": pooled[0],
        "mlm_logits": laid(scores, 10),
        "match_logits": match,
        "loss_mlm": torch.stack(word_losses).mean(),
        "loss_img": torch.stack(region_losses).sum() / (given["image_label"] == 1).sum(),
        "loss_match": -match.log_softmax(1)[torch.arange(3), label].mean(),
    }


def linear(w: Weights, x: Tensor, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, x: Tensor, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)


def laid(rows: list[Tensor], size: int) -> Tensor:
    return torch.stack([F.pad(x, (0, 0, 0, size - len(x))) for x in rows])


def region_loss(number: str, out: Tensor, given: Mapping[str, Tensor], row: int, at: Tensor, first: int) -> Tensor:
    if number == "0":
        target = given["image_cls"][row, at]
        return (target * (target.log() - out.log_softmax(0))).sum()
    if number == "5":
        return F.smooth_l1_loss(out, given["image_feat"][row, first + at])
    name = {"3": "obj", "4": "attr"}[number]
    return -out.log_softmax(0)[given[f"{name}_labels"][row, at]] * given[f"{name}_confs"][row, at]


def embed(w: Weights, given: Mapping[str, Tensor], config: Mapping[str, Any], row: int) -> tuple[Tensor, Tensor]:
    n, r = int(given["attention_mask"][row].sum()), int(given["image_attention_mask"][row].sum())
    e = "bert.embeddings."
    kinds = w[e + "token_type_embeddings.weight"]
    text = w[e + "word_embeddings.weight"][given["input_ids"][row, :n]] + w[e + "position_embeddings.weight"][:n]
    text = norm(w, text + kinds[given["token_type_ids"][row, :n]], e + "LayerNorm")
    seen, boxes, kind = given["image_feat"][row, :r], given["image_loc"][row, :r], config["image_embeddings"]
    if kind == "visualbert":
        image = linear(w, seen, e + "projection") + w[e + "token_type_embeddings_visual.weight"][1]
        return text, norm(w, image + w[e + "position_embeddings_visual.weight"][0], e + "LayerNorm")
    prefix = e if kind == "uniter" else "bert.v_embeddings."
    seen, boxes = linear(w, seen, prefix + "image_embeddings"), linear(w, boxes, prefix + "image_location_embeddings")
    if kind == "vilbert":
        return text, norm(w, seen + boxes, prefix + "LayerNorm")
    if kind == "lxmert":
        return text, (norm(w, seen, prefix + "ImgLayerNorm") + norm(w, boxes, prefix + "LocLayerNorm")) / 2
    image = norm(w, seen, e + "image_layer_norm") + norm(w, boxes, e + "image_location_layer_norm") + kinds[1]
    return text, norm(w, image, e + "v_LayerNorm")


def encode(w: Weights, given: Mapping[str, Tensor], config: Mapping[str, Any], row: int) -> tuple[Tensor, Tensor]:
    states = dict(zip("tv", embed(w, given, config, row), strict=True))
    act = {"gelu": F.gelu, "relu": F.relu}[config["hidden_act"]]
    for n in range(count(config)):
        layer, shared = f"bert.encoder.layer.{n}.", n in config["shared_sublayers"]
        marks = {"t": "", "v": "" if shared else "v_"}
        reads = [kind for kind in ("tt", "tv", "vt", "vv") if n in config[f"{kind}_attn_sublayers"]]
        before = dict(states)
        for s, mark in marks.items():
            if others := [kind[1] for kind in reads if kind[0] == s]:
                heads = config.get("sublayer2num_attention_heads", {}).get(str(n))
                heads = heads or config["num_attention_heads" if s == "t" else "v_num_attention_heads"]
                own = linear(w, before[s], f"{layer}attention_self.{mark}query")
                keys, values = (
                    torch.cat([linear(w, before[o], f"{layer}attention_self.{marks[o]}{part}") for o in others])
                    for part in ("key", "value")
                )
                q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (own, keys, values))
                mixed = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
                out = linear(w, mixed, f"{layer}attention_output.{mark}dense")
                states[s] = norm(w, out + before[s], f"{layer}attention_output.{mark}LayerNorm")
            elif n in config[f"{s}_ff_sublayers"]:
                inner = act(linear(w, before[s], f"{layer}intermediate.{mark}dense"))
                out = linear(w, inner, f"{layer}output.{mark}dense")
                states[s] = norm(w, out + before[s], f"{layer}output.{mark}LayerNorm")
    return states["t"], states["v"]


@pytest.mark.parametrize("task", ["vqa", "ve", "nlvr2"])
def test_finetuned_heads(task: str, tmp_path: Path) -> None:
    config = CASES["volta_vilbert"]
    pooled = config["pooler_size"] * (2 if task == "nlvr2" else 1)
    weights = {name: x for name, x in file(config).items() if not name.startswith("cls.")}
    head: dict[str, tuple[int, ...]] = {"clfs_dict.TASK13.weight": (3, pooled), "clfs_dict.TASK13.bias": (3,)}
    if task != "ve":
        answers = 2 if task == "nlvr2" else 9
        sizes = {"0.weight": (30, pooled), "0.bias": (30,), "2.weight": (30,), "2.bias": (30,)}
        sizes |= {"3.weight": (answers, 30), "3.bias": (answers,)}
        head = {f"clfs_dict.TASK1.logit_fc.{name}": shape for name, shape in sizes.items()}
    weights |= random_weights(head, seed=1)
    torch.save(weights, tmp_path / "pytorch_model_19.bin")
    loaded = vlp.load(tmp_path / "pytorch_model_19.bin", config=config)
    given = inputs(config)
    if task == "nlvr2":  # one text, two images
        texts_alone = {name: given[name][[0, 0]] for name in ("input_ids", "attention_mask", "token_type_ids")}
        given = {name: x[:2] for name, x in given.items()} | texts_alone
    rows = [encode(weights, given, config, row) for row in range(len(given["input_ids"]))]
    states = [
        torch.stack([F.relu(linear(weights, pair[n][0], f"bert.{stream}_pooler.dense")) for pair in rows])
        for n, stream in enumerate("tv")
    ]
    x = (states[0] * states[1]).view(-1, pooled)
    if task == "ve":
        wanted = linear(weights, x, "clfs_dict.TASK13")
    else:
        x = norm(weights, F.gelu(linear(weights, x, "clfs_dict.TASK1.logit_fc.0")), "clfs_dict.TASK1.logit_fc.2")
        wanted = linear(weights, x, "clfs_dict.TASK1.logit_fc.3")
    texts = slice(0, 1) if task == "nlvr2" else slice(None)
    words = given["input_ids"], given["attention_mask"] == 1
    batch = Batch(
        {"clean": Regions(given["image_feat"], given["image_loc"], given["image_attention_mask"] == 1)},
        {"clean": Texts(*(x[texts] for x in words), segments=given["token_type_ids"][texts])},
        torch.tensor([[0, 1]]) if task == "nlvr2" else None,
    )
    found = loaded.model.objectives["answer"].head(loaded.model.run({Fuse()}, batch)[Fuse()].pooled)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_heads_that_are_not_read(tmp_path: Path) -> None:
    weights = file(CASES["volta_vilbert"]) | {
        "clfs_dict.TASK9.weight": torch.zeros(1, 24),
        "clfs_dict.TASK9.bias": torch.zeros(1),
    }
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has heads of \\['TASK9'\\]; vlp reads one of VQA"):
        vlp.load(tmp_path / "pytorch_model.bin", config=CASES["volta_vilbert"])
