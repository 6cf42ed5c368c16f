"""Tasks on a pretrained model: data, official metric, prediction and finetuning, one file per task."""
