"""Unlearn a concept by SalUn with a soft threshold (Fan et al., ICLR 2024, arXiv 2310.12508).

accelerate launch training/proximal.py --model atelier --forget sneaker --output out/
accelerate launch --num_processes 8 -m sfumato.training.proximal --model my/sd15 --forget cat --output out/

``--help`` lists every setting; the method itself is in ``sfumato/unlearning/proximal.py``.
"""

from sfumato.unlearning.job import main

if __name__ == "__main__":
    main("proximal")
