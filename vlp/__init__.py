"""Vision-language pretraining with fused models."""
