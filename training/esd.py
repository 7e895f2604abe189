"""Unlearn a concept with ESD (Gandikota et al., ICCV 2023, arXiv 2303.07345), on one process or many.

accelerate launch training/esd.py --model atelier --forget sneaker --output out/
accelerate launch --num_processes 8 -m sfumato.training.esd --model my/sd15 --forget "Van Gogh" --output out/

``--help`` lists every setting; the method itself is in ``sfumato/unlearning/esd.py``.
"""

from sfumato.unlearning.job import main

if __name__ == "__main__":
    main("esd")
