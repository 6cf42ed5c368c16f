"""`hf_text`: any transformers text encoder as it is, ids -> tokens.

Shapes: T texts, L length, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from encoders.text import Pool, StackConfig, pool
from encoders.types import Texts, Tokens
from vlp.config import Config


class HfTextConfig(Config):
    """A transformers text encoder by folder or hub id."""

    kind: Literal["hf_text"] = "hf_text"
    model: str = ""
    """Folder or hub id with a config.json."""
    pretrained: bool = True
    """Start from its weights (else from its sizes only)."""
    architecture: dict[str, Any] = Field(default_factory=dict)
    """The values of its config.json; filled when the model is built, so that a checkpoint needs no other folder."""
    pool: Pool = "cls"
    """`pooled`: the state of one token, or the mean of the real ones."""
    eos: int | None = None
    """Id whose first place `pool: eos` reads."""

    def build(self) -> HfTextEncoder:
        """Build the encoder with random weights."""
        return HfTextEncoder(self)


class HfTextEncoder(nn.Module):
    """Texts -> tokens of a transformers model. Reads "full" attention only.

    Raises:
        ValueError: the model cannot be found.
    """

    bare = False

    def __init__(self, config: HfTextConfig) -> None:
        from transformers import AutoConfig

        super().__init__()
        if config.architecture:
            theirs = config_of(config.architecture)
        else:
            try:
                theirs = AutoConfig.from_pretrained(config.model)
            except OSError as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"model.text.model: no transformers config at {config.model!r}: {reason}") from error
        self.config = config.model_copy(
            update={"architecture": theirs.to_diff_dict() | {"model_type": theirs.model_type}}
        )
        self.model: Any = model_of(theirs)
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # nobody reads it, and it would have no gradient
        self.width: int = theirs.hidden_size

    @property
    def stack(self) -> StackConfig:
        """Sizes that fusion and decoder follow; what its config does not name in BERT's way is BERT's."""
        theirs = self.model.config
        heads = getattr(theirs, "num_attention_heads", max(1, self.width // 64))
        layers, eps = getattr(theirs, "num_hidden_layers", 12), getattr(theirs, "layer_norm_eps", 1e-12)
        hidden = getattr(theirs, "intermediate_size", None)
        return StackConfig(width=self.width, layers=layers, heads=heads, hidden=hidden, eps=eps)

    @property
    def word_embedding(self) -> nn.Parameter:
        """[V, D], for tied heads."""
        return self.model.get_input_embeddings().weight

    def load_pretrained(self) -> None:
        """Fill the weights from the folder or hub id, where the recipe asks for them."""
        from transformers import AutoModel

        if self.config.pretrained:
            weights = AutoModel.from_pretrained(self.config.model, dtype=torch.float32).state_dict()
            self.model.load_state_dict(
                {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
            )

    def forward(self, texts: Texts, layers: bool = False) -> Tokens:
        """Texts -> Tokens, states [T, L, D].

        Raises:
            ValueError: the view is not read with full attention (this encoder would leak the future).
        """
        if texts.attention != "full":
            raise ValueError(
                f"model.text.kind hf_text reads full attention only, not a {texts.attention} view; "
                "use model.text.kind text"
            )
        given = {"token_type_ids": texts.segments, "position_ids": texts.positions}
        found = self.model(
            input_ids=texts.ids,
            attention_mask=texts.keep.long(),
            output_hidden_states=layers,
            **{name: value for name, value in given.items() if value is not None},
        )
        states = found.last_hidden_state
        pooled = pool(states, texts, self.config.pool, self.config.eos)
        return Tokens(states, texts.keep, pooled, found.hidden_states if layers else None)


def config_of(architecture: Mapping[str, Any]) -> Any:
    """Build a config of transformers from the values of a config.json, whoever wrote it.

    Entries that choose code instead of sizes are left out: attention kernels may come from the hub.

    Raises:
        ValueError: transformers does not know the kind of model, or refuses a value.
    """
    from transformers import AutoConfig

    values = {
        name: value
        for name, value in architecture.items()
        if not name.startswith("_") and name not in ("attn_implementation", "auto_map", "quantization_config", "dtype")
    }
    try:
        return AutoConfig.for_model(values.pop("model_type", "none"), **values)
    except Exception as error:  # validators of transformers raise errors of many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"transformers cannot build a config of {architecture.get('model_type')!r}: {reason}"
        ) from error


def model_of(config: Any) -> Any:
    """Build the float32 model of a config of transformers: the class that is called as the config is, or AutoModel's.

    Raises:
        ValueError: there is none.
    """
    import transformers

    # Towers such as AltCLIPTextModel are not registered, and looking in the register takes seconds.
    named = getattr(transformers, type(config).__name__.replace("Config", "Model"), None)
    return transformers.AutoModel.from_config(config, dtype=torch.float32) if named is None else named(config).float()
