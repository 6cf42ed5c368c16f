import json
import os
import pickle
import random

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from vlp.data.tokenizer import (
    OpenClipTokenizer,
    TokenizerConfig,
    TransformersTokenizer,
    build_tokenizer,
    load_tokenizer,
)
from vlp.data.wordpiece import train_wordpiece

CAPTIONS = [
    "A cat sits on the mat.",
    "Two cats, sitting; the dog runs!",
    "Ein Mädchen läuft über die Straße",
    "the dog sat on a log, the cat on the mat",
    "running dogs and a sitting cat",
] * 3
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "play", "##ing", "##s", "dog", ".", ","]


def bert_folder(path):
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(path)
    return str(path)


def byte_level(**special):
    """A byte-level BPE as RoBERTa and GPT-2 have one, trained here."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    backend.train_from_iterator(CAPTIONS, trainer)
    return backend


def roberta_folder(path):
    special = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    backend = byte_level(**special)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="<s>", sep_token="</s>", **special).save_pretrained(
        path
    )
    return str(path)


def starts(tokenizer, text, max_length=32):
    ids, word_starts = tokenizer.encode(text, max_length)
    assert ids.dtype == np.int64 and word_starts.dtype == np.bool_ and ids.shape == word_starts.shape
    assert ids[0] == tokenizer.vocabulary.cls and ids[-1] == tokenizer.vocabulary.sep
    assert not word_starts[0] and not word_starts[-1]
    return ids.tolist(), word_starts.astype(int).tolist()


def test_bert_folder(tmp_path):
    tokenizer = build_tokenizer(TokenizerConfig(source=bert_folder(tmp_path)), iter(()))
    v = tokenizer.vocabulary
    assert (v.size, v.pad, v.cls, v.sep, v.mask, v.bos, v.eos) == (len(WORDS), 0, 2, 3, 4, 2, 3)
    ids, word_starts = starts(tokenizer, "A cat, playing dogs.")
    assert [WORDS[i] for i in ids] == ["[CLS]", "a", "cat", ",", "play", "##ing", "dog", "##s", ".", "[SEP]"]
    assert word_starts == [0, 1, 1, 1, 1, 0, 1, 0, 1, 0]
    assert tokenizer.decode(np.array(ids)) == "a cat, playing dogs."
    assert ids == AutoTokenizer.from_pretrained(tmp_path)("A cat, playing dogs.").input_ids


def test_encode_cuts_and_keeps_the_last_special_id(tmp_path):
    tokenizer = build_tokenizer(TokenizerConfig(source=bert_folder(tmp_path)), ())
    assert starts(tokenizer, "a cat playing " * 20, 6) == ([2, 5, 6, 7, 8, 3], [0, 1, 1, 1, 0, 0])
    assert starts(tokenizer, "a cat", 2)[0] == [2, 3]
    assert starts(tokenizer, "", 8) == ([2, 3], [0, 0])
    # A special token that someone wrote into a caption is no word.
    assert starts(tokenizer, "a [SEP] cat", 8) == ([2, 5, 3, 6, 3], [0, 1, 0, 1, 0])


def test_byte_level_bpe_like_roberta(tmp_path):
    tokenizer = build_tokenizer(TokenizerConfig(source=roberta_folder(tmp_path)), ())
    v = tokenizer.vocabulary
    assert (v.pad, v.cls, v.sep, v.mask, v.bos, v.eos) == (1, 0, 2, 4, 0, 2)
    text = "the cat läuft, sitting!"
    ids, word_starts = starts(tokenizer, text, 64)
    assert sum(word_starts) == 6 and len(ids) == 8  # the, cat, läuft, ",", sitting, "!"
    assert tokenizer.decode(ids) == text
    assert ids == AutoTokenizer.from_pretrained(tmp_path)(text).input_ids


def test_roberta_class_of_transformers():
    backend = byte_level(a="<s>", b="<pad>", c="</s>", d="<unk>", e="<mask>")
    merges = [tuple(m) for m in json.loads(backend.to_str())["model"]["merges"]]
    tokenizer = TransformersTokenizer(RobertaTokenizer(vocab=backend.get_vocab(), merges=merges), "roberta")
    assert tokenizer.vocabulary.cls == tokenizer.vocabulary.bos == 0 and tokenizer.vocabulary.mask == 4
    assert sum(starts(tokenizer, "the cat on the mat", 64)[1]) == 5


def test_gpt2_has_only_an_end_and_says_that_it_is_wrapped(caplog):
    backend = byte_level(eos="<|endoftext|>")
    merges = [tuple(m) for m in json.loads(backend.to_str())["model"]["merges"]]
    tokenizer = TransformersTokenizer(GPT2Tokenizer(vocab=backend.get_vocab(), merges=merges), "gpt2")
    v = tokenizer.vocabulary
    assert v.cls == v.sep == v.bos == v.eos == v.pad and v.mask is None
    assert tokenizer.decode(tokenizer.encode("the cat", 32)[0]) == "the cat"
    assert "itself encodes 'a'" in caplog.text


def test_open_clip_bpe(tmp_path):
    tokenizer = build_tokenizer(TokenizerConfig(source="open_clip:ViT-B-32"), ())
    v = tokenizer.vocabulary
    assert (v.size, v.pad, v.cls, v.sep, v.mask, v.bos, v.eos) == (49408, 0, 49406, 49407, None, 49406, 49407)
    ids, word_starts = starts(tokenizer, "a photo of an electroencephalograph", 16)
    assert ids[1:4] == [320, 1125, 539]  # as published: "a", "photo", "of"
    assert sum(word_starts) == 5 and word_starts[-2] == 0
    assert tokenizer.decode(ids) == "a photo of an electroencephalograph"
    assert len(tokenizer.encode("cat " * 100, 77)[0]) == 77
    tokenizer.save(tmp_path)
    for other in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert isinstance(other, OpenClipTokenizer) and other.vocabulary == v
        assert other.encode("a cat", 9)[0].tolist() == tokenizer.encode("a cat", 9)[0].tolist()


def test_a_mask_token_for_who_has_none(tmp_path):
    tokenizer = build_tokenizer(TokenizerConfig(source="open_clip:ViT-B-32", add_mask=True), ())
    v = tokenizer.vocabulary
    assert (v.size, v.mask, v.cls, v.sep) == (49409, 49408, 49406, 49407) and 49408 in v.special
    tokenizer.save(tmp_path)
    for other in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert other.vocabulary == v and other.decode([320, 49408, 2368]) == "a cat"
    theirs = tokenizer.as_transformers()
    assert (theirs.mask_token_id, len(theirs), theirs("a cat").input_ids) == (49408, 49409, [49406, 320, 2368, 49407])
    own = build_tokenizer(TokenizerConfig(size=120, add_mask=True), iter(CAPTIONS))
    assert own.vocabulary == build_tokenizer(TokenizerConfig(size=120), iter(CAPTIONS)).vocabulary  # it has one


def test_trained_wordpiece(tmp_path):
    tokenizer = build_tokenizer(TokenizerConfig(size=120), iter(CAPTIONS))
    v = tokenizer.vocabulary
    assert (v.pad, v.cls, v.sep, v.mask, v.bos, v.eos) == (0, 2, 3, 4, 2, 3) and 60 < v.size <= 120
    text = "a cat, running on the mat."
    ids, word_starts = starts(tokenizer, text, 64)
    assert sum(word_starts) == 8 and 1 not in ids
    assert tokenizer.decode(ids) == text
    assert starts(tokenizer, "LÄUFT")[0] == starts(tokenizer, "lauft")[0]  # BERT's normaliser drops accents, too
    assert starts(tokenizer, "中")[0] == [2, 1, 3]
    tokenizer.save(tmp_path)
    outside = AutoTokenizer.from_pretrained(tmp_path)
    assert outside(text).input_ids == ids and outside.mask_token_id == 4
    for other in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert other.vocabulary == v
        assert [x.tolist() for x in other.encode(text, 64)] == [x.tolist() for x in tokenizer.encode(text, 64)]
        assert other.decode(ids) == text


def test_case_is_kept_on_request():
    tokenizer = build_tokenizer(TokenizerConfig(lowercase=False, size=200), CAPTIONS)
    assert tokenizer.decode(tokenizer.encode("Ein Mädchen", 32)[0]) == "Ein Mädchen"


def test_size_holds_even_with_a_large_alphabet():
    captions = ["".join(chr(0x3B1 + i) for i in range(24)), *(f"{chr(0x430 + i)} x" for i in range(30))]
    tokenizer = build_tokenizer(TokenizerConfig(size=64, min_frequency=1), captions)
    assert tokenizer.vocabulary.size <= 64


def test_the_same_captions_give_the_same_vocabulary(monkeypatch):
    # The trainer of `tokenizers` alone gives another one at each call: it counts in randomly keyed hash tables.
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    captions = [f"word{i} ab{i % 7}cd fg{i * i} some thing" for i in range(200)]
    found = set()
    for i in range(4):
        random.Random(i).shuffle(captions)
        trained = train_wordpiece(captions, size=150, min_frequency=2, lowercase=True)
        found.add(json.dumps(trained.get_vocab(), sort_keys=True))
    assert len(found) == 1 and len(json.loads(found.pop())) == 150
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_mistakes_are_one_line(tmp_path):
    cases = [
        (TokenizerConfig(), "found no captions"),
        (TokenizerConfig(source="open_clip:ViT-B-99"), "no model 'ViT-B-99'"),
        (TokenizerConfig(source="open_clip:ViT-L-14-CLIPA"), "its strip_sep_token is not known"),
        (TokenizerConfig(source=str(tmp_path)), "cannot be loaded"),
    ]
    for config, words in cases:
        with pytest.raises(ValueError, match=words) as caught:
            build_tokenizer(config, [" "])
        assert "\n" not in str(caught.value) and "data.tokenizer.source" in str(caught.value)
    with pytest.raises(ValueError, match="there is no folder"):
        load_tokenizer(tmp_path / "missing")


def test_a_tokenizer_without_begin_is_refused():
    backend = Backend(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match=r"'t5' has no token to begin \(cls or bos\)"):
        TransformersTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"), "t5")
