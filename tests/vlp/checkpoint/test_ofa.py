"""OFA's files under fairseq's names: random weights, and what the repository's formulas make of them by these names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import vlp
from encoders.types import Batch, Images, Texts
from objectives.base import Decode, Fuse

WIDTH, HEADS, HIDDEN, LAYERS, WORDS, SIDE, BUCKETS, LENGTH = 32, 4, 48, 2, 60, 5, 6, 20
State = dict[str, Tensor]


def drawn() -> State:
    """Weights of every name that a released file has."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"encoder.type_embedding.weight": (2, WIDTH)}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def norms(*names: str, width: int = WIDTH) -> None:
        for name in names:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    linear("encoder.image_proj", WIDTH, 1024)
    norms("encoder.layernorm_embedding", "encoder.patch_layernorm_embedding", "decoder.layernorm_embedding")
    norms("decoder.code_layernorm_embedding")
    for side, maps in (("encoder", ("pos_",)), ("decoder", ("self_pos_", "cross_pos_"))):
        shapes[f"{side}.embed_positions.weight"] = (LENGTH + 2, WIDTH)
        shapes[f"{side}.embed_image_positions.weight"] = (SIDE**2 + 1, WIDTH)
        norms(f"{side}.pos_ln", f"{side}.image_pos_ln", f"{side}.layer_norm")
        for name in maps:
            linear(f"{side}.{name}q_linear", WIDTH, WIDTH)
            linear(f"{side}.{name}k_linear", WIDTH, WIDTH)
        for n in range(LAYERS):
            layer = f"{side}.layers.{n}"
            shapes[f"{side}.token_rel_pos_table_list.{n}.weight"] = (2 * BUCKETS - 1, HEADS)
            shapes[f"{side}.image_rel_pos_table_list.{n}.weight"] = ((2 * SIDE - 1) ** 2 + 3, HEADS)
            for part in ("self_attn", "encoder_attn")[: 1 + (side == "decoder")]:
                for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    linear(f"{layer}.{part}.{name}", WIDTH, WIDTH)
                shapes[f"{layer}.{part}.c_attn"] = (HEADS,)
                norms(f"{layer}.{part}_layer_norm")
            norms(*(f"{layer}.{name}" for name in (("attn_ln",), ("self_attn_ln", "cross_attn_ln"))[side == "decoder"]))
            norms(f"{layer}.final_layer_norm")
            norms(f"{layer}.ffn_layernorm", width=HIDDEN)
            linear(f"{layer}.fc1", HIDDEN, WIDTH)
            linear(f"{layer}.fc2", WIDTH, HIDDEN)
    state = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    words = torch.randn(WORDS, WIDTH)
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection"):
        state[f"{name}.weight"] = words
    state |= {"encoder.version": torch.ones(1), "decoder.image_position_idx": torch.arange(9)}
    cnn = timm.create_model("resnet50", num_classes=0).state_dict()
    return state | {f"encoder.embed_images.{name}": one for name, one in cnn.items() if not name.startswith("layer4")}


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(-2, -3)


def scores(query: Tensor, key: Tensor) -> Tensor:
    return heads(query) @ heads(key).mT / math.sqrt(2 * WIDTH / HEADS)


