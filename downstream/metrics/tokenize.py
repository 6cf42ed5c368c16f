"""Tokenisation of captions as the COCO caption evaluation does it, in pure Python.

pycocoevalcap runs Stanford's Java PTBTokenizer (CoreNLP 3.4.1) with `-preserveLines -lowerCase` and then removes a list
of punctuation tokens. Here the same is done with one regular expression, written from what the Java program answers,
not from its source. Sentence by sentence it agrees with that program on all 543 sentences stored with the tests (293
written to be difficult, 250 generated; 539 before the last differences were repaired), and on 3,991 of 4,000 generated
ones that mix words of the former at random and were not looked at before.

The reference's oddities are kept, since published scores contain them: parentheses stay, as `-lrb-` (the list names
`-LRB-`, but the tokens are lower-case), runs such as `!!` stay while `!` goes, a single letter keeps its period
("plan b."), the pound sign becomes `#`, the euro sign `$`, and most emoji (beyond the Basic Multilingual Plane) vanish.
One is not: Java drops the period of a single letter where a capitalised "The", "A", "It" or the like follows, even
in the next caption of the file, so that its tokens of a caption can depend on the caption after it.

What else may differ: telephone numbers, HTML tags with blanks, rare smileys, abbreviations not listed below, foreign
names with apostrophes, typographic apostrophes at the start of a word, and scripts other than those of Europe and
East Asia. Java's "1 1/2" is one token with a no-break space; it is two here, as BLEU and CIDEr-D split it anyway.
"""

import re
import unicodedata

# The reference removes these after tokenising; its bracket names are upper-case there and so never match.
PUNCTUATION = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})

_ALNUM = "[^\\W_²³¹⁰-₉¼-¾⅐-↏①-⓿]"  # letters and digits, without the superscripts and fractions that \w takes in
_WORD = f"(?:{_ALNUM}|[\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0e7f])"  # and combining marks
_LETTER = "(?:(?![0-9])" + _WORD + ")"
_END = f"(?!{_WORD})"
_ALONE = f"(?!{_WORD}|')"

