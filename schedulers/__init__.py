"""Samplers that plug into any diffusers pipeline, one self-contained file each."""

if __name__ != "sfumato.schedulers":
    raise ModuleNotFoundError("schedulers/ is the package sfumato.schedulers: install sfumato, then import that.")
