"""A pass on as many processes as it was launched with, for test_pictures.py: ``drawing_job.py OUTPUT [CACHE]``."""

import os
import sys

import torch

import sfumato
from sfumato import storage
from sfumato.evaluation.pictures import Request, draw_pictures

REQUESTS = [
    Request(f"a photo of a {word}", (0, k)) for k, word in enumerate(("bag", "boot", "coat", "dress", "shirt"))
]


def drawn(cache=None, **settings):
    settings = {"num_inference_steps": 2, "batch_size": 2, "description": None, **settings}
    return draw_pictures(sfumato.load("atelier"), REQUESTS, cache=cache, **settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pictures = drawn(sys.argv[2] if len(sys.argv) > 2 else None)
    storage.save_tensors(f"{sys.argv[1]}-{os.environ['RANK']}.safetensors", {"pictures": pictures})
