"""The bridge to Hugging Face Transformers: model files that travel, the name table, conversion."""
