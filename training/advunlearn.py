"""Unlearn a concept with AdvUnlearn (Zhang et al., NeurIPS 2024, arXiv 2405.15234), on one process or many.

accelerate launch training/advunlearn.py --model atelier --forget sneaker --output out/
accelerate launch --num_processes 8 -m sfumato.training.advunlearn --model my/sd15 --forget "Van Gogh" --output out/

``--help`` lists every setting; the method itself is in ``sfumato/unlearning/advunlearn.py``.
"""

from sfumato.unlearning.job import main

if __name__ == "__main__":
    main("advunlearn")
