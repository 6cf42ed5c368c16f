"""ALBEF's and X-VLM's models in a few plain functions over their own state dicts, for cases that are not recorded.

Written from the papers and the names of the weights; attention is the six-line softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, seen: Tensor | None) -> Tensor:
    """[M, L, D] each; ``seen`` bool, broadcastable to [M, L, S]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -1e9)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def vit(state: State, prefix: str, pixels: Tensor, heads: int) -> Tensor:
    """Pixels [B, 3, H, W] -> [B, N, D] by a ViT with timm's names."""
    weight = state[f"{prefix}patch_embed.proj.weight"]
    x = F.conv2d(pixels, weight, state[f"{prefix}patch_embed.proj.bias"], stride=weight.shape[-1]).flatten(2).mT
    x = torch.cat([state[f"{prefix}cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{prefix}pos_embed"]
    number = 0
    while f"{prefix}blocks.{number}.norm1.weight" in state:
        block = f"{prefix}blocks.{number}."
        qkv = linear(state, f"{block}attn.qkv", norm(state, f"{block}norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(state, f"{block}attn.proj", attend(*qkv, heads, None))
        inner = F.gelu(linear(state, f"{block}mlp.fc1", norm(state, f"{block}norm2", x, 1e-6)))
        x = x + linear(state, f"{block}mlp.fc2", inner)
        number += 1
    return norm(state, f"{prefix}norm", x, 1e-6)


def bert_layer(
    state: State,
    layer: str,
    x: Tensor,
    seen: Tensor,
    heads: int,
    memory: Tensor | None,
    memory_seen: Tensor | None,
) -> Tensor:
    def sublayer(name: str, x: Tensor, source: Tensor, seen: Tensor | None) -> Tensor:
        parts = [
            linear(state, f"{layer}{name}.self.{one}", y)
            for one, y in zip(("query", "key", "value"), (x, source, source), strict=True)
        ]
        mixed = linear(state, f"{layer}{name}.output.dense", attend(*parts, heads, seen))
        return norm(state, f"{layer}{name}.output.LayerNorm", mixed + x, 1e-12)

    x = sublayer("attention", x, x, seen)
    if memory is not None:
        x = sublayer("crossattention", x, memory, memory_seen)
    inner = F.gelu(linear(state, f"{layer}intermediate.dense", x))
    return norm(state, f"{layer}output.LayerNorm", linear(state, f"{layer}output.dense", inner) + x, 1e-12)


def bert(
    state: State,
    prefix: str,
    ids: Tensor,
    keep: Tensor,
    heads: int,
    memories: Sequence[Tensor] = (),
    memory_keep: Tensor | None = None,
    *,
    causal: bool = False,
    start: int = 0,
    stop: int | None = None,
    states: Tensor | None = None,
) -> Tensor:
    """Ids [M, L] -> [M, L, D]; layers with cross-attention read the memories [M, S, D] by turns.

    With ``states`` it goes on from these at layer ``start``; it stops before layer ``stop``.
    """
    if states is None:
        embed = f"{prefix}embeddings."
        states = (
            state[f"{embed}word_embeddings.weight"][ids] + state[f"{embed}position_embeddings.weight"][: ids.shape[1]]
        )
        states = states + state[f"{embed}token_type_embeddings.weight"][0]
        states = norm(state, f"{embed}LayerNorm", states, 1e-12)
    seen = keep[:, None, :].expand(-1, keep.shape[1], -1)
    if causal:
        seen = seen & torch.ones(keep.shape[1], keep.shape[1], dtype=torch.bool).tril()
    number, turn = start, 0
    while f"{prefix}encoder.layer.{number}.output.dense.weight" in state and number != stop:
        layer, memory = f"{prefix}encoder.layer.{number}.", None
        if memories and f"{layer}crossattention.self.query.weight" in state:
            memory, turn = memories[turn % len(memories)], turn + 1
        memory_seen = None if memory_keep is None else memory_keep[:, None, :]
        states = bert_layer(state, layer, states, seen, heads, memory, memory_seen)
        number += 1
    return states


def word_logits(state: State, prefix: str, states: Tensor) -> Tensor:
    """States -> logits by BERT's prediction head, ``prefix`` "text_encoder.cls.predictions."."""
    inner = F.gelu(linear(state, f"{prefix}transform.dense", states))
    inner = norm(state, f"{prefix}transform.LayerNorm", inner, 1e-12)
    return inner @ state[f"{prefix}decoder.weight"].T + state[f"{prefix}bias"]


# Random state dicts with the authors' names.


class Names:
    """Fills a state dict with noise, every entry different; norms near one."""

    def __init__(self, seed: int = 0) -> None:
        self.state: State = {}
        self.copies: dict[str, str] = {}
        """Weights that are stored twice: name of the copy -> of the original."""
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, name: str, *shape: int, std: float = 0.2, mean: float = 0.0) -> None:
        self.state[name] = mean + std * torch.randn(*shape, generator=self.generator)

    def linear(self, name: str, out: int, width: int) -> None:
        self.add(f"{name}.weight", out, width)
        self.add(f"{name}.bias", out)

    def norm(self, name: str, width: int) -> None:
        self.add(f"{name}.weight", width, mean=1.0)
        self.add(f"{name}.bias", width)

    def vit(self, prefix: str, width: int, depth: int, patch: int, tokens: int) -> None:
        self.add(f"{prefix}cls_token", 1, 1, width)
        self.add(f"{prefix}pos_embed", 1, tokens, width)
        self.add(f"{prefix}patch_embed.proj.weight", width, 3, patch, patch)
        self.add(f"{prefix}patch_embed.proj.bias", width)
        for number in range(depth):
            block = f"{prefix}blocks.{number}."
            self.norm(f"{block}norm1", width)
            self.linear(f"{block}attn.qkv", 3 * width, width)
            self.linear(f"{block}attn.proj", width, width)
            self.norm(f"{block}norm2", width)
            self.linear(f"{block}mlp.fc1", 2 * width, width)
            self.linear(f"{block}mlp.fc2", width, 2 * width)
        self.norm(f"{prefix}norm", width)

    def bert(self, prefix: str, width: int, layers: int, split: int, memory: int, words: int = 130) -> None:
        embed = f"{prefix}embeddings."
        self.state[f"{embed}position_ids"] = torch.arange(40)[None]
        self.add(f"{embed}word_embeddings.weight", words, width)
        self.add(f"{embed}position_embeddings.weight", 40, width)
        self.add(f"{embed}token_type_embeddings.weight", 2, width)
        self.norm(f"{embed}LayerNorm", width)
        for number in range(layers):
            layer = f"{prefix}encoder.layer.{number}."
            for name, source in (("attention", width), ("crossattention", memory)):
                if name == "crossattention" and number < split:
                    continue
                self.linear(f"{layer}{name}.self.query", width, width)
                self.linear(f"{layer}{name}.self.key", width, source)
                self.linear(f"{layer}{name}.self.value", width, source)
                self.linear(f"{layer}{name}.output.dense", width, width)
                self.norm(f"{layer}{name}.output.LayerNorm", width)
            self.linear(f"{layer}intermediate.dense", 2 * width, width)
            self.linear(f"{layer}output.dense", width, 2 * width)
            self.norm(f"{layer}output.LayerNorm", width)

    def word_head(self, prefix: str, words: str, width: int) -> None:
        self.linear(f"{prefix}transform.dense", width, width)
        self.norm(f"{prefix}transform.LayerNorm", width)
        self.add(f"{prefix}bias", len(self.state[words]))
        self.copy(f"{prefix}decoder.weight", words)
        self.copy(f"{prefix}decoder.bias", f"{prefix}bias")

    def copy(self, name: str, original: str) -> None:
        self.state[name], self.copies[name] = self.state[original], original

    def share_keys(self, prefix: str, split: int, layers: int) -> None:
        """NLVR2: two cross-attentions each have one key and one value projection."""
        for number in range(split, layers, 2):
            for name in (f"crossattention.self.{kind}.{p}" for kind in ("key", "value") for p in ("weight", "bias")):
                self.copy(f"{prefix}encoder.layer.{number + 1}.{name}", f"{prefix}encoder.layer.{number}.{name}")

    def add_twins(self, *parts: str) -> None:
        """Add momentum copies of these parts, which differ from them."""
        for name, tensor in list(self.state.items()):
            part = name.split(".")[0]
            if part not in parts:
                continue
            twin = name.replace(part, f"{part}_m", 1)
            if name in self.copies:
                self.copy(twin, self.copies[name].replace(part, f"{part}_m", 1))
            elif tensor.is_floating_point():
                self.state[twin] = tensor + 0.05 * torch.randn(tensor.shape, generator=self.generator)
            else:
                self.state[twin] = tensor

    def tied(self, leaves: State) -> State:
        """The state of these leaves in which copies are their originals."""
        return {name: leaves[self.copies.get(name, name)] for name in leaves}


def followed(state: State, momentum: float = 0.995) -> State:
    """The momentum copies after the update that a step begins with, under the student's names."""
    found = {}
    for name, tensor in state.items():
        part = name.split(".")[0]
        if part.endswith("_m") and tensor.is_floating_point():
            student = state[name.replace(part, part[:-2], 1)].detach()
            found[name.replace(part, part[:-2], 1)] = momentum * tensor.detach() + (1 - momentum) * student
    return found


def some_texts(rows: int, length: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Ids [rows, length], 0 at padding, and which are real."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 130, (rows, length), generator=generator)
    ids[:, 0] = 101
    keep = torch.arange(length)[None] < torch.randint(3, length + 1, (rows, 1), generator=generator)
    return ids * keep, keep
