"""bigtrain: pretrain a language model, from text to a model that Hugging Face Transformers opens."""

__version__ = "0.1.0"
