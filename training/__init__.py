"""Launchable training jobs, one script each: ``accelerate launch -m sfumato.training.<job>``."""

if __name__ != "sfumato.training":
    raise ModuleNotFoundError("training/ is the package sfumato.training: install sfumato, then import that.")
