"""Diffusers pipelines, one self-contained file each."""

if __name__ != "sfumato.pipelines":
    raise ModuleNotFoundError("pipelines/ is the package sfumato.pipelines: install sfumato, then import that.")
