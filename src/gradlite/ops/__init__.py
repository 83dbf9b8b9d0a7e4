"""Autograd functions, one operator a file. They know tensors only: no modules, no configs, no Hugging Face."""
