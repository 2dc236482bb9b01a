"""Every head trains through the product's own loop, and a killed training ends as another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import head_settings
from toys import VECTORS, Killed, Toy, make_toy
from trainings import same, train

from pipeline.learning.prediction import Scorer
from pipeline.learning.training import known_labels
from pipeline.settings import TrainSettings, head_variants, variant_changes


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    recipe = {"regions": 3, "views": 2, "whole": True}
    return make_toy(tmp_path_factory.mktemp("toy"), recipe, whole=True)


@pytest.mark.parametrize("variant", head_variants())
def test_a_killed_training_of_a_head_resumes(toy: Toy, tmp_path: Path, variant: str) -> None:
    dropouts = [name for name in type(head_settings(variant)).model_fields if "dropout" in name]
    chosen = TrainSettings.model_validate(
        {
            **variant_changes(variant),
            "network": head_settings(variant, **dict.fromkeys(dropouts, 0.2)),
            "epochs": 2,
            "batch_size": 16,
        }
    )
    undisturbed = train(toy, tmp_path / "a.pt", chosen=chosen)

    def kill(step: int) -> None:
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        train(toy, tmp_path / "b.pt", chosen=chosen, on_step=kill, save_every=0)
    torch.manual_seed(99)
    assert same(train(toy, tmp_path / "b.pt", chosen=chosen), undisturbed)
    labels = known_labels(toy.train, VECTORS, chosen)
    scorer = Scorer(undisturbed.network, labels, VECTORS.names, name="it", batch_size=5)
    predictions = scorer.predict(toy.train)
    assert np.isfinite(predictions.logits).all()
    assert ((predictions.regions >= -1) & (predictions.regions < 3)).all()
