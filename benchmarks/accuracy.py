"""What low precision costs a trained classifier: `python benchmarks/accuracy.py`.

Trains the example's classifier on the photographs that scikit-image ships, then compares top-1 on
pieces that the training did not see, for the model as it is and frozen in each dtype. Some minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from machine import facts
from torch import Tensor, nn

import moat_kernels as mk

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from photographs import Example, bundled_photographs, training_batch
from training import Settings, Trainer

BATCH = 16
CALIBRATION_BATCHES = 4


def batches(
    examples: list[Example], settings: Settings, count: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Random crops of photographs, in the training's way."""
    return [
        training_batch(
            examples,
            seed=seed,
            step=step,
            batch_size=BATCH,
            resolution=settings.resolution,
            preprocessing=mk.get_preprocessing(settings.model),
        )
        for step in range(count)
    ]


@torch.inference_mode()
def top1(model: nn.Module, tests: list[tuple[Tensor, Tensor]]) -> float:
    """Per cent of the images."""
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in tests)
    return 100 * right / sum(len(labels) for _, labels in tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="tiny_moat_0")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tests", type=int, default=125, help=f"batches of {BATCH} images")
    options = parser.parse_args()
    photographs = bundled_photographs()
    settings = Settings(
        model=options.model,
        classes=photographs.classes,
        resolution=96,
        batch_size=BATCH,
        steps=options.steps,
        lr=1e-3,
        seed=0,
        amp=False,
        recompute="auto",
        device="cpu",
    )
    trainer = Trainer("fused", settings)
    for step, (images, labels) in enumerate(
        batches(photographs.training, settings, options.steps, seed=0)
    ):
        trainer.step(step, images, labels)
    model = trainer.model.eval()
    tests = batches(photographs.held_out, settings, options.tests, seed=1)
    calibration = [
        images for images, _ in batches(photographs.training, settings, CALIBRATION_BATCHES, seed=2)
    ]
    in_int8 = mk.freeze(model, torch.int8, calibration)
    models = {
        "as it is": model,
        "frozen float32": mk.freeze(model),
        "frozen bfloat16": mk.freeze(model, torch.bfloat16),
        "frozen int8": in_int8,
    }
    print(facts())
    print(f"{options.model}, {options.steps} steps, {options.tests * BATCH} pieces held out")
    for name, candidate in models.items():
        print(f"{name:<16} top-1 {top1(candidate, tests):6.2f} %")
    print(in_int8)
    print(*in_int8.int8_report, sep="\n")


if __name__ == "__main__":
    main()
