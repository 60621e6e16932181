"""Import of GGUF files: file, blocks, config, tokenizer, and the importer over them."""
