"""Unlearn a concept by gradient ascent with a bound (after Fan et al., ICLR 2024, arXiv 2310.12508).

accelerate launch training/gradient_ascent.py --model atelier --forget sneaker --output out/
accelerate launch --num_processes 8 -m sfumato.training.gradient_ascent --model my/sd15 --forget cat --output out/

``--help`` lists every setting; the method itself is in ``sfumato/unlearning/gradient_ascent.py``.
"""

from sfumato.unlearning.job import main

if __name__ == "__main__":
    main("gradient_ascent")
