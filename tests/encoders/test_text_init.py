"""`text` from a transformers BERT: words that a recipe adds keep their initial weights."""

import pytest
import torch
from transformers import BertConfig, BertModel

from encoders import TextConfig


def test_added_words_keep_their_initial_weights(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    theirs = BertModel(BertConfig(vocab_size=50, max_position_embeddings=20, **sizes))
    theirs.save_pretrained(tmp_path)
    small = {"width": 32, "layers": 1, "heads": 2, "hidden": 64, "max_length": 16, "init": str(tmp_path)}
    encoder = TextConfig(vocabulary_size=52, **small).build()
    before = encoder.word_embedding.detach().clone()
    encoder.load_pretrained()
    assert torch.equal(encoder.word_embedding[:50], theirs.embeddings.word_embeddings.weight)
    assert torch.equal(encoder.word_embedding[50:], before[50:])
    with pytest.raises(ValueError, match=r"word.weight is \(50, 32\), the recipe needs \(40, 32\)"):
        TextConfig(vocabulary_size=40, **small).build().load_pretrained()
