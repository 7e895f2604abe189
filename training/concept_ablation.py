"""Unlearn a concept with Concept Ablation (Kumari et al., ICCV 2023, arXiv 2303.13516).

accelerate launch training/concept_ablation.py --model atelier --forget sneaker --output out/
accelerate launch --num_processes 8 -m sfumato.training.concept_ablation --model my/sd15 --forget cat --output out/

``--help`` lists every setting; the method itself is in ``sfumato/unlearning/concept_ablation.py``.
"""

from sfumato.unlearning.job import main

if __name__ == "__main__":
    main("concept_ablation")
