"""Tokenizer files of any kind to a fast tokenizer of transformers.

Folders as transformers writes them, and what other authors ship: a bare ``vocab.txt``, ``vocab.json`` and
``merges.txt``, ``tokenizer.json``, or a SentencePiece model (``beit3.spm``), which is read without that package.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

_SENTENCEPIECE = (".model", ".spm")
_NAMES = {
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
    "bos_token": ("<s>", "<bos>", "<|startoftext|>", "<start_of_text>"),
    "eos_token": ("</s>", "<eos>", "<|endoftext|>", "<end_of_text>"),
    "pad_token": ("[PAD]", "<pad>"),
}
"""What special tokens are called, for files that do not say."""


def sentinels_of(words: Mapping[str, int]) -> tuple[int, ...]:
    """Return the ids of <extra_id_0>, <extra_id_1> and on, which T5's tokenizer has for hidden spans."""
    names = takewhile(words.__contains__, (f"<extra_id_{number}>" for number in count()))
    return tuple(words[name] for name in names)


def load_backend(source: str) -> Any:
    """Load a tokenizer of transformers.

    Args:
        source: A folder, one file, or a hub id.

    Raises:
        ValueError: Nothing there can be read as a tokenizer; in one line.
    """
    from transformers import AutoTokenizer

    path = Path(source)
    try:
        if path.is_file():
            return _from_file(path)
        if path.is_dir() and not any(_is_tokenizer(file) for file in path.iterdir()):
            # Of a folder with a model alone transformers makes a tokenizer of five tokens.
            raise ValueError("the folder holds no tokenizer files")
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        # A config.json may name a class whose files are not those that are here: it has no words then, or is slow.
        if not path.is_dir() or (tokenizer.is_fast and set(tokenizer.get_vocab()) > set(tokenizer.all_special_tokens)):
            return _name_specials(tokenizer)
        return _from_folder(path) or tokenizer
    # What is missing or unreadable shows as any of these, often with advice over several lines; `tokenizers` itself
    # raises bare Exceptions for broken files.
    except Exception as error:
        found = _second_try(path)
        if found is not None:
            return found
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"data.tokenizer.source '{source}' cannot be loaded: {reason}; give a folder with tokenizer files, a hub "
            "id (needs the network once), open_clip:MODEL, or train"
        ) from error


def _second_try(path: Path) -> Any:
    """By the files that a folder holds; None if that fails, too."""
    try:
        return _from_folder(path) if path.is_dir() else None
    except Exception:  # the first failure is what is told
        return None


def _is_tokenizer(file: Path) -> bool:
    known = ("tokenizer.json", "vocab.txt", "vocab.json")
    return file.name in known or file.suffix in _SENTENCEPIECE


def _from_folder(folder: Path) -> Any:
    """By the files that a folder holds, whatever its configs say; None if there are none."""
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        return _name_specials(PreTrainedTokenizerFast.from_pretrained(str(folder)))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_pairs(folder)
    models = sorted(path for path in folder.iterdir() if path.suffix in _SENTENCEPIECE)
    file = folder / "vocab.txt" if (folder / "vocab.txt").is_file() else next(iter(models), None)
    return None if file is None else _from_file(file)


def _from_file(path: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    if path.suffix == ".json":
        return _name_specials(PreTrainedTokenizerFast(tokenizer_file=str(path)))
    if path.suffix in _SENTENCEPIECE:
        return read_sentencepiece(path)
    if path.suffix == ".txt":
        return _wordpiece(path)
    raise ValueError(f"'{path.name}' is no vocab.txt, tokenizer.json or SentencePiece model")


def _wordpiece(path: Path) -> Any:
    """BERT's, cased if its vocabulary has capitals."""
    from transformers import BertTokenizer

    words = path.read_text(encoding="utf-8").splitlines()
    cased = any(word != word.lower() for word in words if not word.startswith("["))
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)}, do_lower_case=not cased)


def _byte_pairs(folder: Path) -> Any:
    """CLIP's, whose pieces mark the end of a word, or RoBERTa's."""
    from transformers import CLIPTokenizer, RobertaTokenizer

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    kind: Any = CLIPTokenizer if any(piece.endswith("</w>") for piece in vocabulary) else RobertaTokenizer
    return kind(vocab=vocabulary, merges=merges)


