"""Command `explain`: explain which regions and graphs produced a photograph's labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.drawing import missing_letters
from pipeline.errors import InputError
from pipeline.formats.text import legible, markdown_table
from pipeline.heads.contract import Attribution
from pipeline.inference.explain import Explanation, LabelExplanation
from pipeline.inference.explain import explain as explain_image
from pipeline.inference.picture import MOST_LABELS, draw
from pipeline.inference.trained import Prediction, TrainedRun
from pipeline.regions.transforms import load_image
from stages.checkout.models import advising_on_scores, note_undecided, open_run
from stages.console.progress import progress_phase

_MOST_REGIONS = 3
_SAID: dict[Attribution | None, str] = {
    "logits": "its probability",
    "weights": "its weight",
    None: "",
}
"""Name of the column of what the region says for the label."""


def explain(
    image: Path,
    run_folder: Path,
    detector: Path | None,
    output: Path,
    labels: Sequence[str] = (),
) -> str:
    """Draw the explanation of a photograph.

    Args:
        image: the photograph.
        run_folder, detector: as `open_run` takes them.
        output: PNG to write.
        labels: the labels to explain; empty for the predicted ones.

    Returns:
        a table of the labels, and one of the regions that it names.

    Raises:
        GmpipeError: the run can't be loaded or lacks a label, the photograph can't be decoded, or
            what is computed for it is not finite.
    """
    if output.exists() and output.samefile(image):
        raise InputError(f"{output} is the photograph itself.", "Choose another name for `-o`.")
    photograph = load_image(image, "Name another photograph.")
    run = open_run(run_folder, detector)
    if not labels:
        note_undecided(run, "Name the labels to explain with `--label`.")
    with advising_on_scores(run.checkpoint.dataset), progress_phase("explain"):
        explanation = explain_image(run, photograph, str(image), labels)
    checkpoint = run.checkpoint
    missing_letters([image.name, *(label.label for label in explanation.labels[:MOST_LABELS])])
    made_by = f"{checkpoint.dataset}, {checkpoint.variant}, seed {checkpoint.seed}"
    draw(explanation, photograph, f"{legible(image.name)}: {made_by}", output)
    return _tables(explanation, run)


def _tables(explanation: Explanation, run: TrainedRun) -> str:
    lines = []
    if not explanation.predicted and not explanation.asked:
        fitted = explanation.prediction.decisions is not None
        above = "probability above its threshold" if fitted else "score above 0.5"
        lines += [f"No label has a {above}. This is the best one.", ""]
    lines.append("Changes of the score when something is removed:")
    lines.append(_labels_table(explanation, run))
    if not explanation.reads_regions:
        head = run.checkpoint.settings.network.head
        lines.append(f"The head {head} reads no regions, so removing them changes nothing.")
    regions = _named_regions(explanation)
    if regions:
        lines += ["", _regions_table(regions, explanation.prediction, run)]
    return "\n".join(lines)


def _labels_table(explanation: Explanation, run: TrainedRun) -> str:
    """A row for each label. Columns that no label has anything for are left out."""
    labels = explanation.labels
    scores = [f"{label.score:.3f}" for label in labels]
    said = [None if label.said is None else f"{label.said:.3f}" for label in labels]
    columns: dict[str, list[str | None]] = {
        "label": [label.label for label in labels],
        "score": [*scores],
        **_decided(explanation, run),
        "region": [
            "the whole image" if label.region is None else str(label.region) for label in labels
        ],
        # Where the best region makes the score, it would be the same column again.
        _SAID[explanation.attribution]: [None] * len(labels) if said == scores else said,
        "label graph": [_change(label.label_graph) for label in labels],
        "instance graph": [_change(label.instance_graph) for label in labels],
        "a region": [_changes(label, explanation) for label in labels],
    }
    kept = {name: cells for name, cells in columns.items() if set(cells) != {None}}
    rows = [[cell or "-" for cell in row] for row in zip(*kept.values(), strict=True)]
    return markdown_table(list(kept), rows)


def _decided(explanation: Explanation, run: TrainedRun) -> dict[str, list[str | None]]:
    """Columns of the fitted probabilities and thresholds, if the run fitted any."""
    prediction = explanation.prediction
    if prediction.decisions is None:
        return {}
    numbers = [run.vocabulary.index(label.label) for label in explanation.labels]
    columns = {"probability": prediction.probabilities, "threshold": prediction.thresholds}
    return {
        name: [f"{values[number]:.3f}" for number in numbers] for name, values in columns.items()
    }


def _influential(label: LabelExplanation) -> list[tuple[int, float]]:
    return label.most_influential(_MOST_REGIONS, least=0.0005)


def _named_regions(explanation: Explanation) -> list[int]:
    """The regions that the table of labels names."""
    winners = {label.region for label in explanation.labels if label.region is not None}
    influential = {region for label in explanation.labels for region, _ in _influential(label)}
    return sorted(winners | influential)


def _regions_table(regions: Sequence[int], prediction: Prediction, run: TrainedRun) -> str:
    rows = [
        [
            str(region),
            run.class_name(int(prediction.detector_classes[region])) or "none",
            f"{prediction.detector_scores[region]:.3f}",
            ", ".join(f"{side:.0f}" for side in prediction.pixel_box(region)),
        ]
        for region in regions
    ]
    headers = ["region", "detector's class", "its score", "box: left, top, right, bottom in pixels"]
    return markdown_table(headers, rows)


def _changes(label: LabelExplanation, explanation: Explanation) -> str:
    if not explanation.reads_regions:
        return "reads no regions"
    if label.region_changes is None:
        return "the only region"
    text = ", ".join(f"{region}: {change:+.3f}" for region, change in _influential(label))
    return text or "no region changes it"


def _change(change: float | None) -> str | None:
    return None if change is None else f"{change:+.3f}"
