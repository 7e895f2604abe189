"""Trainings of what steers a model that stays as it is; see `sfumato.guidance.job`."""
