"""Plug-ins for inference engines. Importing this imports no engine; each module says what it needs."""

from headrace.loader.engines.drop_ins import patched_safetensors

__all__ = ["patched_safetensors"]