# Abbreviations that keep their period: titles, companies, places, months and days, scholarly ones.
_ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bldg blvd brig bros calif capt cf cie
cmdr co col colo conn corp cos cpl dec dept det dr drs ens esq est etc ext feb fla fri ft ga gen gov govs hon
inc ind insp intl jan jos jr jul jun kan ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs
ms mt natl neb nev nov oct okla penn plc pres prof profs pte pty pvt rd rep reps rev rt sen sens sep sept sgt spc sq
sr st ste supt tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo
"""
_BEFORE_NUMBERS = "art arts ca fig figs no nos nr pp prop"  # "no. 5" keeps the period, "no." does not
_SYMBOLS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"} | {
    "£": "#", "€": "$", "¤": "$", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"
}  # fmt: skip
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_QUOTES = frozenset("\"'`‘’‛“”«»‹›「」…–—―‐‑‒")  # noqa: RUF001  quotes, ellipsis and dashes, which all go

# Tried in this order at each position; the first that matches is the token.
_RULES = (
    r"</?[a-zA-Z!][^<>]*>",
    r"&\#?\w+;",
    r"https?://[^\s\"<>|()]+[^\s\"<>|().,!?;:'-]",
    r"www\.[^\s\"<>|()]+[^\s\"<>|().,!?;:'-]",
    rf"{_WORD}[\w.+-]*@{_WORD}[^\s\"<>|().]*(?:\.[^\s\"<>|().]+)*",
    rf"@[a-zA-Z_]\w*|\#{_LETTER}+",
    rf">?[:;=](?:-|'|o)?[()\[\]|DP]{_END}|\^_\^|-_-",
    rf"\d+/\d+/\d+|\d+-\d+/\d+{_END}|\d+/\d+(?:-{_LETTER}+)*",
    rf"{_LETTER}(?:\.{_LETTER})+\.{_END}|[pP][hH]\.[dD]\.",
    rf"(?:{_WORD}+[-_])*{_LETTER}+?(?=n'[tT]{_END})|n't{_END}",
    rf"{_LETTER}{_WORD}*+(?:\.{_LETTER}{_WORD}*+)+",
    rf"(?i:{'|'.join(_ABBREVIATIONS.split())})\.{_END}",
    rf"(?i:{_BEFORE_NUMBERS.replace(' ', '|')})\.(?=\s?\d)",
    rf"[a-zA-Z]\.(?!{_LETTER})",
    rf"{_LETTER}++[!?]{_LETTER}+",
    r"'[nN]'",
    rf"(?i:c'(?:mon|est)|s'mores|ol'|nat'l|somethin'|'(?:em|till?|cause|n|[0-9]{{2}}s?)){_ALONE}",
    rf"(?i:can(?=not{_ALONE})|(?:gon|wan)(?=na{_ALONE})|got(?=ta{_ALONE})|(?:lem|gim)(?=me{_ALONE}))",
    rf"'[tT](?=(?i:is|was){_END})",
    rf"(?!\w'(?i:s|m|d|ll|re|ve){_END})(?:[dlnoDLNO]'{_LETTER}|[A-HJ-XZ]'{_LETTER}{{2}}){_WORD}*(?:-{_WORD}+)*",
    rf"{_LETTER}+[aeiouyAEIOUY]'[aeiouAEIOU]{_LETTER}*",
    rf"[yYjJ]'(?={_LETTER})",
    rf"'(?i:s|m|d|ll|re|ve){_END}",
    r"[A-Z]+(?:&[A-Z]+)+(?![a-z])",
    r"[cC]\+\+|[cCfF]\#(?!\w)|US\$(?=\d)",
    r"[-+]?\d*(?:[.,:]\d+)+",
    rf"{_WORD}++(?:-{_WORD}++)*(?:/{_LETTER}{_WORD}*+(?:-{_WORD}++)*)+|{_LETTER}{_WORD}*+(?:/{_WORD}++)+",
    rf"{_WORD}++(?:[-_]{_WORD}++)*",
    r"[-+]\d+",
    r"-{2,}|\.{3,}|[!?]+|\*+|_+|\#+|@+",
    r"\S",
)
_TOKEN = re.compile("|".join(f"(?:{rule})" for rule in _RULES))


def tokenize(caption: str) -> list[str]:
    """The tokens of one caption: Penn Treebank rules, lower-case, without punctuation.

    Args:
        caption: One caption; line breaks count as blanks.

    Returns:
        Tokens without blanks in them, possibly none.
    """
    text = "".join(map(_readable, caption.replace("\u2019", "'")))
    tokens = [_normalise(match[0]) for match in _TOKEN.finditer(text)]
    return [part for token in tokens for part in token.split() if part not in PUNCTUATION]


def _normalise(token: str) -> str:
    """Lower-case, with brackets, fractions and currencies as the Java tokeniser writes them; empty if it goes."""
    token = _ENTITIES.get(token, token)
    if token in _QUOTES or (len(token) > 1 and set(token) in ({"-"}, {"."})):
        return ""
    if len(token) == 1:
        return _SYMBOLS.get(token, token.lower())
    if token[0] == "<":  # a tag
        return token.lower()
    return token.lower().replace("(", "-lrb-").replace(")", "-rrb-")


def _readable(char: str) -> str:
    """A blank for what Java skips: beyond the Basic Multilingual Plane, invisible, or a currency it does not know."""
    if char.isascii():
        return char
    if char == "\u00ad":  # a soft hyphen does not part a word
        return ""
    skipped = ord(char) > 0xFFFF or char == "\ufe0f" or unicodedata.category(char) in ("Cf", "Me", "Cn", "Co", "Cs")
    return " " if skipped or (unicodedata.category(char) == "Sc" and char not in "£€¤¢¥₤") else char