def _name_specials(tokenizer: Any) -> Any:
    """Give the special tokens of a bare tokenizer.json their roles, by their usual names."""
    if tokenizer.eos_token is None and tokenizer.sep_token is None:
        vocabulary = tokenizer.get_vocab()
        found = {role: [name for name in names if name in vocabulary] for role, names in _NAMES.items()}
        tokenizer.add_special_tokens({role: names[0] for role, names in found.items() if names})
    return tokenizer


def read_sentencepiece(path: Path) -> Any:
    """A unigram SentencePiece model as a ``PreTrainedTokenizerFast``.

    A model with a ``<pad>`` piece keeps its ids, and texts end with ``</s>`` (T5, SigLIP). One without is fairseq's
    (XLM-R, BEiT-3): ``<s> <pad> </s> <unk>`` take the ids 0 to 3, all pieces stand one later, ``<mask>`` is the last,
    and texts stand between ``<s>`` and ``</s>``.

    Raises:
        ValueError: It is no such model.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces, charsmap = _parse(path)
    names = {name: number for number, (name, _) in enumerate(pieces)}
    fairseq = "<pad>" not in names
    if fairseq:
        start = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        pieces = [*start, *pieces[3:], ("<mask>", 0.0)]
        names = {name: number for number, (name, _) in enumerate(pieces)}
    if "<unk>" not in names or "</s>" not in names:
        raise ValueError(f"'{path.name}' has no <unk> or no </s>, which its texts need; convert it to a tokenizer.json")
    backend = Tokenizer(models.Unigram(pieces, unk_id=names["<unk>"]))
    own = [normalizers.Precompiled(charsmap)] if charsmap else []
    backend.normalizer = normalizers.Sequence([*own, normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    single, pair = ("<s> $A </s>", "<s> $A </s> </s> $B </s>") if fairseq else ("$A </s>", "$A </s> $B </s>")
    special = [(name, names[name]) for name in (("<s>", "</s>") if fairseq else ("</s>",))]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    roles = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    if fairseq:
        roles |= {"bos_token": "<s>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def _parse(path: Path) -> tuple[list[tuple[str, float]], bytes]:
    """Pieces with their scores, and the compiled normalisation, of a SentencePiece ModelProto."""
    pieces: list[tuple[str, float]] = []
    charsmap, kind = b"", 1
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:  # pieces: 1 its text, 2 its score
                fields = dict(_fields(value))
                pieces.append((fields[1].decode(), struct.unpack("<f", fields.get(2, bytes(4)))[0]))
            elif number == 2:  # trainer_spec: 3 the kind of model
                kind = dict(_fields(value)).get(3, 1)
            elif number == 3:  # normalizer_spec: 2 precompiled_charsmap
                charsmap = dict(_fields(value)).get(2, b"")
    except (IndexError, KeyError, AttributeError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"'{path.name}' is no whole SentencePiece model; copy it again") from error
    if kind != 1 or len(pieces) < 4:
        raise ValueError(f"'{path.name}' is no unigram SentencePiece model; convert it to a tokenizer.json")
    return pieces, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: integers, or the bytes of anything else."""
    place = 0

    def integer() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
            if byte < 128:
                return value

    while place < len(data):
        key = integer()
        wire = key & 7
        if wire == 0:
            yield key >> 3, integer()
            continue
        length = integer() if wire == 2 else {1: 8, 5: 4}[wire]
        if place + length > len(data):
            raise IndexError(f"field {key >> 3} of {length} bytes ends after the data")
        yield key >> 3, data[place : place + length]
        place += length


def read_json(file: Path) -> dict[str, Any]:
    """Return a file's mapping, {} if there is none.

    Raises:
        ValueError: it cannot be read.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: {file} cannot be read: {error}; copy it again") from error
    return found if isinstance(found, dict) else {}


def add_places(backend: Any, codes: int, bins: int) -> list[str]:
    """Give a tokenizer of transformers words for codes of patches and for places along an image's sides; return them.

    They are words, which decoding keeps. The space before one belongs to it, so that nothing stands between two.
    """
    from transformers import AddedToken

    places = [f"<code_{number}>" for number in range(codes)] + [f"<bin_{number}>" for number in range(bins)]
    backend.add_tokens([AddedToken(place, lstrip=True, normalized=False) for place in places])
    return places
