"""Tokenizers of the published families, in the files that they come in."""

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import BertTokenizer, CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer, XLMRobertaTokenizer

from vlp.data.cleaning import clean_text
from vlp.data.tokenizer import OpenClipTokenizer, TokenizerConfig, build_tokenizer, load_tokenizer

GOLDENS = Path(__file__).parents[2] / "goldens" / "tokenizers"
PIECES = [("▁", -3.0), ("▁a", -1.0), ("▁cat", -1.5), ("s", -2.0), ("▁dog", -1.7), ("t", -4.0), ("c", -4.5), ("a", -4.0)]


@pytest.fixture(scope="module")
def recorded():
    return json.loads((GOLDENS / "tokenizers.json").read_text())


def ids(tokenizer, text, max_length=40):
    return tokenizer.encode(text, max_length)[0].tolist()


def build(source, **fields):
    return build_tokenizer(TokenizerConfig(source=str(source), **fields), ())


def same_again(tokenizer, folder, texts=("a cat", "", "a dogs cat " * 30)):
    """A saved, and a pickled, tokenizer does what it did."""
    tokenizer.save(folder)
    for other in (load_tokenizer(folder), pickle.loads(pickle.dumps(tokenizer)), build(folder)):
        assert other.vocabulary == tokenizer.vocabulary
        assert (other.rules, other.begins) == (tokenizer.rules, tokenizer.begins)
        for text in texts:
            for ours, theirs in zip(other.encode(text, 24), tokenizer.encode(text, 24)):
                assert np.array_equal(ours, theirs)


def test_clip_bpe_is_open_clips(recorded, tmp_path):
    case = recorded["clip_bpe"]
    tokenizer, padded = build("open_clip:ViT-B-32"), build("open_clip:ViT-B-32", fixed_length=77)
    v = tokenizer.vocabulary
    assert (v.cls, v.sep, v.pad) == (case["sot"], case["eot"], case["pad"])
    for text, wanted, whole in zip(case["strings"], case["padded_ids"], case["encoded"], strict=True):
        assert ids(padded, text, 77) == wanted
        assert ids(tokenizer, text, 1000) == [v.cls, *whole, v.sep]
    same_again(tokenizer, tmp_path)
    same_again(padded, tmp_path)


def test_wordpiece_is_berts(recorded, tmp_path):
    case = recorded["wordpiece"]
    tokenizer = build(GOLDENS / "wordpiece_vocab.txt")
    words = (GOLDENS / "wordpiece_vocab.txt").read_text().splitlines()
    for text, wanted, pieces in zip(case["strings"], case["input_ids"], case["tokens"], strict=True):
        found = ids(tokenizer, text)
        assert found == wanted and [words[i] for i in found] == pieces
    for pair in case["pairs"]:
        found, segments = tokenizer.encode_pair(*pair["pair"], 20)
        assert found.tolist() == pair["input_ids"] and segments.tolist() == pair["token_type_ids"]
    same_again(tokenizer, tmp_path)


def test_a_vocabulary_with_capitals_is_cased(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "Cat", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    assert ids(build(tmp_path), "a Cat cat") == [2, 5, 6, 7, 3]  # a folder with nothing else in it
    (tmp_path / "vocab.txt").write_text("\n".join(words).replace("Cat", "dog") + "\n")
    assert ids(build(tmp_path), "A Cat DOG") == [2, 5, 7, 6, 3]


def test_blips_two_tokens(tmp_path):
    words = (GOLDENS / "wordpiece_vocab.txt").read_text().splitlines()
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(dict.fromkeys(words)) + "\n")  # the case's own has a word twice
    blip = {"added_tokens": ("[DEC]", "[ENC]"), "bos_token": "[DEC]"}
    plain, tokenizer = build(file), build(file, **blip)
    size = plain.vocabulary.size
    v = tokenizer.vocabulary
    assert (v.size, v.bos, v.eos, v.cls) == (size + 2, size, v.sep, plain.vocabulary.cls)
    assert size == len(set(words)) and ids(tokenizer, "a [ENC] b") == [v.cls, 5, size + 1, 6, v.sep]
    assert ids(tokenizer, "a photo, cats") == ids(plain, "a photo, cats")
    assert tokenizer.decode([v.bos, *ids(plain, "a cat")[1:]]) == "a cat"
    same_again(tokenizer, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"bos_token '\[DEC\]' is not in the vocabulary"):
        build(file, bos_token="[DEC]")
    with pytest.raises(ValueError, match="takes no further tokens"):
        build("open_clip:ViT-B-32", **blip)
    with pytest.raises(ValueError, match="remove duplicate words"):
        build(GOLDENS / "wordpiece_vocab.txt", **blip)


def clip_files(folder):
    letters = list("abcdefghijklmnopqrstuvwxyz")
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = "\n".join(" ".join(pair) for pair in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}\n")
    return CLIPTokenizer(vocab=vocabulary, merges=merges), vocabulary


