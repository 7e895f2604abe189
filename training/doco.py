"""Unlearn a concept with DoCo (Wu et al., AAAI 2025, arXiv 2405.15304), on one process or many.

accelerate launch training/doco.py --model atelier --forget sneaker --output out/
accelerate launch --num_processes 8 -m sfumato.training.doco --model my/sd15 --forget "Van Gogh" --output out/

``--help`` lists every setting; the method itself is in ``sfumato/unlearning/doco.py``.
"""

from sfumato.unlearning.job import main

if __name__ == "__main__":
    main("doco")
