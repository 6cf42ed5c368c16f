"""NLVR2: is a sentence true of two photographs? Suhr et al. 2019.

Data: columns left, right, sentence, label (True or False) and, for consistency and submission, identifier, as
`vlp data convert nlvr2` writes them; shards have the two images as members, in the order left, right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from downstream.metrics.verdict import consistency, sentence_of
from downstream.verdict import VerdictConfig
from vlp.data.loader import DataConfig
from vlp.data.reader import is_shards


class Nlvr2Config(VerdictConfig):
    """Say whether a sentence is true of two images."""

    kind: Literal["nlvr2"] = "nlvr2"
    labels: tuple[str, ...] = Field(default=("False", "True"), min_length=2)
    """The verdicts, in the order of a new head's outputs; data and checkpoints may differ in case."""

    images: ClassVar[int] = 2
    carried: ClassVar[tuple[str, ...]] = ("identifier",)

    def settings(self, data: DataConfig) -> DataConfig:
        """Sentences, and the columns left and right of a table, unless the user names others."""
        data = super().settings(data)
        specs = [one for spec in (data.train, data.val) for one in ([spec] if isinstance(spec, str) else spec or ())]
        if data.image is None and not any(map(is_shards, specs)):
            data = data.model_copy(update={"image": ("left", "right")})
        return data

    def score(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return accuracy, also by label, and consistency: sentences that are judged right with all of their images.

        Samples are of one sentence by their identifiers, without these by the sentence itself.
        """
        sentences = [sentence_of(row["identifier"]) if "identifier" in row else row["text"] for row in rows]
        found = super().score(rows)
        return {"accuracy": found.pop("accuracy"), "consistency": consistency(_right(rows), sentences)} | found

    def submission(self, predictions: Sequence[Mapping[str, Any]]) -> str:
        """Return the csv that the published evaluation reads: identifier,label without a header.

        Raises:
            ValueError: a prediction has no identifier.
        """
        for row in predictions:
            if "identifier" not in row:
                raise ValueError(
                    f"sample {row['key']} has no field identifier, by which NLVR2's evaluation knows it; convert the "
                    "official file with vlp data convert nlvr2"
                )
        return "".join(f"{row['identifier']},{row['prediction']}\n" for row in predictions)


def _right(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    return [row["correct"] for row in rows]
