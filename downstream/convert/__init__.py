"""Converters from the official annotation files of data sets to our tables. One file a family, one line here each."""

from downstream.convert import captions, multi30k, reasoning, refcoco, sentiment, visdial, vqa
from downstream.convert.types import Converter

CONVERTERS: dict[str, Converter] = {
    "vqav2": vqa.vqav2,
    "vg_qa": vqa.vg_qa,
    "gqa": vqa.gqa,
    "coco_captions": captions.coco_captions,
    "nocaps": captions.nocaps,
    "textcaps": captions.textcaps,
    "karpathy": captions.karpathy,
    "refcoco": refcoco.refcoco,
    "visdial": visdial.visdial,
    "multi30k": multi30k.multi30k,
    "nlvr2": reasoning.nlvr2,
    "snli_ve": reasoning.snli_ve,
    "vcr": reasoning.vcr,
    "mosi": sentiment.mosi,
}
