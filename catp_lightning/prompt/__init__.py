"""One call of a model and its prompt: what the caller gave, which rows are kept, masks, labels, attention, caches."""
