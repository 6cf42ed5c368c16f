"""Official metrics in pure Python and torch, one file a task or family of tasks."""

from downstream.metrics.captioning import bleu, caption_metrics, cider_d, document_frequencies, rouge_l
from downstream.metrics.classification import classification_metrics
from downstream.metrics.dialogue import ndcg, sparse_metrics
from downstream.metrics.referring import iou
from downstream.metrics.retrieval import retrieval_metrics, topk_chunked
from downstream.metrics.tokenize import tokenize
from downstream.metrics.translation import bleu4
from downstream.metrics.vqa import VqaResult, normalize_answer, soft_targets, vqa_accuracy, vqa_metrics

__all__ = [
    "VqaResult",
    "bleu",
    "bleu4",
    "caption_metrics",
    "cider_d",
    "classification_metrics",
    "document_frequencies",
    "iou",
    "ndcg",
    "normalize_answer",
    "retrieval_metrics",
    "rouge_l",
    "soft_targets",
    "sparse_metrics",
    "tokenize",
    "topk_chunked",
    "vqa_accuracy",
    "vqa_metrics",
]
