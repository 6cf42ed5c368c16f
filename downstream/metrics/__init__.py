"""Official metrics in pure Python and torch: captioning, VQA and retrieval."""

from downstream.metrics.captioning import bleu, caption_metrics, cider_d, document_frequencies, rouge_l
from downstream.metrics.retrieval import retrieval_metrics, topk_chunked
from downstream.metrics.tokenize import tokenize
from downstream.metrics.vqa import VqaResult, normalize_answer, soft_targets, vqa_accuracy, vqa_metrics

__all__ = [
    "VqaResult",
    "bleu",
    "caption_metrics",
    "cider_d",
    "document_frequencies",
    "normalize_answer",
    "retrieval_metrics",
    "rouge_l",
    "soft_targets",
    "tokenize",
    "topk_chunked",
    "vqa_accuracy",
    "vqa_metrics",
]
