"""Objectives: tokens -> loss. One file an objective; adding one takes that file and a line here."""

from typing import Annotated, TypeAlias

from pydantic import Field

from objectives.answer import AnswerConfig
from objectives.assign import AssignConfig
from objectives.box import BoxConfig
from objectives.choose import ChooseConfig
from objectives.classify import ClassifyConfig
from objectives.denoise import DenoiseConfig
from objectives.fused_itc import FusedItcConfig
from objectives.infill import InfillConfig
from objectives.intra import IntraConfig
from objectives.itc import ItcConfig
from objectives.itm import ItmConfig
from objectives.lm import LmConfig
from objectives.mim import MimConfig
from objectives.mlm import MlmConfig
from objectives.mrm import MrmConfig
from objectives.multiview_itc import MultiviewItcConfig
from objectives.nearest_itc import NearestItcConfig
from objectives.pair_attention import PairAttentionConfig
from objectives.prefix_lm import PrefixLmConfig
from objectives.rank import RankConfig
from objectives.regress import RegressConfig
from objectives.seq2seq_mlm import Seq2SeqMlmConfig
from objectives.sigmoid import SigmoidConfig
from objectives.simsiam import SimSiamConfig
from objectives.span_corruption import SpanCorruptionConfig
from objectives.token_itc import TokenItcConfig
from objectives.wra import WraConfig

ObjectiveConfig: TypeAlias = Annotated[
    ItcConfig
    | SigmoidConfig
    | TokenItcConfig
    | IntraConfig
    | MultiviewItcConfig
    | NearestItcConfig
    | SimSiamConfig
    | FusedItcConfig
    | ItmConfig
    | MlmConfig
    | MimConfig
    | LmConfig
    | PrefixLmConfig
    | DenoiseConfig
    | InfillConfig
    | SpanCorruptionConfig
    | AnswerConfig
    | AssignConfig
    | BoxConfig
    | RankConfig
    | WraConfig
    | MrmConfig
    | PairAttentionConfig
    | Seq2SeqMlmConfig
    | ClassifyConfig
    | ChooseConfig
    | RegressConfig,
    Field(discriminator="kind"),
]
