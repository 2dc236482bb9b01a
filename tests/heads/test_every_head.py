"""What every head in the registry must hold to, whatever it computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import (
    C,
    M,
    assert_same,
    attribution_of,
    head_settings,
    make_batch,
    make_head,
    make_label_set,
    make_truth,
    needs_whole,
    outputs_alike,
    permuted,
    select,
    with_garbage,
)
from toy_fits import fit, kinds_problem, ranking

from pipeline.heads.building import head_class
from pipeline.heads.contract import LabelSet
from pipeline.learning.losses import matching_loss
from pipeline.learning.prediction import finite_output
from pipeline.settings import (
    FeatureSettings,
    RegionSettings,
    TrainSettings,
    head_of_variant,
    head_variants,
    settings_class,
    variant_changes,
    variant_names,
)
from pipeline.settings.heads import HEADS

ALL = tuple(name for name in variant_names() if not name.endswith("-published"))
ONE_A_HEAD = tuple(entry.variants[0] for entry in HEADS.values())
OF_REGIONS = tuple(name for name in ALL if isinstance(head_settings(name), RegionSettings))


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_where_the_registry_says(head: str) -> None:
    entry = HEADS[head]
    assert head_class(head).__name__ == entry.name
    default = settings_class(head).model_fields["head"].default
    assert default == head, f'{entry.name}Settings lacks `head: Literal["{head}"] = "{head}"`'
    assert entry.file.exists()
    for variant in (*entry.variants, *entry.further):
        assert head_of_variant(variant) == head


@pytest.mark.parametrize("variant", ALL)
def test_a_head_returns_what_it_says(variant: str) -> None:
    images, labels = 5, make_label_set()  # all sizes differ, so that no axis passes for another
    head, batch, own_loss = make_head(variant), make_batch(images), head_settings(variant).own_loss
    output = head(batch, labels)
    assert output.image.shape == (images, C)
    says, returns = head.attribution is not None, output.regions is not None
    assert returns == says, "`attribution` of the class says whether `regions` are returned"
    if output.regions is not None:
        assert output.regions.shape == (images, M, C)
    loss = head.train()(batch, labels, make_truth(images)).loss
    returns = loss is not None
    assert returns == own_loss, "`own_loss` of the settings says whether `loss` is returned"
    if loss is not None:
        assert loss.shape == ()
    TrainSettings.model_validate(variant_changes(variant))  # the loss, among others


@pytest.mark.parametrize("variant", ALL)
def test_dropout_on_the_features_is_applied(variant: str) -> None:
    """It is a setting of all heads that read features, and each of them has to apply it itself."""
    if not isinstance(head_settings(variant), FeatureSettings):
        return
    head = make_head(variant, input_dropout=0.5).train()
    batch, labels, truth = make_batch(5, full=True), make_label_set(), make_truth(5)
    outputs = [head(batch, labels, truth).image for _ in range(2)]
    alike = torch.equal(*outputs)
    assert not alike, "two passes in training give the same logits with `input_dropout: 0.5`"


@pytest.mark.parametrize("variant", ALL)
def test_the_order_of_regions_does_not_matter(variant: str) -> None:
    head, batch, labels = make_head(variant), make_batch(4), make_label_set()
    order = torch.stack(
        [torch.randperm(M, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    )
    expected, actual = head(batch, labels), head(permuted(batch, order), labels)
    assert_same(actual.image, expected.image)
    if expected.regions is not None:
        assert_same(actual.regions, expected.regions.gather(1, order[..., None].expand(-1, -1, C)))


@pytest.mark.parametrize("variant", ALL)
def test_padding_does_not_matter(variant: str) -> None:
    head, batch, labels = make_head(variant), make_batch(4), make_label_set()
    expected, actual = head(batch, labels), head(with_garbage(batch), labels)
    assert_same(actual.image, expected.image)
    if expected.regions is not None:
        assert_same(actual.regions[:, :M], expected.regions)
        empty = -torch.inf if attribution_of(variant) == "logits" else 0.0
        assert (actual.regions[:, M:] == empty).all()
        assert (expected.regions[~batch.mask] == empty).all()


@pytest.mark.parametrize("variant", ALL)
def test_images_do_not_see_each_other(variant: str) -> None:
    head, batch, labels = make_head(variant), make_batch(4), make_label_set()
    together = head(batch, labels)
    for image in range(4):
        alone = head(select(batch, [image], slice(None)), labels)
        assert_same(alone.image, together.image[image : image + 1])


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("regions", [1, 2])
def test_few_labels_and_regions(variant: str, labels: int, regions: int) -> None:
    head = make_head(variant, labels=labels)
    known, truth = make_label_set(labels), make_truth(2, labels)
    output = head(make_batch(2, regions), known, truth)
    assert output.image.shape == (2, labels)
    assert output.image.isfinite().all()
    assert output.winners().shape == (2, labels)
    if output.regions is not None:
        assert output.regions.shape == (2, regions, labels)


@pytest.mark.parametrize("variant", ALL)
def test_every_parameter_learns(variant: str) -> None:
    # A parameter without a gradient is a mistake, and several processes can't train it.
    head, batch = make_head(variant), make_batch(6, full=True)
    output = head.train()(batch, make_label_set(), make_truth(6))
    weights = torch.linspace(-1, 2, output.image.numel(), dtype=torch.float64).view_as(output.image)
    loss = (output.image * weights).sum() if output.loss is None else output.loss
    loss.backward()
    without = [
        name
        for name, parameter in head.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any()
    ]
    assert without == []


@pytest.mark.parametrize("variant", ONE_A_HEAD)
@pytest.mark.parametrize("regions", [1, M])
def test_extreme_features_have_finite_scores_and_gradients(variant: str, regions: int) -> None:
    """As large as float16 allows, and far from what the training images had."""
    head, batch = (
        make_head(variant, dtype=torch.float32),
        make_batch(4, regions, dtype=torch.float32),
    )
    large = replace(batch, features=6e4 * batch.features, whole=6e4 * batch.of_whole())
    labels, truth = make_label_set(dtype=torch.float32), make_truth(4)
    output = head.train()(large, labels, truth)
    assert finite_output(output, batch.mask).all()
    loss = (
        matching_loss(output.image, truth, labels.ratio, 0.0)
        if output.loss is None
        else output.loss
    )
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("variant", ONE_A_HEAD)
def test_a_head_computes_in_bfloat16_but_for_its_loss(variant: str) -> None:
    head, batch = make_head(variant, dtype=torch.float32), make_batch(4, dtype=torch.float32)
    labels, truth = make_label_set(dtype=torch.float32), make_truth(4)
    with torch.autocast("cpu", torch.bfloat16):
        output = head(batch, labels, truth)
    expected = head(batch, labels, truth)
    if expected.loss is None:
        assert_same(output.image.float(), expected.image, 0.2)
        output.image.float().sum().backward()
    else:
        assert output.loss.dtype == torch.float32
        assert_same(output.loss, expected.loss, 0.2)
        output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("variant", ONE_A_HEAD)
def test_weights_that_are_not_finite_show_in_the_loss(variant: str) -> None:
    """The training then says where it diverged; a head must not fail before."""
    head = make_head(variant, dtype=torch.float32).train()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(torch.nan)
    labels, truth = make_label_set(dtype=torch.float32), make_truth(4)
    output = head(make_batch(4, dtype=torch.float32), labels, truth)
    assert not (output.image.sum() if output.loss is None else output.loss).isfinite()


@pytest.mark.parametrize("variant", ALL)
def test_a_head_reads_what_it_says(variant: str) -> None:
    head, batch, labels = make_head(variant), make_batch(4, full=True), make_label_set()
    expected = head(batch, labels)
    if needs_whole(variant):
        other = head(replace(batch, whole=batch.of_whole() + 1), labels)
        assert (other.image - expected.image).abs().max() > 1e-6
    else:
        outputs_alike(head(replace(batch, whole=None), labels), expected)
    if not head_settings(variant).reads_conditional:
        outputs_alike(head(batch, replace(labels, conditional=None)), expected)


@pytest.mark.parametrize("variant", OF_REGIONS)
def test_the_whole_view_as_one_more_region(variant: str) -> None:
    head = make_head(variant, whole_region=True)
    batch, labels = make_batch(4), make_label_set()
    output = head(batch, labels)
    by_hand = head.score(batch.with_whole_region(), labels)
    assert_same(output.image, by_hand.image)
    if by_hand.regions is not None:
        assert_same(torch.cat([output.regions, output.whole[:, None]], dim=1), by_hand.regions)
        winners = by_hand.winners()
        assert torch.equal(output.winners(), winners.masked_fill(winners == M, -1))


@pytest.mark.parametrize("variant", ALL)
def test_the_state_is_all_that_a_head_knows(variant: str) -> None:
    one, other = make_head(variant), make_head(variant, seed=5)
    other.load_state_dict(one.state_dict())
    batch, labels = make_batch(3), make_label_set()
    outputs_alike(one(batch, labels), other(batch, labels))


# That the ablations of GM-MLIC learn is shown in tests/learning.
@pytest.mark.parametrize("variant", head_variants())
def test_a_head_learns_what_regions_show(variant: str) -> None:
    batch, truth, _ = kinds_problem()
    together = truth.float().T @ truth.float()
    conditional = (together / together.diagonal()[:, None]).fill_diagonal_(0)
    vectors = make_label_set(dtype=torch.float32).vectors
    labels = LabelSet(vectors, truth.float().mean(dim=0), conditional)

    def learns(seed: int) -> bool:
        head = make_head(variant, dtype=torch.float32, seed=seed, label_set=labels)
        for _ in range(5):  # few need all of them
            fit(head, batch, labels, truth, steps=30)
            if ranking(head, batch, labels, truth) > 0.95:
                return True
        return ranking(head, batch, labels, truth) > 0.9

    # The max over regions has local optima, which a start among few labels can end in.
    assert any(learns(seed) for seed in range(3))