def attend(state: State, name: str, x: Tensor, read: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (linear(state, f"{name}.{part}_proj", y) for part, y in (("q", x), ("k", read), ("v", read)))
    mixed = (scores(q, k) + bias).softmax(-1) @ heads(v)
    return linear(
        state, f"{name}.out_proj", (mixed * state[f"{name}.c_attn"].view(-1, 1, 1)).transpose(-2, -3).flatten(-2)
    )


def feed(state: State, layer: str, x: Tensor) -> Tensor:
    inner = F.gelu(linear(state, f"{layer}.fc1", norm(state, f"{layer}.final_layer_norm", x)))
    return x + linear(state, f"{layer}.fc2", norm(state, f"{layer}.ffn_layernorm", inner))


def near(state: State, table: str, length: int) -> Tensor:
    """Bias by distances that all have a row of their own, [H, L, L]."""
    assert length <= BUCKETS // 2 + 1
    at = torch.arange(length)
    return state[f"{table}.weight"][at[:, None] - at + BUCKETS - 1].permute(2, 0, 1)


def encode(state: State, cells: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """States and positions of a 2 x 2 image and its words, [S, D] each."""
    kinds = state["encoder.type_embedding.weight"]
    words = norm(state, "encoder.layernorm_embedding", state["encoder.embed_tokens.weight"][ids] + kinds[0])
    image = norm(state, "encoder.patch_layernorm_embedding", linear(state, "encoder.image_proj", cells) + kinds[1])
    x = torch.cat([image, words])
    places = state["encoder.embed_image_positions.weight"][torch.tensor([1, 2, 1 + SIDE, 2 + SIDE])]
    own = norm(state, "encoder.pos_ln", state["encoder.embed_positions.weight"][: len(ids)])
    positions = torch.cat([norm(state, "encoder.image_pos_ln", places), own])
    absolute = scores(*(linear(state, f"encoder.pos_{part}_linear", positions) for part in "qk"))
    row, column = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    offset = (row[:, None] - row + SIDE - 1) * (2 * SIDE - 1) + column[:, None] - column + SIDE - 1
    for n in range(LAYERS):
        layer, bias = f"encoder.layers.{n}", absolute.clone()
        bias[:, 4:, 4:] += near(state, f"encoder.token_rel_pos_table_list.{n}", len(ids))
        bias[:, :4, :4] += state[f"encoder.image_rel_pos_table_list.{n}.weight"][offset].permute(2, 0, 1)
        y = norm(state, f"{layer}.self_attn_layer_norm", x)
        x = feed(state, layer, x + norm(state, f"{layer}.attn_ln", attend(state, f"{layer}.self_attn", y, y, bias)))
    return norm(state, "encoder.layer_norm", x), positions


def decode(state: State, memory: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Scores of the next word, [L, V]."""
    x = norm(state, "decoder.layernorm_embedding", state["decoder.embed_tokens.weight"][ids])
    own = norm(state, "decoder.pos_ln", state["decoder.embed_positions.weight"][: len(ids)])
    absolute = scores(*(linear(state, f"decoder.self_pos_{part}_linear", own) for part in "qk"))
    cross = scores(
        linear(state, "decoder.cross_pos_q_linear", own), linear(state, "decoder.cross_pos_k_linear", positions)
    )
    future = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for n in range(LAYERS):
        layer = f"decoder.layers.{n}"
        bias = absolute + future + near(state, f"decoder.token_rel_pos_table_list.{n}", len(ids))
        y = norm(state, f"{layer}.self_attn_layer_norm", x)
        x = x + norm(state, f"{layer}.self_attn_ln", attend(state, f"{layer}.self_attn", y, y, bias))
        y = norm(state, f"{layer}.encoder_attn_layer_norm", x)
        x = x + norm(state, f"{layer}.cross_attn_ln", attend(state, f"{layer}.encoder_attn", y, memory, cross))
        x = feed(state, layer, x)
    return F.linear(norm(state, "decoder.layer_norm", x), state["decoder.output_projection.weight"])


@torch.no_grad()
def test_a_file_says_what_the_repositorys_formulas_say(tmp_path: Path) -> None:
    state = drawn()
    torch.save({"model": state}, tmp_path / "ofa.pt")
    loaded = vlp.load(tmp_path / "ofa.pt", config={"patch_image_size": 32})
    model, report = loaded.model, loaded.report
    assert report.missing == () and report.unexpected == ()
    assert sum("of image codes" in one for one in report.ignored) == 7 and len(report.ignored) == 9
    asked, written = torch.tensor([0, 9, 11, 2]), torch.tensor([0, 7, 8])
    texts = {
        name: Texts(ids[None], torch.ones(1, len(ids), dtype=torch.bool))
        for name, ids in (("clean", asked), ("a", written))
    }
    batch = Batch({"clean": Images(torch.randn(1, 3, 32, 32))}, texts)
    cells = model.vision(batch.images["clean"]).states
    assert cells.shape == (1, 4, 1024)
    wanted = Decode(Fuse(), "a")
    results = model.run([wanted], batch)
    memory, positions = encode(state, cells[0], asked)
    fused = results[Fuse()]
    torch.testing.assert_close(torch.cat([fused.image.states, fused.text.states], 1)[0], memory, rtol=1e-4, atol=1e-4)
    found = model.objectives["lm"].head(results[wanted].states)[0]
    torch.testing.assert_close(found, decode(state, memory, positions, written), rtol=1e-4, atol=1e-3)


def test_what_is_known_of_a_file_by_its_shapes(tmp_path: Path) -> None:
    state = drawn()
    torch.save({"model": {**state, "decoder.embed_tokens.weight": torch.ones(WORDS, WIDTH)}}, tmp_path / "ofa.pt")
    with pytest.raises(ValueError, match=r"are both text.embeddings.word.weight here, but differ"):
        vlp.load(tmp_path / "ofa.pt", config={"patch_image_size": 32})


def test_an_image_encoder_of_other_stages_is_refused(tmp_path: Path) -> None:
    state = {name: one for name, one in drawn().items() if not name.startswith("encoder.embed_images.layer3.5.")}
    torch.save({"model": state}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"stages of \(3, 4, 5\) blocks, which is none of"):
        vlp.load(tmp_path / "other.pt")
