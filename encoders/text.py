"""`text`: our own BERT-family stack, ids -> tokens.

Shapes: T texts, L length, D width, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import ClassVar, Literal, Self, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.form import FormConfig
from encoders.layers import Activation, Block, attention_mask, initialise, with_bias
from encoders.stack_weights import load_bert
from encoders.types import Texts, Tokens
from vlp.config import Config

Pool: TypeAlias = Literal["cls", "tanh", "last", "end", "largest", "eos", "mean", "token"]
"""How a text becomes one vector: the state of its first token; that through a dense layer and tanh (BERT's pooler); the
state of its last real token; of the last place, padding or not (SigLIP); of its largest id, which is <end_of_text> in
OpenAI's CLIP; of the first id `eos`; the mean; or the state of a learned token behind the text (CoCa, section 3.2)."""


class StackConfig(Config):
    """Sizes that every transformer stack of ours has."""

    width: int = 768
    """Width of the states."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads."""
    hidden: int | None = None
    """Width inside the feed-forward; None = 4 x width."""
    norm: Literal["pre", "post"] = "post"
    """Layer norm before (ViT) or after (BERT) each residual branch."""
    activation: Activation = "gelu"
    """Activation of the feed-forward."""
    eps: float = 1e-12
    """Epsilon of the layer norms."""
    dropout: float = 0.0
    """Dropout after each branch and on attention weights."""
    normformer: bool = False
    """Also a norm behind each attention and inside the feed-forward, and a factor per head (NormFormer; OFA)."""
    form: FormConfig = Field(default_factory=FormConfig)
    """What norms, linear maps and attention are, where not BERT's and ViT's (T5)."""
    init: str | None = None
    """Folder or hub id of a transformers BERT, RoBERTa or T5 whose layers fill this stack, or `package:NAME/path`."""

    def block(self, cross_width: int | None = None, scale: float | None = None) -> Block:
        """Build one block of these sizes; ``scale`` is that of :class:`Attention`."""
        return Block(
            self.width,
            self.heads,
            self.hidden or 4 * self.width,
            norm=self.norm,
            cross_width=cross_width,
            activation=self.activation,
            eps=self.eps,
            dropout=self.dropout,
            normformer=self.normformer,
            scale=scale,
            form=self.form,
        )

    def new_norm(self) -> nn.Module:
        """Build the norm behind the last block, which is the identity where blocks end with theirs."""
        return self.form.new_norm(self.width, self.eps) if self.norm == "pre" else nn.Identity()


class BesideConfig(Config):
    """Sizes of a stack beside the text encoder; what is not stated is the text encoder's own."""

    width: int | None = None
    """Width of the states; none = the text encoder's."""
    layers: int | None = None
    """Transformer blocks; none = as many as the text encoder has."""
    heads: int | None = None
    """Attention heads; none = the text encoder's."""
    hidden: int | None = None
    """Width inside the feed-forward; none = the text encoder's, or 4 x width where the widths differ."""
    norm: Literal["pre", "post"] | None = None
    """Layer norm before (ViT) or after (BERT) each residual branch; none = as the text encoder."""
    activation: Activation | None = None
    """Activation of the feed-forward; none = the text encoder's."""
    eps: float | None = None
    """Epsilon of the layer norms; none = the text encoder's."""
    dropout: float | None = None
    """Dropout after each branch and on attention weights; none = the text encoder's."""
    normformer: bool | None = None
    """Also a norm behind each attention and inside the feed-forward, and a factor per head; none = as the text
    encoder."""
    form: FormConfig | None = None
    """What norms, linear maps and attention are; none = as in the text encoder."""
    init: str | None = None
    """Folder or hub id of a transformers BERT, RoBERTa or T5 whose layers fill this stack."""

    any_form: ClassVar[bool] = False
    """Whether its layers may have another form than BERT's and ViT's."""

    def beside(self, text: StackConfig) -> Self:
        """Return the config with every size stated.

        Raises:
            ValueError: the layers would be of a form that they cannot have.
        """
        if not self.any_form and (self.form or text.form) != FormConfig():
            raise ValueError(
                f"{getattr(self, 'kind', 'this part')} has layers of the usual form, but model.text.form is another; "
                "use model.fusion.kind single_stream and model.decoder.kind causal, or state form: {} for this part"
            )
        sizes = {name: getattr(text, name) for name in StackConfig.model_fields if name != "init"}
        if self.width not in (None, text.width):
            sizes["hidden"] = None
        if sizes["layers"] == 0:
            sizes["layers"] = StackConfig.model_fields["layers"].default  # bare embeddings: the fusion is the tower
        return self.model_copy(update={name: size for name, size in sizes.items() if getattr(self, name) is None})

    @property
    def stack(self) -> StackConfig:
        """The sizes; those that neither it nor ``beside`` states are BERT's."""
        stated = {name: getattr(self, name) for name in StackConfig.model_fields}
        return StackConfig(**{name: size for name, size in stated.items() if size is not None})


class TextConfig(StackConfig):
    """A BERT-family text encoder, from transformers weights or from sizes; ``layers: 0`` = bare embeddings."""

    kind: Literal["text"] = "text"
    vocabulary_size: int | None = None
    """Rows of the word embedding; None = the tokenizer's."""
    padding_id: int | None = None
    """Word whose embedding reading it does not train (BERT's padding, 0); none = every word's is trained."""
    max_length: int = 512
    """Rows of the position embedding: the longest text."""
    position_offset: int = 0
    """First position id (RoBERTa: 2)."""
    absolute_positions: bool = True
    """Add a position embedding; off where attention knows the distances (VLMo)."""
    segments: int = 2
    """Rows of the token-type embedding; 0 = none (BLIP, CLIP)."""
    train_first_rows: bool = True
    """Train the rows of position and segment 0, which LXMERT takes for padding and leaves as they are."""
    embed_norm: bool = True
    """Layer norm after the embeddings (BERT); off for CLIP."""
    causal: bool = False
    """Every text is read left to right (CLIP)."""
    pool: Pool = "cls"
    """`pooled`: the state of one token, or the mean of the real ones."""
    eos: int | None = None
    """Id whose first place `pool: eos` reads."""
    token_sees: Literal["text", "text_late"] = "text"
    """What the token of `pool: token` sees: the real tokens and itself, or, one place late, the real tokens and the
    place behind the last of them (a pad, or else itself), as in all published CoCas."""
    pad: int = 0
    """Id of that pad."""
    project: int | None = None
    """Width that a norm and a dense layer bring the last states to (AltCLIP); none = they stay as they are."""
    fused_first: int | None = None
    """Id that a text begins with where it is fused with an image (BLIP's [ENC]); none = its own first id."""

    def build(self) -> TextEncoder:
        """Build the encoder with random weights."""
        return TextEncoder(self)


class TextEmbeddings(nn.Module):
    """Word, position and segment embeddings, summed and normalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        if config.vocabulary_size is None:
            raise ValueError("model.text.vocabulary_size is unknown: give it or a tokenizer")
        self.offset, self.max_length = config.position_offset, config.max_length
        self.word = nn.Embedding(config.vocabulary_size, config.width, padding_idx=config.padding_id)
        rows = config.max_length + config.position_offset + (config.pool == "token")
        fixed = None if config.train_first_rows else 0
        self.position = nn.Embedding(rows, config.width, fixed) if config.absolute_positions else None
        self.segment = nn.Embedding(config.segments, config.width, fixed) if config.segments else None
        self.norm = config.form.new_norm(config.width, config.eps) if config.embed_norm else nn.Identity()
        self.drop = nn.Dropout(config.dropout)

    def forward(self, texts: Texts, first: int = 0) -> Tensor:
        """Texts -> [T, L, D]; ``first`` is the position of the first token (generation)."""
        length = texts.ids.shape[1]
        if first + length > self.max_length:
            raise ValueError(
                f"texts of {first + length} tokens, but model.text.max_length is {self.max_length}; "
                "shorten data.max_length or raise it"
            )
        states = self.word(texts.ids)
        if self.position is not None:
            positions = texts.positions
            if positions is None:
                positions = torch.arange(first, first + length, device=texts.ids.device)[None] + self.offset
            states = states + self.position(positions)
        if self.segment is not None:
            segments = torch.zeros_like(texts.ids) if texts.segments is None else texts.segments
            states = states + self.segment(segments)
        return self.drop(self.norm(states))


class TextEncoder(nn.Module):
    """Texts -> tokens.

    Raises:
        ValueError: `pool: eos` without the id.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        if config.pool == "eos" and config.eos is None:
            raise ValueError("model.text.pool eos needs model.text.eos, the id of the token that ends texts")
        if config.pool == "token" and not config.causal:
            raise ValueError("model.text.pool token needs model.text.causal true: the token stands behind the text")
        if config.pool == "token" and config.form.buckets:
            raise ValueError("model.text.pool token has no distance to words; set model.text.form.buckets to 0")
        self.config, self.width, self.bare = config, config.project or config.width, config.layers == 0
        self.fused_first = config.fused_first
        self.embeddings = TextEmbeddings(config)
        self.blocks = nn.ModuleList(config.block() for _ in range(config.layers))
        self.final_norm = config.new_norm() if config.layers else nn.Identity()
        self.buckets = config.form.new_buckets(config.heads, not config.causal) if config.layers else None
        self.token = nn.Parameter(torch.full((config.width,), 0.01)) if config.pool == "token" else None
        self.project = _projection(config.width, config.project, config.eps) if config.project else nn.Identity()
        self.pooler = nn.Linear(self.width, self.width) if config.pool == "tanh" else None
        initialise(self)

    @property
    def stack(self) -> StackConfig:
        """Sizes that fusion and decoder follow."""
        return self.config

    @property
    def word_embedding(self) -> nn.Parameter:
        """[V, D], for tied heads."""
        weight = self.embeddings.word.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def load_pretrained(self) -> None:
        """Fill embeddings and blocks from ``config.init``, where the recipe names one."""
        if self.config.init is not None:
            load_bert(self, self.config.init, embeddings=True)

    def finish(self, states: Tensor) -> Tensor:
        """Bring a layer's states [T, L, D] through what follows the last block."""
        return self.project(self.final_norm(states))

    def forward(self, texts: Texts, layers: bool = False) -> Tokens:
        """Texts -> Tokens, states [T, L, D]; with ``layers`` also the embeddings' and every block's states.

        With a token behind the text (``pool: token``) only that goes through the final norm: the text's own states are
        the lower half of a decoder; ``layers`` hold the token's states last.
        """
        kind = "causal" if self.config.causal else texts.attention
        if self.token is None:
            states, keep = self.embeddings(texts), texts.keep
        else:
            states, keep = self._with_token(texts)
        mask = attention_mask(keep, kind, texts.prefix)
        if self.buckets is not None:
            mask = with_bias(mask, self.buckets(states.shape[1], states.shape[1]))
        every = [states]
        for block in self.blocks:
            states = block(states, mask)
            every.append(states)
        if self.token is not None:
            states, pooled = states[:, : texts.ids.shape[1]], self.finish(states[:, -1])
        else:
            states = self.finish(states)
            pooled = self._pool(states, texts)
        return Tokens(states, texts.keep, pooled, tuple(every) if layers else None, named=texts.boxes)

    def _with_token(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """Texts -> embeddings with the token at the last position, and what of them is seen: [T, M, D] and [T, M]."""
        assert self.token is not None
        keep, length = texts.keep, texts.ids.shape[1]
        if length < self.embeddings.max_length:  # one pad behind the longest text, so that padding changes nothing
            ids = F.pad(texts.ids, (0, 1), value=self.config.pad)
            texts, keep = replace(texts, ids=ids), F.pad(keep, (0, 1))
        states = self.embeddings(texts)
        token: Tensor = self.token
        if self.embeddings.position is not None:
            token = token + self.embeddings.position.weight[-1]
        states = torch.cat([states, token.to(states.dtype).expand(len(states), 1, -1)], 1)
        seen = torch.ones_like(keep[:, :1])
        # Attention is causal, so a key that is shown one place late is first seen by the place behind the text.
        return states, torch.cat([keep, seen] if self.config.token_sees == "text" else [seen, keep], 1)

    def _pool(self, states: Tensor, texts: Texts) -> Tensor:
        if self.pooler is not None:
            return torch.tanh(self.pooler(states[:, 0]))
        return pool(states, texts, self.config.pool, self.config.eos)


def _projection(width: int, to: int, eps: float) -> nn.Sequential:
    return nn.Sequential(OrderedDict(norm=nn.LayerNorm(width, eps), dense=nn.Linear(width, to)))


def pool(states: Tensor, texts: Texts, how: Pool, eos: int | None = None) -> Tensor:
    """States [T, L, D] of texts -> [T, D]; "eos" asks for the id ``eos``."""
    if how == "cls":
        return states[:, 0]
    if how == "end":
        return states[:, -1]
    if how == "mean":
        weight = texts.keep[:, :, None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1)
    if how == "last":
        at = texts.keep.sum(1) - 1
    elif how == "largest":
        at = texts.ids.argmax(1)
    else:
        assert eos is not None
        at = (texts.ids == eos).int().argmax(1)
    return states.gather(1, at[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]
