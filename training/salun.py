"""Unlearn a concept with SalUn (Fan et al., ICLR 2024, arXiv 2310.12508), on one process or many.

accelerate launch training/salun.py --model atelier --forget sneaker --output out/
accelerate launch --num_processes 8 -m sfumato.training.salun --model my/sd15 --forget "Van Gogh" --output out/

``--help`` lists every setting; the method itself is in ``sfumato/unlearning/salun.py``.
"""

from sfumato.unlearning.job import main

if __name__ == "__main__":
    main("salun")
