"""Build the embedded emoji benchmark (vlp/data/emoji) from npm packages; the same packages give the same bytes.

Run from the root of the repository, in its environment:

    python scripts/build_emoji.py /tmp/emoji --install

DIR is where the packages are installed; ``--install`` has npm put them there first, which takes about 110 MB:

    npm install --prefix DIR emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 \
        @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0

The split is frozen: the program stops if the numbers of concepts, families or splits are not the published ones.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vlp.data.benchmark import STYLES, Concept, Split, split_hash

ROOT = Path(__file__).resolve().parent.parent
TEXTS = Path(__file__).resolve().parent / "emoji_texts"

PACKAGES = {
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "emojibase-data": "17.0.0",
}
IMAGES = {
    "noto": "emoji-datasource-google/img/google/64/*.png",
    "twemoji": "emoji-datasource-twitter/img/twitter/64/*.png",
    "fluent3d": "@lobehub/fluent-emoji-3d/assets/*.webp",
}
PUBLISHED = {"concepts": 1581, "families": 1369, "train": 1106, "val": 147, "test": 328}

SIDE = 64  # pixels
QUALITY = 80  # of lossy WebP, 0 to 100: 3.7 MB for the three styles
FLAGS_GROUP = "flags"
VARIATION_SELECTORS = {"FE0E", "FE0F"}  # text or emoji presentation; packages disagree on where they write them


@dataclass(frozen=True)
class Emoji:
    """One base emoji of emojibase, with ASCII label and tags as they are."""

    hexcode: str
    label: str
    tags: list[str]
    group: str
    family: str
    split: Split


def bare_hexcode(name: str) -> str:
    """Code points of a file name or hexcode, upper case, without variation selectors."""
    return "-".join(part for part in name.upper().split("-") if part not in VARIATION_SELECTORS)


def family_of(label: str) -> str:
    """Name shared by the concepts that differ in gender, time of day, family members or key only."""
    if re.search(r"o'clock|-thirty", label):
        return "clock face"
    if label.startswith("family"):
        return "family"
    if label.startswith("keycap"):
        return "keycap symbol"
    words = re.sub(r"\b(man|woman|person)\b|[:']", "", label.lower())
    return " ".join(words.split())


def split_of(family: str) -> Split:
    """Split of a family, by the md5 of its name as a line (what ``echo NAME | md5sum`` prints)."""
    digit = int(hashlib.md5(f"{family}\n".encode()).hexdigest(), 16) % 10
    return "test" if digit < 2 else "val" if digit == 2 else "train"


def read_emoji(modules: Path, known: set[str]) -> list[Emoji]:
    """Base emoji that all styles draw, ordered by hexcode: no flags, no skin tones, labels in ASCII.

    The labels outside ASCII (a typographic apostrophe counts as ASCII's) are the buttons that show a Japanese word
    and "piñata": 18 of them.
    """
    groups = json.loads((modules / "emojibase-data/meta/groups.json").read_text(encoding="utf-8"))["groups"]
    found = []
    for entry in json.loads((modules / "emojibase-data/en/data.json").read_text(encoding="utf-8")):
        hexcode, label = bare_hexcode(entry["hexcode"]), entry["label"].replace("\u2019", "'")
        group = groups.get(str(entry.get("group")), FLAGS_GROUP)  # the letters that flags are spelt with have none
        if hexcode in known and group != FLAGS_GROUP and label.isascii():
            family = family_of(label)
            found.append(Emoji(hexcode, label, entry.get("tags", []), group, family, split_of(family)))
    return sorted(found, key=lambda emoji: emoji.hexcode)


def encode_image(path: Path) -> bytes:
    """WebP of SIDE x SIDE pixels in RGB, on white."""
    with Image.open(path) as image:
        drawn = image.convert("RGBA")
    page = Image.new("RGBA", drawn.size, "white")
    page.alpha_composite(drawn)
    square = ImageOps.pad(page.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS, color="white")
    data = io.BytesIO()
    square.save(data, "WEBP", quality=QUALITY, method=6)
    return data.getvalue()


def members(emoji: Emoji, style: str, image: Path) -> Iterator[tuple[str, bytes]]:
    """Extension and content of the files of one sample."""
    fields = {
        "label": emoji.label,
        "tags": emoji.tags,
        "family": emoji.family,
        "split": emoji.split,
        "style": style,
        "group": emoji.group,
    }
    yield "webp", encode_image(image)
    yield "txt", emoji.label.encode()
    yield "json", json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


def write_shard(path: Path, style: str, emojis: list[Emoji], images: dict[str, Path]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for emoji in emojis:
            for extension, data in members(emoji, style, images[emoji.hexcode]):
                header = tarfile.TarInfo(f"{emoji.hexcode}.{extension}")  # time, user and group are 0
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


def counts_of(emojis: list[Emoji]) -> dict[str, int]:
    splits = Counter(emoji.split for emoji in emojis)
    return {
        "concepts": len(emojis),
        "families": len({emoji.family for emoji in emojis}),
        **{name: splits[name] for name in ("train", "val", "test")},
    }


def write_texts(modules: Path, out: Path, values: dict[str, Any]) -> None:
    """README, NOTICE and the licences: the packages' own files where they ship one."""
    for name in ("README.md", "NOTICE"):
        (out / name).write_text((TEXTS / name).read_text(encoding="utf-8").format(**values), encoding="utf-8")
    licences = out / "licences"
    licences.mkdir(exist_ok=True)
    shutil.copyfile(ROOT / "LICENSE", licences / "noto-Apache-2.0.txt")
    shutil.copyfile(TEXTS / "fluent-MIT.txt", licences / "fluent3d-MIT.txt")
    for package in ("emoji-datasource-google", "emoji-datasource-twitter", "emojibase-data"):
        text = (modules / package / "LICENSE").read_text(encoding="utf-8")
        (licences / f"{package}-MIT.txt").write_text(text.replace("\r\n", "\n"), encoding="utf-8")


def build(modules: Path, out: Path) -> dict[str, Any]:
    """Write the benchmark to ``out``; return the counts, the split's hash and the size of the images.

    Raises:
        ValueError: If a package is missing or of another version, or the counts are not the published ones.
    """
    for package, version in PACKAGES.items():
        manifest = modules / package / "package.json"
        installed = json.loads(manifest.read_text(encoding="utf-8"))["version"] if manifest.is_file() else "missing"
        if installed != version:
            raise ValueError(f"{package}: {version} is needed, {installed} in '{modules}'; run with --install")
    drawn = {style: {bare_hexcode(path.stem): path for path in modules.glob(IMAGES[style])} for style in STYLES}
    emojis = read_emoji(modules, set.intersection(*(set(images) for images in drawn.values())))
    counts = counts_of(emojis)
    if counts != PUBLISHED:
        raise ValueError(f"counts are {counts}, published are {PUBLISHED}; undo the change of the rules above")

    out.mkdir(parents=True, exist_ok=True)
    for style in STYLES:
        write_shard(out / f"{style}.tar", style, emojis, drawn[style])
    concepts = {emoji.hexcode: Concept(family=emoji.family, split=emoji.split) for emoji in emojis}
    digest = split_hash(concepts)
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(concept)}" for key, concept in concepts.items())
    (out / "split.json").write_text(f'{{"sha256": "{digest}", "concepts": {{\n{rows}\n}}}}\n', encoding="utf-8")
    values = {**counts, "sha256": digest, "side": SIDE, "quality": QUALITY}
    write_texts(modules, out, values)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, metavar="DIR", help="folder that the npm packages are installed in")
    parser.add_argument("--install", action="store_true", help="install the packages there with npm first")
    parser.add_argument("--out", type=Path, default=ROOT / "vlp/data/emoji", help="folder to write (%(default)s)")
    options = parser.parse_args()
    if options.install:
        wanted = [f"{package}@{version}" for package, version in PACKAGES.items()]
        subprocess.run(["npm", "install", "--prefix", str(options.packages), *wanted], check=True)
    try:
        values = build(options.packages / "node_modules", options.out)
    except ValueError as error:
        parser.error(str(error))
    print(*(f"{name}: {value}" for name, value in values.items()), sep="\n")


if __name__ == "__main__":
    main()
