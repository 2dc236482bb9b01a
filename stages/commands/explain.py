"""Command `explain`: explain which regions and graphs produced a photograph's labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.drawing import missing_letters
from pipeline.errors import InputError
from pipeline.formats.text import legible, markdown_table
from pipeline.inference.explain import Explanation, LabelExplanation
from pipeline.inference.explain import explain as explain_image
from pipeline.inference.picture import MOST_LABELS, draw
from pipeline.inference.trained import TrainedRun
from pipeline.regions.transforms import load_image
from stages.checkout.models import advising_on_scores, open_run
from stages.console.progress import progress_phase

_MOST_REGIONS = 3


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
        lines += ["No label has a score above 0.5. This is the best one.", ""]
    regions = []
    rows = []
    for label in explanation.labels:
        influential = label.most_influential(_MOST_REGIONS, least=0.0005)
        regions += [label.region, *(region for region, _ in influential)]
        rows.append(
            [
                label.label,
                f"{label.score:.3f}",
                str(label.region),
                _change(label.label_graph),
                _change(label.instance_graph),
                _changes(label, influential),
            ]
        )
    lines.append("Changes of the score when something is removed:")
    headers = ["label", "score", "region", "label graph", "instance graph", "a region"]
    lines.append(markdown_table(headers, rows))
    if missing := _missing(explanation.labels[0]):
        lines.append(f"{_name(run)} has no {missing} to remove.")
    prediction = explanation.prediction
    rows = [
        [
            str(region),
            run.class_name(int(prediction.detector_classes[region])) or "none",
            f"{prediction.detector_scores[region]:.3f}",
            ", ".join(f"{side:.0f}" for side in prediction.pixel_box(region)),
        ]
        for region in sorted(set(regions))
    ]
    headers = ["region", "detector's class", "its score", "box: left, top, right, bottom in pixels"]
    lines += ["", markdown_table(headers, rows)]
    return "\n".join(lines)


def _name(run: TrainedRun) -> str:
    """Name the run as its folder does."""
    return f"{run.checkpoint.variant}-s{run.checkpoint.seed}"


def _changes(label: LabelExplanation, influential: list[tuple[int, float]]) -> str:
    if label.region_changes is None:
        return "the only region"
    text = ", ".join(f"{region}: {change:+.3f}" for region, change in influential)
    return text or "no region changes it"


def _change(change: float | None) -> str:
    return "none in this run" if change is None else f"{change:+.3f}"


def _missing(label: LabelExplanation) -> str:
    graphs = {"label graph": label.label_graph, "instance graph": label.instance_graph}
    return " and no ".join(name for name, change in graphs.items() if change is None)
