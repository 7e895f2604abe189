"""Measure the embedded models: how well the bundled judge recognises real, reconstructed and generated pictures.

python benchmarks/atelier_quality.py

Needs Fashion-MNIST's test pictures (see ``--data_dir``). The figures are those of the model cards and of the README;
2,160 generated pictures take about six minutes on two CPU cores.
"""

import json
from dataclasses import dataclass

import sfumato
from sfumato import atelier
from sfumato.arguments import make_parser
from sfumato.evaluation.judge import Judge
from sfumato.loading import assets_folder
from sfumato.training.atelier_release import measure


@dataclass
class QualityConfig:
    """What to measure on.

    Attributes:
        data_dir: Folder with Fashion-MNIST's ``*-ubyte.gz`` files; None looks for Debian's package, then the Hub.
        repeats: Generated pictures for each of the 240 combinations of garment, style and colour.
        steps: DDIM steps of a generated picture.
    """

    data_dir: str | None = None
    repeats: int = 9
    steps: int = 50


def main(config: QualityConfig) -> None:
    """Measure, and print a table and JSON."""
    test = atelier.find_fashion_mnist(config.data_dir, "test")
    pipe, pixel = sfumato.load("atelier"), sfumato.load("atelier-pixel")
    pixel.set_progress_bar_config(disable=True)
    quality = measure(pipe, pixel, Judge.load(assets_folder() / "judge"), test, config.repeats, config.steps)
    print(json.dumps(quality, indent=1))
    for domain in quality["real"]:
        row = (f"{kind} {quality[kind][domain]['value']:.1%}" for kind in ("real", "reconstructed", "generated"))
        print(f"{domain:10}" + "  ".join(row))


if __name__ == "__main__":
    main(make_parser(QualityConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
