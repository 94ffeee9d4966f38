"""How much of everything the demo makes. Learning rates and step counts stand in `configs/demo`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoScale:
    """Counts of samples, and sizes of the models that are made. `steps` cuts every run short; None leaves them as configured.

    `hidden` and `ffn` are the widths of encoder and head alike; the encoder has one layer more than trains. `probe_train` and
    `probe_test` are scenes of classes, of which a linear probe takes `per_class` of each class in a draw; `masked_train` and
    `masked_test` are scenes with masks, on which `heads` are trained for each encoder.
    """

    captions: int
    instruct: int
    pairs: int
    held_out: int
    probe_train: int
    probe_test: int
    per_class: int
    draws: int
    digits: bool
    masked_train: int
    masked_test: int
    heads: int
    gradients: int  # held-out pairs that Grad-CAM looks at
    image_size: int
    patch_size: int
    hidden: int
    ffn: int
    encoder_layers: int
    head_layers: int
    vocabulary: int
    steps: int | None
    compared: int  # held-out pairs on which exports are compared with the trained model
    seed: int = 777

    @staticmethod
    def full() -> DemoScale:
        """Under ten minutes on two cores."""
        return DemoScale(
            captions=14_000,
            instruct=10_000,
            pairs=3_000,
            held_out=900,
            probe_train=1_200,
            probe_test=600,
            per_class=50,
            draws=3,
            digits=True,
            masked_train=400,
            masked_test=200,
            heads=3,
            gradients=3,
            image_size=64,
            patch_size=16,
            hidden=128,
            ffn=384,
            encoder_layers=5,
            head_layers=4,
            vocabulary=768,
            steps=None,
            compared=16,
        )

    @staticmethod
    def smallest() -> DemoScale:
        """For tests: every phase, nothing learned."""
        return DemoScale(
            captions=64,
            instruct=64,
            pairs=64,
            held_out=12,
            probe_train=72,
            probe_test=24,
            per_class=5,
            draws=2,
            digits=False,
            masked_train=24,
            masked_test=12,
            heads=2,
            gradients=2,
            image_size=48,
            patch_size=12,
            hidden=32,
            ffn=48,
            encoder_layers=3,
            head_layers=2,
            vocabulary=400,
            steps=2,
            compared=4,
        )