@pytest.mark.parametrize("whole", [True, False])
def test_clip_of_transformers_pads_with_its_end(tmp_path, whole):
    reference, vocabulary = clip_files(tmp_path)
    if whole:
        reference.save_pretrained(tmp_path)
    tokenizer = build(tmp_path)
    v, end = tokenizer.vocabulary, vocabulary["<|endoftext|>"]
    assert (v.cls, v.sep, v.bos, v.eos, v.pad, v.mask) == (end - 1, end, end - 1, end, end, None)
    for text in ("A CAT  dogs", "", "cat " * 50):
        assert ids(tokenizer, text, 20) == reference(text, truncation=True, max_length=20).input_ids
    assert tokenizer.encode("a cats", 20)[1].astype(int).tolist() == [0, 1, 1, 0, 0, 0]
    same_again(tokenizer, tmp_path / "saved")


def t5(folder, **fields):
    start = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = T5Tokenizer(vocab=[*start, *PIECES], extra_ids=0, **fields)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_t5_has_no_begin(tmp_path, caplog):
    reference = t5(tmp_path)
    tokenizer = build(tmp_path)
    v = tokenizer.vocabulary
    assert not tokenizer.begins and (v.pad, v.sep, v.eos, v.bos, v.cls) == (0, 1, 1, 0, 0)
    found, starts = tokenizer.encode("a cats dog", 40)
    assert found.tolist() == reference("a cats dog").input_ids == [4, 5, 6, 7, 1]
    assert starts.astype(int).tolist() == [1, 1, 0, 1, 0]
    assert ids(tokenizer, "cats cats cats", 4) == [5, 6, 5, 1]
    assert tokenizer.decode(found) == "a cats dog" and not caplog.text
    same_again(tokenizer, tmp_path / "saved")


def test_siglip_cleans_pads_and_attends_its_padding(tmp_path):
    t5(tmp_path, pad_token="</s>")
    file = tmp_path / "tokenizer_config.json"
    file.write_text(file.read_text().replace("T5Tokenizer", "SiglipTokenizer"))
    tokenizer = build(tmp_path)
    assert (tokenizer.rules.clean, tokenizer.rules.fixed_length, tokenizer.vocabulary.pad) == ("siglip", 64, 1)
    found, starts = tokenizer.encode("A  Cat's, DOG!", 64)
    assert found.tolist() == [4, 5, 6, 7, *[1] * 60] and starts.sum() == 3 and len(starts) == 64
    assert ids(tokenizer, "cats " * 90, 64) == [5, 6] * 31 + [5, 1]
    assert len(ids(tokenizer, "a", 16)) == 16
    same_again(tokenizer, tmp_path / "saved")
    assert build(tmp_path, fixed_length=8).rules.fixed_length == 8


def test_folder_of_open_clip(tmp_path):
    t5(tmp_path, pad_token="</s>")
    text = {"hf_tokenizer_name": "some/where", "tokenizer_kwargs": {"clean": "canonicalize"}, "context_length": 64}
    config = {"model_cfg": {"text_cfg": {**text, "no_causal_mask": True}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    tokenizer = build(tmp_path)  # its files are those in the folder
    assert (tokenizer.rules.clean, tokenizer.rules.fixed_length) == ("canonicalize", 64)
    assert ids(tokenizer, "a_cat's &amp; dog.", 64)[:6] == [4, 5, 6, 7, 1, 1]
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": {"context_length": 77}}}))
    assert isinstance(load_tokenizer(tmp_path), OpenClipTokenizer)
    same_again(tokenizer, tmp_path / "saved")


def proto(*fields):
    """A protocol buffer of (number, value) pairs."""
    data = b""
    for number, value in fields:
        if isinstance(value, int):
            data += bytes([number << 3, value])
        elif isinstance(value, float):
            data += bytes([number << 3 | 5]) + struct.pack("<f", value)
        else:
            length = len(value)
            data += bytes([number << 3 | 2, length & 127 | 128, length >> 7]) + value
    return data


def sentencepiece(path, start, kind=1):
    pieces = [(1, proto((1, name.encode()), (2, score), (3, 1))) for name, score in [*start, *PIECES]]
    path.write_bytes(proto(*pieces, (2, proto((1, b"data"), (3, kind), (4, 12))), (3, proto((1, b"nmt_nfkc"), (3, 1)))))
    return path


def test_sentencepiece_of_beit3(tmp_path):
    start = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    tokenizer = build(sentencepiece(tmp_path / "beit3.spm", start))
    v = tokenizer.vocabulary
    mask = 3 + len(PIECES) + 1  # with the published 64000 pieces: 64001
    assert (v.cls, v.pad, v.sep, v.mask, v.bos, v.eos, v.size) == (0, 1, 2, mask, 0, 2, mask + 1)
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *PIECES, ("<mask>", 0.0)]
    reference = XLMRobertaTokenizer(vocab=vocabulary)
    for text in ("a cats dog", "  a   catz ", "zebra", "", "dog dogs"):
        assert ids(tokenizer, text) == reference(text).input_ids
    assert ids(tokenizer, "a cats") == [0, 5, 6, 7, 2]
    assert tokenizer.decode([0, 5, 6, 7, 2]) == "a cats"
    assert tokenizer.encode("a cats dog", 40)[1].astype(int).tolist() == [0, 1, 1, 0, 1, 0]
    same_again(tokenizer, tmp_path / "saved")


def test_sentencepiece_of_t5_and_in_a_folder(tmp_path):
    sentencepiece(tmp_path / "spiece.model", [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)])
    tokenizer = build(tmp_path)
    assert not tokenizer.begins and ids(tokenizer, "a cats dog") == [4, 5, 6, 7, 1]


