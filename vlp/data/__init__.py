"""Reading image-text data: readers, order, transforms, tokenizer, batches."""
