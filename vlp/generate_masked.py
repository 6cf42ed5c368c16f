"""Writing text with a masked model: the next word is what stands for a mask behind the words so far.

How models without a decoder caption (Dong et al. 2019, UniLM, section 2.3; OSCAR, BEiT-3): image tokens see the image,
words see the image and the words before them, and one [MASK] is predicted at a time.
Shapes: B images, N rows run, L text length, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from encoders.layers import KeyValues
from encoders.text import TextEncoder
from encoders.types import Images, Regions, Texts, Tokens, Vocabulary
from objectives.seq2seq_mlm import Seq2SeqMlm
from vlp.fusion.multiway import Multiway
from vlp.generate import Generated, GenerationConfig, generate
from vlp.model import Model


class MaskedStepper:
    """A fusion and a head over its text states; a mask is read behind the words, and forgotten.

    Args:
        model: in evaluation mode.
        head: states [N, D] -> logits [N, V].
        image: what the fusion reads, [B, tokens, D].
        mask: id of the mask.
        use_cache: keep keys and values of image and words, where the fusion can; else all is read again at each step.
    """

    def __init__(self, model: Model, head: nn.Module, image: Tokens, mask: int, use_cache: bool = True) -> None:
        self.model, self.head, self.image, self.mask = model, head, image, mask
        self.rows = torch.arange(image.states.shape[0], device=image.states.device)
        self.read: Tensor | None = None
        cached = use_cache and isinstance(model.fusion, Multiway) and model.is_tower("text")
        self.caches = model.fusion.start(image) if cached and isinstance(model.fusion, Multiway) else None

    def step(self, ids: Tensor) -> Tensor:
        """Read the newest ids [N, L'] -> logits [N, V] of the next word."""
        first = 0 if self.read is None else self.read.shape[1]
        self.read = ids if self.read is None else torch.cat([self.read, ids], 1)
        new = torch.cat([ids, torch.full_like(ids[:, :1], self.mask)], 1)
        states = self._again() if self.caches is None else self._on(new, first)
        return self.head(states[:, -1])

    def _on(self, new: Tensor, first: int) -> Tensor:
        """Read ``new`` [N, L'] from position ``first`` on, and forget the last of them."""
        fusion, text = self.model.fusion, self.model.text
        assert isinstance(fusion, Multiway) and isinstance(text, TextEncoder) and self.caches is not None
        words = text.embeddings(Texts(new, torch.ones_like(new, dtype=torch.bool)), first)
        states = fusion.step(words, first, self.image.states.shape[1], self.caches)
        for cache in self.caches:
            assert cache.past is not None
            cache.past = KeyValues(cache.past.keys[:, :, :-1], cache.past.values[:, :, :-1])
        return states

    def _again(self) -> Tensor:
        """Read everything."""
        assert self.read is not None and self.model.fusion is not None
        ids = torch.cat([self.read, torch.full_like(self.read[:, :1], self.mask)], 1)
        text = self.model.text(Texts(ids, torch.ones_like(ids, dtype=torch.bool), attention="causal"))
        fused = self.model.fusion(self.image, text, self.rows, "causal")
        assert fused.text is not None
        return fused.text.states

    def reorder(self, index: Tensor) -> None:
        """Go on with the rows ``index`` [M]."""
        self.rows = self.rows.index_select(0, index)
        self.read = None if self.read is None else self.read.index_select(0, index)
        for cache in self.caches or ():
            cache.reorder(index)


def masked_writer(model: Model) -> Seq2SeqMlm | None:
    """Return the objective whose head writes; None if the model has no such."""
    return next((one for one in model.objectives.values() if isinstance(one, Seq2SeqMlm)), None)


@torch.no_grad()
def generate_masked(
    model: Model, images: Images | Regions, vocabulary: Vocabulary, config: GenerationConfig, use_cache: bool = True
) -> Generated:
    """Write one text for each image, bos first.

    Args:
        model: in evaluation mode, with an objective of kind seq2seq_mlm.
        images: B of them.
        vocabulary: of the tokenizer; a text begins with its cls and ends with its sep, as the masked captions did.
        config: how to write; ``max_length`` counts both.
        use_cache: as for :class:`MaskedStepper`.

    Raises:
        ValueError: the model cannot write so, or the tokenizer has no mask.
    """
    writer = masked_writer(model)
    if writer is None or vocabulary.mask is None:
        what = "its tokenizer has no mask token" if writer else f"its objectives are {sorted(model.objectives)}"
        raise ValueError(f"this model cannot write text by masks, {what}; train objective seq2seq_mlm")
    stepper = MaskedStepper(model, writer.head, model.vision(images), vocabulary.mask, use_cache)
    prompt = torch.full_like(stepper.rows, vocabulary.cls)[:, None]
    return generate(stepper, prompt, config, eos=vocabulary.sep, pad=vocabulary.pad)