def test_a_broken_sentencepiece_model_is_one_line(tmp_path):
    start = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    whole = sentencepiece(tmp_path / "whole.spm", start).read_bytes()
    (tmp_path / "cut.spm").write_bytes(whole[: len(whole) // 2 + 1])
    (tmp_path / "text.spm").write_text("not a model")
    sentencepiece(tmp_path / "bpe.model", start, kind=2)
    for name in ("cut.spm", "text.spm", "bpe.model"):
        with pytest.raises(ValueError, match=f"'{name}' is no") as caught:
            build(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_bare_tokenizer_json(tmp_path):
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"])}
    backend = BertTokenizer(vocab=vocabulary).backend_tokenizer
    backend.save(str(tmp_path / "tokenizer.json"))
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        v = build(source).vocabulary
        assert (v.cls, v.sep, v.pad, v.mask) == (2, 3, 0, 4) and ids(build(source), "A cat") == [2, 5, 6, 3]


def test_gemma_marks_words_without_splitting(tmp_path):
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "c", "t", "▁", "at", "cat", "▁cat", "▁a"]
    merges = [("a", "t"), ("c", "at"), ("▁", "cat"), ("▁", "a")]
    backend = Backend(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(Regex(" "), "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Replace("▁", " ")
    backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    tokenizer = build(tmp_path)
    found, starts = tokenizer.encode("cat a cat", 40)
    assert found.tolist() == [9, 11, 10, 1] and starts.astype(int).tolist() == [1, 1, 1, 0]
    assert not tokenizer.begins and tokenizer.vocabulary.bos == 2 and tokenizer.decode(found) == "cat a cat"


@pytest.mark.parametrize(
    "kind, text, wanted",
    [
        ("albef", "The  Man's hat-rack/shelf, <person> & co.\n", "the mans hat rack shelf person & co"),
        ("albef", 'Wait... "what"? (no) #1:2;3~4*', "wait what no 1234"),
        ("albef_question", "What's  on-top, of it? ", "whats  on top of it"),
        ("blip", "The  Man's hat-rack/shelf, <person>.A dog!\n", "the man's hat-rack/shelf, <person> a dog"),
        ("blip_question", "What's  on-top, of it? e.g. (x) ", "what's  on-top, of it? eg x"),
        ("siglip", "A_B  Cat's\tTAIL.", "ab cats tail"),
        ("canonicalize", "A_B  Cat's\tTAIL &amp; so.", "a b cats tail so"),
        ("whitespace", "A  B &lt;c&gt;\n", "A B <c>"),
        ("lower", "A  B &lt;c&gt;\n", "a b <c>"),
        ("none", " A  b. ", " A  b. "),
    ],
)
def test_cleaning_is_that_of_the_family(kind, text, wanted):
    assert clean_text(text, kind) == wanted


def test_texts_are_cut_after_so_many_words(tmp_path):
    assert clean_text("a b. c d", "albef", 3) == "a b c" and clean_text("a b", "albef", 3) == "a b"
    assert clean_text("a  b c", "albef_question", 2) == "a "  # its questions keep double spaces, which count
    tokenizer = build(GOLDENS / "wordpiece_vocab.txt", clean="albef", max_words=2)
    assert ids(tokenizer, "A cat-photo!") == [2, 5, 91, 3]
    same_again(tokenizer, tmp_path)
    build(GOLDENS / "wordpiece_vocab.txt").save(tmp_path)  # rules of another tokenizer do not stay behind
    assert load_tokenizer(tmp_path).rules.clean == "none"


def test_a_trained_tokenizer_learns_clean_texts():
    captions = ["a dog's cat-flap!", "the DOG."] * 3
    tokenizer = build_tokenizer(TokenizerConfig(size=64, clean="albef"), captions)
    assert tokenizer.decode(ids(tokenizer, "Dog's cat-flap")) == "dogs cat flap"
    assert "-" not in tokenizer._tokenizer.get_vocab()


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.bin").write_text("x")
    rules = tmp_path / "rules"
    build(GOLDENS / "wordpiece_vocab.txt").save(rules)
    (rules / "tokenizer_rules.json").write_text('{"clean": "soap"}')
    cases = [tmp_path, tmp_path / "broken.json", tmp_path / "other.bin", tmp_path / "gone", rules]
    cases += ["open_clip:ViT-B-32-CLIPS"]
    for source in cases:
        with pytest.raises(ValueError) as caught:
            build(source)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, source


def test_a_folder_that_brings_code_runs_none(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}})
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="cannot be loaded"):
        build(tmp_path)
    assert not (tmp_path / "ran").exists()
