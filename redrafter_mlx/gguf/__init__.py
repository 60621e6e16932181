"""Import of GGUF files: file, blocks, config and tokenizer, and the importer that uses them."""
